"""A benchmark from its options to its report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flowturbo.evaluation.speed.baselines import (
    BaselineOptions,
    BaselineSubject,
    check_agreement,
    open_baselines,
)
from flowturbo.evaluation.speed.bench_report import (
    SCHEMA,
    BenchmarkReport,
    Comparison,
    ConditionResult,
    list_sample_warnings,
    list_throughput,
    pick_main_result,
    summarise_condition,
    summarise_memory,
)
from flowturbo.evaluation.speed.cold_start import ColdStart, measure_cold_starts
from flowturbo.evaluation.speed.conditions import (
    ENGINES,
    EngineSubject,
    Subject,
    build_engine_subject,
    check_batch,
    request_to_json,
)
from flowturbo.evaluation.speed.energy import Energy, find_energy_meter, measure_energy
from flowturbo.evaluation.speed.environment import list_environment_warnings, read_environment
from flowturbo.evaluation.speed.memory import read_process_memory
from flowturbo.evaluation.speed.nvml import Nvml
from flowturbo.evaluation.speed.rounds import ProgressCallback, Rounds, RoundsResult, Series, measure_in_turns
from flowturbo.evaluation.speed.statistics import compute_median_ratio, summarise
from flowturbo.evaluation.speed.timed_pipeline import TimedPipeline
from runtime.request import RequestOptions
from runtime.system.errors import BackendError, RequestError
from runtime.system.version import VERSION

ENERGY_SECONDS = 3.0
SETTLE_SECONDS = 0.05
"""Pause before a sample where a baseline's threads share the cores: OpenMP's spin for a while after their work."""
PipelinesByKey = dict[tuple[str, int], TimedPipeline]
LatentErrors = Mapping[tuple[int, int], float]
"""How far a baseline's latents are from those of engines, by the places of (engines, baseline) among all conditions."""


@dataclass(frozen=True)
class BenchmarkJob:
    """What to benchmark.

    Attributes:
        folders: engine directories.
        classes: taken in turn for the images of a batch; any known ones if empty.
        samplers: options of `Pipeline.request`, one set per sampler.
        resolutions: empty for each directory's first.
        load_options: further keyword arguments of `Pipeline.load`.
        conditioning: "fresh" or "kept", see `Condition`.
        baselines, checkpoints: what to compare with, and from which files.
    """

    folders: tuple[Path, ...]
    classes: tuple[str, ...] = ()
    samplers: tuple[RequestOptions, ...] = (RequestOptions(),)
    batches: tuple[int, ...] = (1,)
    resolutions: tuple[int, ...] = ()
    load_options: Mapping[str, Any] = field(default_factory=dict)
    rounds: Rounds = field(default_factory=Rounds)
    conditioning: str = "fresh"
    seed: int = 0
    decode: bool = True
    cold: bool = True
    energy: bool = True
    baselines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    checkpoints: Mapping[str, Path] = field(default_factory=dict)


def run_benchmark(
    job: BenchmarkJob, command: Sequence[str], progress: ProgressCallback = lambda text, share: None
) -> BenchmarkReport:
    """Runs the benchmark.

    Raises:
        FlowTurboError: the engines, the request or a baseline are not possible; nothing is reported then.
    """
    environment = read_environment()  # before anything here makes the machine busy
    warnings = list_environment_warnings(environment)
    gpu_before = _read_gpu_used_bytes()
    cold_starts = _run_cold_starts(job, warnings, progress) if job.cold else []
    with ExitStack() as stack:
        pipelines = _load_pipelines(job, stack)
        engines = _build_engine_subjects(job, pipelines, warnings)
        baselines = _build_baseline_subjects(job, pipelines, engines, progress)
        latent_errors = _check_baselines(engines, baselines, progress)
        subjects: list[Subject] = [*engines, *baselines]
        settle = SETTLE_SECONDS if baselines else 0.0
        measurement = measure_in_turns(subjects, job.rounds, progress=progress, settle_seconds=settle)
        warnings += _list_backend_notes(pipelines)  # some are known only when a picture was made
        gpu_memory = {"used_bytes_before": gpu_before, "used_bytes_after": _read_gpu_used_bytes()}
        energies = _measure_energies(job, measurement, pipelines, progress)
        results = [
            summarise_condition(
                series,
                energy=energy,
                energy_problem=energy_problem,
                latents_off=max((value for (_, other), value in latent_errors.items() if other == index), default=None),
            )
            for index, (series, (energy, energy_problem)) in enumerate(zip(measurement.series, energies, strict=True))
        ]
        engines_by_label = {
            label: _describe_engines(pipelines, label) for label in dict.fromkeys(label for label, _ in pipelines)
        }
    main_result = pick_main_result(results)
    return BenchmarkReport(
        schema=SCHEMA,
        flowturbo=VERSION,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=tuple(command),
        stages=main_result.stages,
        image=main_result.image,
        throughput=list_throughput(results),
        memory=summarise_memory(read_process_memory(), cold_starts, gpu_memory),
        environment=environment,
        engines=engines_by_label,
        rounds={**asdict(job.rounds), "taken": max(len(series.samples) for series in measurement.series)},
        conditions=tuple(results),
        comparisons=tuple(_list_comparisons(results, latent_errors)),
        cold=tuple(cold_starts),
        yardstick=summarise(measurement.yardstick_ms),
        yardstick_ms=tuple(round(ms, 4) for ms in measurement.yardstick_ms),
        warnings=tuple([*warnings, *list_sample_warnings(results)]),
    )


