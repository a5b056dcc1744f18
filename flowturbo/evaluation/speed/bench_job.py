"""Run a benchmark, from its options to its report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flowturbo.evaluation.load_options import LoadOptions
from flowturbo.evaluation.speed.baselines import (
    BaselineOptions,
    BaselineSubject,
    check_agreement,
    import_torch_baselines,
)
from flowturbo.evaluation.speed.bench_report import (
    SCHEMA,
    BenchmarkReport,
    Comparison,
    ConditionResult,
    GpuMemory,
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
)
from flowturbo.evaluation.speed.energy import Energy, find_energy_meter, measure_energy
from flowturbo.evaluation.speed.environment import list_environment_warnings, read_environment
from flowturbo.evaluation.speed.memory import read_process_memory
from flowturbo.evaluation.speed.nvml import Nvml
from flowturbo.evaluation.speed.rounds import Rounds, Series, measure_in_turns
from flowturbo.evaluation.speed.statistics import compute_median_ratio, summarise
from flowturbo.evaluation.speed.timed_pipeline import TimedPipeline
from runtime.request import RequestOptions
from runtime.system.errors import BackendError, RequestError
from runtime.system.progress import SILENT, Progress
from runtime.system.version import VERSION

if TYPE_CHECKING:
    from flowturbo.evaluation.speed.torch_baseline import TorchBaseline

ENERGY_SECONDS = 3.0
SETTLE_SECONDS = 0.05
"""Pause before a sample where a baseline's threads share the cores: OpenMP threads spin for a while after work."""
PipelinesByKey = dict[tuple[str, int], TimedPipeline]
LatentErrors = dict[tuple[int, int], float]
"""Relative rms between latents of engines and of a baseline, by their indices among all conditions."""


@dataclass(frozen=True)
class BenchmarkJob:
    """The options of a benchmark.

    Attributes:
        folders: engine directories.
        classes: taken in turn for the images of a batch; any known ones if empty.
        samplers: options of `Pipeline.request`, one set per sampler.
        resolutions: empty for each directory's first.
        conditioning: "fresh" or "kept", see `Condition`.
        baselines: modes of PyTorch to compare with.
        checkpoints: files of the baselines by role.
    """

    folders: tuple[Path, ...]
    classes: tuple[str, ...] = ()
    samplers: tuple[RequestOptions, ...] = (RequestOptions(),)
    batches: tuple[int, ...] = (1,)
    resolutions: tuple[int, ...] = ()
    load_options: LoadOptions = field(default_factory=lambda: LoadOptions())
    rounds: Rounds = field(default_factory=Rounds)
    conditioning: str = "fresh"
    seed: int = 0
    decode: bool = True
    cold: bool = True
    energy: bool = True
    baselines: tuple[str, ...] = ()
    checkpoints: Mapping[str, Path] = field(default_factory=dict)


def run_benchmark(job: BenchmarkJob, command: Sequence[str], progress: Progress = SILENT) -> BenchmarkReport:
    """Run the benchmark.

    Raises:
        FlowTurboError: the engines, the request or a baseline are not possible; nothing is reported then.
    """
    environment = read_environment()  # before anything here makes the machine busy
    warnings = list_environment_warnings(environment)
    gpu_bytes_before = _read_gpu_used_bytes()
    cold_starts = _run_cold_starts(job, warnings, progress) if job.cold else []
    latent_errors: LatentErrors = {}
    with ExitStack() as stack:
        pipelines = _load_pipelines(job, stack)
        engines = _build_engine_subjects(job, pipelines, warnings)
        baselines = _build_baseline_subjects(job, engines, progress) if job.baselines else []
        for baseline_index, baseline in enumerate(baselines, start=len(engines)):
            progress.stage(f"{baseline.name}: first picture (compiles where it is compiled)")
            baseline.sample()
            for index, engine in enumerate(engines):
                if engine.condition.task == baseline.condition.task:
                    engine.sample()
                    error = check_agreement(baseline, engine.condition, engine.latents)
                    latent_errors[index, baseline_index] = error
        subjects: list[Subject] = [*engines, *baselines]
        measurement = measure_in_turns(
            subjects, job.rounds, progress=progress, settle_seconds=SETTLE_SECONDS if baselines else 0.0
        )
        # Some notes are known only after a picture, such as a provider that fell back.
        notes = [f"{label}: {note}" for (label, _), pipeline in pipelines.items() for note in pipeline.ran.notes]
        if any(pipeline.ran.backend == "fake" for pipeline in pipelines.values()):
            notes.append("the fake device computes a formula: these are no figures of the engines")
        warnings += dict.fromkeys(notes)
        gpu_memory = GpuMemory(gpu_bytes_before, _read_gpu_used_bytes())
        results = []
        for index, series in enumerate(measurement.series):
            energy, problem = _measure_energy(series, pipelines, progress) if job.energy else (None, "not asked for")
            errors = [error for (_, other), error in latent_errors.items() if other == index]
            results.append(
                summarise_condition(
                    series, energy=energy, energy_problem=problem, latents_off=max(errors, default=None)
                )
            )
        first_pipelines: dict[str, TimedPipeline] = {}
        for (label, _), pipeline in pipelines.items():
            first_pipelines.setdefault(label, pipeline)
        engines_by_label = {
            label: {
                "folder": str(pipeline.folder.resolve()),
                "hash": pipeline.manifest.engine_hash,
                "target": pipeline.choice.target,
                "precision": pipeline.precision,
                "sources": dict(pipeline.manifest.model.sources),
                "max_batch": pipeline.manifest.max_batch,
                "weight_bytes": {str(px): p.weight_bytes() for (name, px), p in pipelines.items() if name == label},
                "notes": list(pipeline.ran.notes),
            }
            for label, pipeline in first_pipelines.items()
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
        rounds={
            "repeats": job.rounds.repeats,
            "duration": job.rounds.duration,
            "warmup": job.rounds.warmup,
            "taken": max(len(series.samples) for series in measurement.series),
        },
        conditions=tuple(results),
        comparisons=tuple(_list_comparisons(results, latent_errors)),
        cold=tuple(cold_starts),
        yardstick=summarise(measurement.yardstick_ms),
        yardstick_ms=tuple(round(ms, 4) for ms in measurement.yardstick_ms),
        warnings=tuple([*warnings, *list_sample_warnings(results)]),
    )


