"""The report of a benchmark: what its JSON file holds, and how it is read. docs/benchmark.md documents it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo.evaluation.speed.cold_start import ColdStart
from flowturbo.evaluation.speed.conditions import ENGINES, Condition, Subject
from flowturbo.evaluation.speed.energy import Energy
from flowturbo.evaluation.speed.memory import ProcessMemory
from flowturbo.evaluation.speed.rounds import Series
from flowturbo.evaluation.speed.statistics import Ratio, Statistics, count_required_samples, summarise
from flowturbo.evaluation.speed.timed_pipeline import STAGES
from runtime.system.errors import RequestError
from runtime.system.json_codec import read_versioned

SCHEMA = 1
ALL_STAGES = (*STAGES, "host", "png")
DRIFT_LIMIT = 1.1
"""Ratio of the last third to the first above which a condition gets a warning."""


@dataclass(frozen=True)
class StageStatistics(Statistics):
    """One stage: statistics over its calls, the calls of a run, and their sum per run.

    `host` and `png` have one call per run: the rest of the run, and its encoding.
    """

    calls_per_run: float
    per_run_ms: float | None


@dataclass(frozen=True)
class ConditionSamples:
    """Milliseconds of every sample in the order of the rounds: per run, and of every single call."""

    image_ms: tuple[float, ...]
    png_ms: tuple[float, ...]
    host_ms: tuple[float, ...]
    runs_ms: Mapping[str, tuple[float, ...]]
    calls_ms: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class ConditionResult:
    """One condition, measured.

    Attributes:
        clock: clock that times the calls of its networks.
        image: a run of `condition.batch` pictures, from the request to encoded PNGs.
        images_per_s: pictures over the time of all runs.
        drift: median of the last third of the runs over the first third's.
        energy, energy_problem: joules per picture, or why they are unknown.
        latents_off: of a baseline: largest relative rms between its latents and those of any engines.
    """

    condition: Condition
    clock: str
    nfe: Mapping[str, float]
    image: Statistics
    images_per_s: float
    stages: Mapping[str, StageStatistics]
    warmup_ms: tuple[float, ...]
    drift: float | None
    peak_rss_bytes: int | None
    peak_problem: str
    energy: Energy | None
    energy_problem: str
    latents_off: float | None
    samples: ConditionSamples


@dataclass(frozen=True)
class Comparison:
    """Two conditions of one run, round by round.

    Attributes:
        condition, against: indices of conditions.
        ratio: time of `against` over time of `condition`: how many times faster `condition` is.
        latents_off: relative rms between the two's latents, where `against` is a baseline.
    """

    condition: int
    against: int
    ratio: Ratio
    latents_off: float | None = None


@dataclass(frozen=True)
class Throughput:
    """Images per second of a condition; `condition` is its index."""

    condition: int
    engine: str
    implementation: str
    sampler: str
    resolution: int
    batch: int
    images_per_s: float


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of the GPU in use by all programs, before and after the benchmark; None where NVML is missing."""

    used_bytes_before: int | None
    used_bytes_after: int | None


@dataclass(frozen=True)
class DirectoryMemory(ProcessMemory):
    """Memory of a fresh process that runs one engine directory alone."""

    engine: str
    resolution: int
    weight_bytes: int | None


@dataclass(frozen=True)
class MemorySummary:
    """Memory of this process with all that it compares, of the GPU, and of each engine directory alone."""

    process: ProcessMemory
    gpu: GpuMemory
    alone: tuple[DirectoryMemory, ...]


@dataclass(frozen=True)
class BenchmarkReport:
    """A benchmark.

    Attributes:
        stages, image: of the main condition: the stable core of this file, with `throughput`, `memory`, `environment`.
        engines: hash, precision, files, sources of every directory by label.
        rounds: how it was measured.
    """

    schema: int
    flowturbo: str
    created: str
    command: tuple[str, ...]
    stages: Mapping[str, StageStatistics]
    image: Statistics
    throughput: tuple[Throughput, ...]
    memory: MemorySummary
    environment: Mapping[str, Any]
    engines: Mapping[str, Any]
    rounds: Mapping[str, Any]
    conditions: tuple[ConditionResult, ...]
    comparisons: tuple[Comparison, ...]
    cold: tuple[ColdStart, ...]
    yardstick: Statistics
    yardstick_ms: tuple[float, ...]
    warnings: tuple[str, ...]


