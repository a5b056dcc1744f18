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
    Comparison,
    ConditionResult,
    Report,
    condition_result,
    first_of,
    memory_of,
    throughput_of,
    warnings_of,
)
from flowturbo.evaluation.speed.cold_start import ColdStart, cold_starts
from flowturbo.evaluation.speed.conditions import (
    ENGINES,
    EngineSubject,
    Subject,
    check_batch,
    engine_subject,
    request_to_json,
)
from flowturbo.evaluation.speed.energy import Energy, energy_meter, measure_energy
from flowturbo.evaluation.speed.environment import environment, worries
from flowturbo.evaluation.speed.memory import process_memory
from flowturbo.evaluation.speed.nvml import Nvml
from flowturbo.evaluation.speed.rounds import Measured, Progress, Rounds, Series, measure
from flowturbo.evaluation.speed.statistics import ratio_of_medians, summarise
from flowturbo.evaluation.speed.timed_pipeline import TimedPipeline
from runtime.request import RequestOptions
from runtime.system.errors import BackendError, RequestError
from runtime.system.version import VERSION

ENERGY_SECONDS = 3.0
SETTLE_SECONDS = 0.05
"""Pause before a sample where a baseline's threads share the cores: OpenMP's spin for a while after their work."""
Places = dict[tuple[str, int], TimedPipeline]
Agreements = Mapping[tuple[int, int], float]
"""How far a baseline's latents are from those of engines, by the places of (engines, baseline) among all conditions."""


@dataclass(frozen=True)
class Job:
    """What to benchmark.

    Attributes:
        folders: engine directories.
        classes: taken in turn for the images of a batch; any known ones if empty.
        samplers: options of `Pipeline.request`, one set per sampler.
        resolutions: empty for each directory's first.
        load: further keyword arguments of `Pipeline.load`.
        conditioning: "fresh" or "kept", see `Condition`.
        baselines, checkpoints: what to compare with, and from which files.
    """

    folders: tuple[Path, ...]
    classes: tuple[str, ...] = ()
    samplers: tuple[RequestOptions, ...] = (RequestOptions(),)
    batches: tuple[int, ...] = (1,)
    resolutions: tuple[int, ...] = ()
    load: Mapping[str, Any] = field(default_factory=dict)
    rounds: Rounds = field(default_factory=Rounds)
    conditioning: str = "fresh"
    seed: int = 0
    decode: bool = True
    cold: bool = True
    energy: bool = True
    baselines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    checkpoints: Mapping[str, Path] = field(default_factory=dict)


def run_job(job: Job, command: Sequence[str], progress: Progress = lambda text, share: None) -> Report:
    """Runs the benchmark.

    Raises:
        FlowTurboError: the engines, the request or a baseline are not possible; nothing is reported then.
    """
    found = environment()  # before anything here makes the machine busy
    warnings = worries(found)
    gpu_before = _gpu_used()
    cold = _cold(job, warnings, progress) if job.cold else []
    with ExitStack() as stack:
        pipelines = _load(job, stack)
        engines = _engine_subjects(job, pipelines, warnings)
        baselines = _baseline_subjects(job, pipelines, engines, progress)
        off = _agreements(engines, baselines, progress)
        subjects: list[Subject] = [*engines, *baselines]
        settle = SETTLE_SECONDS if baselines else 0.0
        measured = measure(subjects, job.rounds, progress=progress, settle_seconds=settle)
        warnings += _remarks(pipelines)  # some are known only when a picture was made
        gpu = {"used_bytes_before": gpu_before, "used_bytes_after": _gpu_used()}
        energies = _energies(job, measured, pipelines, progress)
        results = [
            condition_result(
                series,
                energy=energy,
                energy_problem=why,
                latents_off=max((value for (_, other), value in off.items() if other == place), default=None),
            )
            for place, (series, (energy, why)) in enumerate(zip(measured.series, energies, strict=True))
        ]
        described = {label: _describe(pipelines, label) for label in dict.fromkeys(label for label, _ in pipelines)}
    first = first_of(results)
    return Report(
        schema=SCHEMA,
        flowturbo=VERSION,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=tuple(command),
        stages=first.stages,
        image=first.image,
        throughput=throughput_of(results),
        memory=memory_of(process_memory(), cold, gpu),
        environment=found,
        engines=described,
        rounds={**asdict(job.rounds), "taken": max(len(series.samples) for series in measured.series)},
        conditions=tuple(results),
        comparisons=tuple(_comparisons(results, off)),
        cold=tuple(cold),
        yardstick=summarise(measured.yardstick_ms),
        yardstick_ms=tuple(round(ms, 4) for ms in measured.yardstick_ms),
        warnings=tuple([*warnings, *warnings_of(results)]),
    )