def label_folders(folders: Sequence[Path]) -> list[str]:
    """A short name for each directory: its own, or its path where two share one.

    Raises:
        RequestError: a directory is named twice.
    """
    names = [folder.resolve().name for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RequestError("an engine directory is named twice", remedy="name each once; --repeats makes more rounds")
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def _load_pipelines(job: BenchmarkJob, stack: ExitStack) -> PipelinesByKey:
    pipelines: PipelinesByKey = {}
    for label, folder in zip(label_folders(job.folders), job.folders, strict=True):
        for resolution in job.resolutions or (None,):
            pipeline = TimedPipeline.open(folder, resolution, **job.load_options)
            stack.enter_context(pipeline)
            pipelines[label, pipeline.resolution] = pipeline
    return pipelines


def _build_engine_subjects(job: BenchmarkJob, pipelines: PipelinesByKey, warnings: list[str]) -> list[EngineSubject]:
    """Every directory × resolution × sampler × batch."""
    subjects: list[EngineSubject] = []
    for (label, _), pipeline in pipelines.items():
        for batch in job.batches:
            if (split_warning := check_batch(batch, pipeline.manifest)) and split_warning not in warnings:
                warnings.append(split_warning)
            for options in job.samplers:
                subject = build_engine_subject(
                    label, pipeline, job.classes, batch, options,
                    conditioning=job.conditioning, seed=job.seed, decode=job.decode,
                )  # fmt: skip
                if subject.condition in [other.condition for other in subjects]:
                    raise RequestError(f"{subject.condition.name} is asked for twice", remedy="name each sampler once")
                subjects.append(subject)
    return subjects


def _build_baseline_subjects(
    job: BenchmarkJob, pipelines: PipelinesByKey, engines: Sequence[EngineSubject], progress: ProgressCallback
) -> list[BaselineSubject]:
    """Every baseline for every task, once for directories that were built from the same checkpoints."""
    subjects: list[BaselineSubject] = []
    covered: set[tuple[str, str, bool]] = set()
    baselines_by_key: dict[tuple[str, int, bool], Any] = {}
    for engine in engines if job.baselines else ():
        sources = str(sorted(engine.pipeline.manifest.model.sources.items()))
        cuda = is_on_gpu(engine.pipeline)
        if (sources, engine.condition.task, cuda) in covered:
            continue
        covered.add((sources, engine.condition.task, cuda))
        key = (sources, engine.condition.resolution, cuda)
        if key not in baselines_by_key:
            progress("loading the baseline's checkpoints", 0.0)
            baselines_by_key[key] = open_baselines(
                job.baselines,
                BaselineOptions(
                    engine.pipeline.manifest,
                    engine.condition.resolution,
                    job.checkpoints,
                    job.load_options.get("threads"),
                    cuda,
                ),
            )
        for baseline in baselines_by_key[key]:
            condition = replace(
                engine.condition,
                implementation=baseline.name,
                runner=baseline.runner,
                precision=baseline.precision,
                vae=engine.request.vae,  # whole, whatever tiles the engines take
                conditioning="in every evaluation",
            )
            subjects.append(BaselineSubject(condition, baseline, engine.request))
    return subjects


def _check_baselines(
    engines: Sequence[EngineSubject], baselines: Sequence[BaselineSubject], progress: ProgressCallback
) -> LatentErrors:
    """Relative rms of the latents of every baseline from all engines it will be divided by, before anything is
    measured."""
    latent_errors = {}
    for baseline_index, subject in enumerate(baselines, start=len(engines)):
        progress(f"{subject.condition.name}: first picture (compiles where it is compiled)", 0.0)
        subject.sample()
        for engine_index, engine in enumerate(engines):
            if engine.condition.task == subject.condition.task:
                engine.sample()
                latent_errors[engine_index, baseline_index] = check_agreement(subject, engine.condition, engine.latents)
    return latent_errors


def _run_cold_starts(job: BenchmarkJob, warnings: list[str], progress: ProgressCallback) -> list[ColdStart]:
    """First pictures of fresh processes, of the first sampler, while this process holds no engines.

    Engines that are open here would take memory, and their threads cores, from what is measured. So they are opened to
    find out what is not possible, which also brings their files into the page cache, and closed again.
    """
    with ExitStack() as stack:
        pipelines = _load_pipelines(job, stack)
        _build_engine_subjects(job, pipelines, [])
        folders_by_key = {key: pipeline.folder for key, pipeline in pipelines.items()}
    cold_starts: list[ColdStart] = []
    for (label, resolution), folder in folders_by_key.items():
        progress(f"starting fresh processes with {label}", 0.0)
        load_options = {**job.load_options, "resolution": resolution}
        try:
            cold_starts += measure_cold_starts(
                label, folder, load_options, request_to_json(job.classes, job.samplers[0], decode=job.decode)
            )
        except BackendError as error:
            warnings.append(error.given)
    return cold_starts


def _measure_energies(
    job: BenchmarkJob, measurement: RoundsResult, pipelines: PipelinesByKey, progress: ProgressCallback
) -> list[tuple[Energy | None, str]]:
    """Joules per picture of every condition, where something counts them."""
    if not job.energy:
        return [(None, "not asked for")] * len(measurement.series)
    energies: list[tuple[Energy | None, str]] = []
    for series in measurement.series:
        pipeline = pipelines[series.subject.condition.engine, series.subject.condition.resolution]
        meter, problem = find_energy_meter(is_on_gpu(pipeline))
        if meter is None:
            energies.append((None, problem))
            continue
        progress(f"counting joules of {series.subject.condition.name}", 1.0)
        try:
            energies.append((measure_energy(meter, _make_image_callback(series), ENERGY_SECONDS), ""))
        except BackendError as error:
            energies.append((None, error.given))
    return energies


def _make_image_callback(series: Series) -> Any:
    def image() -> int:
        series.subject.sample()
        return series.subject.condition.batch

    return image


def _list_comparisons(results: Sequence[ConditionResult], latent_errors: LatentErrors) -> list[Comparison]:
    """Engines against every baseline of their task, and against the first condition of their size."""
    comparisons = []
    for index, result in enumerate(results):
        condition = result.condition
        if condition.implementation != ENGINES:
            continue
        baseline_indices = [
            i
            for i, other in enumerate(results)
            if other.condition.implementation != ENGINES and other.condition.task == condition.task
        ]
        first_index = next(
            i
            for i, other in enumerate(results)
            if (other.condition.resolution, other.condition.batch) == (condition.resolution, condition.batch)
        )
        for other in [*([first_index] if first_index != index else []), *baseline_indices]:
            image_times_ms = results[index].samples.image_ms, results[other].samples.image_ms
            comparisons.append(
                Comparison(
                    index, other, compute_median_ratio(*image_times_ms, paired=True), latent_errors.get((index, other))
                )
            )
    return comparisons


def _describe_engines(pipelines: PipelinesByKey, label: str) -> dict[str, Any]:
    label_pipelines = [pipeline for (name, _), pipeline in pipelines.items() if name == label]
    manifest, pipeline = label_pipelines[0].manifest, label_pipelines[0]
    return {
        "folder": str(pipeline.folder.resolve()),
        "hash": manifest.engine_hash,
        "target": pipeline.choice.target,
        "precision": pipeline.precision,
        "sources": dict(manifest.model.sources),
        "max_batch": manifest.max_batch,
        "weight_bytes": {str(p.resolution): p.weight_bytes() for p in label_pipelines},
        "notes": list(pipeline.ran.notes),
    }


def _list_backend_notes(pipelines: PipelinesByKey) -> list[str]:
    """What backends say of themselves, such as a provider that fell back; and the fake one, which says nothing."""
    notes = [f"{label}: {note}" for (label, _), pipeline in pipelines.items() for note in pipeline.ran.notes]
    if any(pipeline.ran.backend == "fake" for pipeline in pipelines.values()):
        notes.append("the fake device computes a formula: these are no figures of the engines")
    return list(dict.fromkeys(notes))


def is_on_gpu(pipeline: TimedPipeline) -> bool:
    """Whether the engines run on an NVIDIA GPU."""
    ran = pipeline.ran
    return ran.backend in ("tensorrt", "rtx") or ran.provider.startswith(("CUDA", "NvTensorRT"))


def _read_gpu_used_bytes() -> int | None:
    """Bytes of the backends' GPU that are in use, by everybody; None where NVML is missing."""
    try:
        return Nvml.for_first_gpu().read_used_bytes()
    except BackendError:
        return None