def summarise_condition(
    series: Series[Subject],
    *,
    energy: Energy | None,
    energy_problem: str,
    latents_off: float | None,
) -> ConditionResult:
    """Return the statistics of a series."""
    samples, condition = series.samples, series.subject.condition
    image_ms = [sample.image_ms for sample in samples]
    runs = {stage: [sum(sample.calls.get(stage, ())) for sample in samples] for stage in STAGES}
    calls = {stage: [ms for sample in samples for ms in sample.calls.get(stage, ())] for stage in STAGES}
    host, png = [sample.host_ms for sample in samples], [sample.png_ms for sample in samples]
    stages = {stage: summarise_stage(calls[stage], runs[stage]) for stage in STAGES}
    stages |= {"host": summarise_stage(host, host), "png": summarise_stage(png, png)}
    return ConditionResult(
        condition=condition,
        clock=series.subject.clock_name,
        nfe=series.subject.nfe,
        image=summarise(image_ms),
        images_per_s=round(1e3 * condition.batch * len(image_ms) / sum(image_ms), 4),
        stages=stages,
        warmup_ms=_round_all_ms(series.warmup_ms),
        drift=compute_drift(image_ms),
        peak_rss_bytes=series.peak_rss_bytes,
        peak_problem=series.peak_problem,
        energy=energy,
        energy_problem=energy_problem,
        latents_off=latents_off,
        samples=ConditionSamples(
            image_ms=_round_all_ms(image_ms),
            png_ms=_round_all_ms(png),
            host_ms=_round_all_ms(host),
            runs_ms={stage: _round_all_ms(values) for stage, values in runs.items()},
            calls_ms={stage: _round_all_ms(values) for stage, values in calls.items()},
        ),
    )


def summarise_stage(calls_ms: Sequence[float], runs_ms: Sequence[float]) -> StageStatistics:
    """Return the statistics of a stage from its calls and their sums per run."""
    statistics = {field.name: getattr(summarise(calls_ms), field.name) for field in fields(Statistics)}
    per_run = round(float(np.mean(runs_ms)), 4) if runs_ms else None
    return StageStatistics(
        **statistics, calls_per_run=round(len(calls_ms) / max(len(runs_ms), 1), 3), per_run_ms=per_run
    )


def compute_drift(image_ms: Sequence[float]) -> float | None:
    """Return the median of the last third over that of the first; None with fewer than six runs."""
    third = len(image_ms) // 3
    if third < 2:
        return None
    return round(float(np.median(image_ms[-third:]) / np.median(image_ms[:third])), 4)


def list_sample_warnings(results: Sequence[ConditionResult]) -> list[str]:
    """Return warnings of drifts, large variance and too few runs."""
    warnings = []
    for result in results:
        name, image = result.condition.name, result.image
        if result.drift is not None and not 1 / DRIFT_LIMIT <= result.drift <= DRIFT_LIMIT:
            direction = "slower" if result.drift > 1 else "faster"
            change = abs(result.drift - 1)
            warnings.append(
                f"{name}: the last third of the runs was {change:.0%} {direction} than the first: heat, clocks "
                "or other work"
            )
        if image.sd_ms and image.mean_ms and image.sd_ms > 0.1 * image.mean_ms:
            warnings.append(f"{name}: runs vary by {image.sd_ms / image.mean_ms:.0%} (standard deviation over mean)")
    num_short = sum(result.image.p95_ms is None for result in results)
    if num_short:
        count = f"{num_short} of {len(results)} conditions have" if num_short < len(results) else "there are"
        warnings.append(
            f"{count} fewer than {count_required_samples(95)} runs, too few for a 95th percentile: --duration "
            "or --repeats"
        )
    return warnings


def pick_main_result(results: Sequence[ConditionResult]) -> ConditionResult:
    """Return the condition that the stable core describes: the first that runs engines."""
    return next((result for result in results if result.condition.implementation == ENGINES), results[0])


def list_throughput(results: Sequence[ConditionResult]) -> tuple[Throughput, ...]:
    """Return the images per second of every condition."""
    return tuple(
        Throughput(index, c.engine, c.implementation, c.sampler, c.resolution, c.batch, result.images_per_s)
        for index, result in enumerate(results)
        for c in (result.condition,)
    )


def summarise_memory(process: ProcessMemory, cold: Sequence[ColdStart], gpu: GpuMemory) -> MemorySummary:
    """Summarise the peaks; of each directory alone, its second cold start counts."""
    return MemorySummary(
        process,
        gpu,
        tuple(
            DirectoryMemory(**vars(c.ran), engine=c.engine, resolution=c.resolution, weight_bytes=c.weight_bytes)
            for c in cold
            if c.caches == "kept"
        ),
    )


def read_report(path: Path) -> BenchmarkReport:
    """Read a report that `flowturbo-bench --out` wrote.

    Raises:
        RequestError: missing, damaged, something else, or of a newer schema.
    """
    return read_versioned(
        path,
        BenchmarkReport,
        SCHEMA,
        name="report of flowturbo-bench",
        remedy="flowturbo-bench ENGINES --out FILE.json writes one",
        error_type=RequestError,
    )


def _round_all_ms(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)