def labels_of(folders: Sequence[Path]) -> list[str]:
    """A short name for each directory: its own, or its path where two share one.

    Raises:
        RequestError: a directory is named twice.
    """
    names = [folder.resolve().name for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RequestError("an engine directory is named twice", remedy="name each once; --repeats makes more rounds")
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def _load(job: Job, stack: ExitStack) -> Places:
    pipelines: Places = {}
    for label, folder in zip(labels_of(job.folders), job.folders, strict=True):
        for resolution in job.resolutions or (None,):
            pipeline = TimedPipeline.open(folder, resolution, **job.load)
            stack.enter_context(pipeline)
            pipelines[label, pipeline.resolution] = pipeline
    return pipelines


def _engine_subjects(job: Job, pipelines: Places, warnings: list[str]) -> list[EngineSubject]:
    """Every directory × resolution × sampler × batch."""
    subjects: list[EngineSubject] = []
    for (label, _), pipeline in pipelines.items():
        for batch in job.batches:
            if (split := check_batch(batch, pipeline.manifest)) and split not in warnings:
                warnings.append(split)
            for options in job.samplers:
                subject = engine_subject(
                    label, pipeline, job.classes, batch, options,
                    conditioning=job.conditioning, seed=job.seed, decode=job.decode,
                )  # fmt: skip
                if subject.condition in [other.condition for other in subjects]:
                    raise RequestError(f"{subject.condition.name} is asked for twice", remedy="name each sampler once")
                subjects.append(subject)
    return subjects


def _baseline_subjects(
    job: Job, pipelines: Places, engines: Sequence[EngineSubject], progress: Progress
) -> list[BaselineSubject]:
    """Every baseline for every task, once for directories that were built from the same checkpoints."""
    subjects: list[BaselineSubject] = []
    done: set[tuple[str, str, bool]] = set()
    opened: dict[tuple[str, int, bool], Any] = {}
    for engine in engines if job.baselines else ():
        sources = str(sorted(engine.pipeline.manifest.model.sources.items()))
        cuda = on_gpu(engine.pipeline)
        if (sources, engine.condition.task, cuda) in done:
            continue
        done.add((sources, engine.condition.task, cuda))
        place = (sources, engine.condition.resolution, cuda)
        if place not in opened:
            progress("loading the baseline's checkpoints", 0.0)
            opened[place] = open_baselines(
                job.baselines,
                BaselineOptions(
                    engine.pipeline.manifest,
                    engine.condition.resolution,
                    job.checkpoints,
                    job.load.get("threads"),
                    cuda,
                ),
            )
        for baseline in opened[place]:
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


def _agreements(
    engines: Sequence[EngineSubject], baselines: Sequence[BaselineSubject], progress: Progress
) -> Agreements:
    """Relative rms of the latents of every baseline from all engines it will be divided by, before anything is
    measured."""
    off = {}
    for place, subject in enumerate(baselines, start=len(engines)):
        progress(f"{subject.condition.name}: first picture (compiles where it is compiled)", 0.0)
        subject.sample()
        for own, engine in enumerate(engines):
            if engine.condition.task == subject.condition.task:
                engine.sample()
                off[own, place] = check_agreement(subject, engine.condition, engine.latents)
    return off


def _cold(job: Job, warnings: list[str], progress: Progress) -> list[ColdStart]:
    """First pictures of fresh processes, of the first sampler, while this process holds no engines.

    Engines that are open here would take memory, and their threads cores, from what is measured. So they are opened to
    find out what is not possible, which also brings their files into the page cache, and closed again.
    """
    with ExitStack() as stack:
        pipelines = _load(job, stack)
        _engine_subjects(job, pipelines, [])
        places = {place: pipeline.folder for place, pipeline in pipelines.items()}
    starts: list[ColdStart] = []
    for (label, resolution), folder in places.items():
        progress(f"starting fresh processes with {label}", 0.0)
        load = {**job.load, "resolution": resolution}
        try:
            starts += cold_starts(label, folder, load, request_to_json(job.classes, job.samplers[0], decode=job.decode))
        except BackendError as error:
            warnings.append(error.given)
    return starts


def _energies(job: Job, measured: Measured, pipelines: Places, progress: Progress) -> list[tuple[Energy | None, str]]:
    """Joules per picture of every condition, where something counts them."""
    if not job.energy:
        return [(None, "not asked for")] * len(measured.series)
    found: list[tuple[Energy | None, str]] = []
    for series in measured.series:
        pipeline = pipelines[series.subject.condition.engine, series.subject.condition.resolution]
        meter, why = energy_meter(on_gpu(pipeline))
        if meter is None:
            found.append((None, why))
            continue
        progress(f"counting joules of {series.subject.condition.name}", 1.0)
        try:
            found.append((measure_energy(meter, _maker(series), ENERGY_SECONDS), ""))
        except BackendError as error:
            found.append((None, error.given))
    return found


def _maker(series: Series) -> Any:
    def image() -> int:
        series.subject.sample()
        return series.subject.condition.batch

    return image


def _comparisons(results: Sequence[ConditionResult], off: Agreements) -> list[Comparison]:
    """Engines against every baseline of their task, and against the first condition of their size."""
    found = []
    for place, result in enumerate(results):
        own = result.condition
        if own.implementation != ENGINES:
            continue
        against = [
            i
            for i, other in enumerate(results)
            if other.condition.implementation != ENGINES and other.condition.task == own.task
        ]
        first = next(
            i
            for i, other in enumerate(results)
            if (other.condition.resolution, other.condition.batch) == (own.resolution, own.batch)
        )
        for other in [*([first] if first != place else []), *against]:
            times = results[place].samples.image_ms, results[other].samples.image_ms
            found.append(Comparison(place, other, ratio_of_medians(*times, paired=True), off.get((place, other))))
    return found


def _describe(pipelines: Places, label: str) -> dict[str, Any]:
    own = [pipeline for (name, _), pipeline in pipelines.items() if name == label]
    manifest, pipeline = own[0].manifest, own[0]
    return {
        "folder": str(pipeline.folder.resolve()),
        "hash": manifest.engine_hash,
        "target": pipeline.choice.target,
        "precision": pipeline.precision,
        "sources": dict(manifest.model.sources),
        "max_batch": manifest.max_batch,
        "weight_bytes": {str(p.resolution): p.weight_bytes() for p in own},
        "notes": list(pipeline.ran.notes),
    }


def _remarks(pipelines: Places) -> list[str]:
    """What backends say of themselves, such as a provider that fell back; and the fake one, which says nothing."""
    remarks = [f"{label}: {note}" for (label, _), pipeline in pipelines.items() for note in pipeline.ran.notes]
    if any(pipeline.ran.backend == "fake" for pipeline in pipelines.values()):
        remarks.append("the fake device computes a formula: these are no figures of the engines")
    return list(dict.fromkeys(remarks))


def on_gpu(pipeline: TimedPipeline) -> bool:
    """Whether the engines run on an NVIDIA GPU."""
    ran = pipeline.ran
    return ran.backend in ("tensorrt", "rtx") or ran.provider.startswith(("CUDA", "NvTensorRT"))


def _gpu_used() -> int | None:
    """Bytes of the backends' GPU that are in use, by everybody; None where NVML is missing."""
    try:
        return Nvml.of_backends().used_bytes()
    except BackendError:
        return None
