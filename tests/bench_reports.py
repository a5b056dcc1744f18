"""Reports made of given times, for tests of what is done with reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.speed.bench_report import (
    SCHEMA,
    BenchmarkReport,
    Comparison,
    GpuMemory,
    list_sample_warnings,
    list_throughput,
    summarise_condition,
    summarise_memory,
)
from flowturbo.evaluation.speed.cold_start import ColdStart
from flowturbo.evaluation.speed.conditions import Condition
from flowturbo.evaluation.speed.energy import Energy
from flowturbo.evaluation.speed.memory import ProcessMemory
from flowturbo.evaluation.speed.rounds import Sample, Series
from flowturbo.evaluation.speed.statistics import compute_median_ratio, summarise
from flowturbo.evaluation.speed.timed_pipeline import MONOTONIC

CONDITION = Condition("engines", "engines", "fake", "fp32", "H1P5R3", {}, 4.0, 3, (0.0, 1.0), 64, 1, "ema", "fresh")
MEMORY = ProcessMemory(300 << 20, 200 << 20, 120 << 20, 80 << 20)
ENVIRONMENT = {
    "platform": "Linux",
    "python": "3.11",
    "driver": None,
    "cpu": {"model": "a CPU", "physical_cores": 2, "logical_cores": 2, "governor": None},
    "gpus": [],
    "jetson": None,
    "versions": {"numpy": "2"},
}


class FinishedSubject:
    """A subject whose samples are there already."""

    latents = np.zeros(1, np.float32)
    clock_name = MONOTONIC

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        self.nfe = (
            {"predictor": 16.0, "refiner": 0.0} if condition.sampler == "H8" else {"predictor": 7.0, "refiner": 6.0}
        )

    @property
    def name(self) -> str:
        return self.condition.name

    def sample(self) -> Sample:
        raise AssertionError("nothing is measured here")


def make_report(
    *times: tuple[Condition, Sequence[float] | NDArray[np.float64]],
    yardstick: Sequence[float] = (2.0,) * 40,
    **changes: object,
) -> BenchmarkReport:
    """A report of these image times; two thirds of each are the predictor's seven calls, a twentieth is PNG."""
    results = []
    for condition, image_ms in times:
        samples = [
            Sample(ms, ms / 20, {"predictor": [ms * 2 / 21] * 7, "refiner": [], "decoder": [ms / 5]}) for ms in image_ms
        ]
        series = Series(FinishedSubject(condition), samples, [1.5 * image_ms[0]], 250 << 20)
        energy = Energy("a meter", "the board", 10, 3.0, 30.0, 3.0, 10.0, 4.0)
        latents_error = None if condition.implementation == "engines" else 1e-6
        results.append(summarise_condition(series, energy=energy, energy_problem="", latents_off=latents_error))
    cold = [
        ColdStart(
            "engines",
            64,
            "H1P5R3",
            caches,
            50,
            300,
            400,
            {},
            None,
            "it depends",
            100,
            60,
            850,
            MEMORY,
            MEMORY,
            40 << 20,
        )
        for caches in ("none", "kept")
    ]
    comparisons = [
        Comparison(0, index, compute_median_ratio(results[0].samples.image_ms, result.samples.image_ms, paired=True))
        for index, result in enumerate(results)
        if index
    ]
    report = BenchmarkReport(
        schema=SCHEMA,
        flowturbo="0",
        created="2026-11-24T00:00:00Z",
        command=("flowturbo-bench", "engines"),
        stages=results[0].stages,
        image=results[0].image,
        throughput=list_throughput(results),
        memory=summarise_memory(MEMORY, cold, GpuMemory(None, None)),
        environment=ENVIRONMENT,
        engines={"engines": {"hash": "abc"}},
        rounds={"repeats": None, "duration": 10.0, "warmup": None, "taken": len(results[0].samples.image_ms)},
        conditions=tuple(results),
        comparisons=tuple(comparisons),
        cold=tuple(cold),
        yardstick=summarise(yardstick),
        yardstick_ms=tuple(yardstick),
        warnings=tuple(list_sample_warnings(results)),
    )
    return replace(report, **changes)  # type: ignore[arg-type]


def simulate_times(seed: int, count: int = 60, mean: float = 20.0, noise: float = 0.03) -> NDArray[np.float64]:
    """Times like a shared machine's: neighbours alike, one in twenty late by up to a half and more."""
    random = np.random.Generator(np.random.Philox(seed))
    drift = 0.0
    times = np.empty(count)
    for index in range(count):
        drift = 0.5 * drift + noise * random.standard_normal()
        times[index] = mean * np.exp(drift) * (1 + (random.exponential(0.3) if random.random() < 0.05 else 0.0))
    return times