def label_folders(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each directory: its own, or its path where two share one.

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
    """Build a subject for every directory × resolution × sampler × batch."""
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
    job: BenchmarkJob, engines: Sequence[EngineSubject], progress: Progress
) -> list[BaselineSubject]:
    """Build every baseline for every task, once for directories that have the same checkpoints."""
    subjects: list[BaselineSubject] = []
    covered: set[tuple[str, str, bool]] = set()
    baselines_by_key: dict[tuple[str, int, bool], Sequence[TorchBaseline]] = {}
    plugin = import_torch_baselines()
    for engine in engines:
        manifest, resolution, cuda = engine.pipeline.manifest, engine.condition.resolution, is_on_gpu(engine.pipeline)
        sources = str(sorted(manifest.model.sources.items()))
        if (sources, engine.condition.task, cuda) in covered:
            continue
        covered.add((sources, engine.condition.task, cuda))
        key = (sources, resolution, cuda)
        if key not in baselines_by_key:
            progress.stage("loading the baseline's checkpoints")
            options = BaselineOptions(manifest, resolution, job.checkpoints, job.load_options.get("threads"), cuda)
            baselines_by_key[key] = plugin.open(job.baselines, options)
        for baseline in baselines_by_key[key]:
            condition = replace(
                engine.condition,
                implementation=baseline.name,
                runner=baseline.runner,
                precision=baseline.precision,
                vae=engine.request.vae,  # whole, even where the engines decode in tiles
                conditioning="in every evaluation",
            )
            subjects.append(BaselineSubject(condition, engine.request, baseline))
    return subjects


def _run_cold_starts(job: BenchmarkJob, warnings: list[str], progress: Progress) -> list[ColdStart]:
    """Measure first pictures of fresh processes with the first sampler, while no engines are open here.

    Open engines would take memory, and their threads cores, from what is measured. So they are opened to check the
    request, which also brings their files into the page cache, and closed again.
    """
    with ExitStack() as stack:
        pipelines = _load_pipelines(job, stack)
        _build_engine_subjects(job, pipelines, [])
        folders_by_key = {key: pipeline.folder for key, pipeline in pipelines.items()}
    cold_starts: list[ColdStart] = []
    for (label, resolution), folder in folders_by_key.items():
        progress.stage(f"starting fresh processes with {label}")
        try:
            cold_starts += measure_cold_starts(
                label, folder, resolution, job.load_options, job.classes, job.samplers[0], decode=job.decode
            )
        except BackendError as error:
            warnings.append(error.given)
    return cold_starts


def _measure_energy(
    series: Series[Subject], pipelines: PipelinesByKey, progress: Progress
) -> tuple[Energy | None, str]:
    """Measure the joules per picture of a condition; return why they are unknown otherwise."""
    condition = series.subject.condition
    meter, problem = find_energy_meter(is_on_gpu(pipelines[condition.engine, condition.resolution]))
    if meter is None:
        return None, problem
    progress.stage(f"counting joules of {condition.name}")
    try:
        return measure_energy(meter, series.subject.sample, condition.batch, ENERGY_SECONDS), ""
    except BackendError as error:
        return None, error.given


def _list_comparisons(results: Sequence[ConditionResult], latent_errors: LatentErrors) -> list[Comparison]:
    """Compare engines with every baseline of their task, and with the first condition of their size."""
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


def is_on_gpu(pipeline: TimedPipeline) -> bool:
    """Return whether the engines run on an NVIDIA GPU."""
    ran = pipeline.ran
    return ran.backend in ("tensorrt", "rtx") or ran.provider.startswith(("CUDA", "NvTensorRT"))


def _read_gpu_used_bytes() -> int | None:
    """Read the bytes of the backends' GPU in use by all programs; None where NVML is missing."""
    try:
        return Nvml.for_first_gpu().read_used_bytes()
    except BackendError:
        return None
