"""Rounds: every condition once per round, in an order drawn anew, so that a drifting machine slows all of them alike.

Nothing is discarded. Warm-up rounds come before and are reported beside the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from flowturbo.evaluation.speed.conditions import Sample, Subject
from flowturbo.evaluation.speed.memory import read_process_memory, reset_peak_memory
from flowturbo.evaluation.speed.timed_pipeline import Clock

MIN_ROUNDS, MAX_ROUNDS = 10, 1000
MAX_WARMUP = 10
_STABLE_SHARE = 0.95


@dataclass(frozen=True)
class Rounds:
    """How long to measure each condition.

    Attributes:
        repeats: exactly so many rounds (fewer if `duration` is over); None: as many as fit, `MIN_ROUNDS` at least.
        duration: seconds per condition; None with `repeats` set: no limit.
        warmup: samples before; None: until one is no longer 5 % faster than all before it, `MAX_WARMUP` at most.
    """

    repeats: int | None = None
    duration: float | None = 10.0
    warmup: int | None = None


@dataclass
class Series:
    """Samples of one condition, in the order of the rounds.

    Attributes:
        warmup_ms: image times of the warm-up.
        peak_rss_bytes: most resident memory while it warmed up, with everything loaded that the benchmark compares.
        peak_problem: why that counts more than this.
    """

    subject: Subject
    samples: list[Sample] = field(default_factory=list)
    warmup_ms: list[float] = field(default_factory=list)
    peak_rss_bytes: int | None = None
    peak_problem: str = ""

    @property
    def seconds(self) -> float:
        return sum(sample.image_ms for sample in self.samples) / 1e3


@dataclass
class RoundsResult:
    """The series, and what a fixed piece of arithmetic took in every round: the machine's own mood."""

    series: list[Series]
    yardstick_ms: list[float]


ProgressCallback = Callable[[str, float], None]
"""Told what is being done, and which share of the rounds is over."""


def measure_in_turns(
    subjects: Sequence[Subject],
    rounds: Rounds,
    *,
    progress: ProgressCallback = lambda text, share: None,
    clock: Clock = time.perf_counter_ns,
    settle_seconds: float = 0.0,
    seed: int = 0,
) -> RoundsResult:
    """Measures every subject.

    Args:
        settle_seconds: pause before each sample, where libraries with threads of their own share the process: threads
            that are done go on spinning for a while.
        seed: of the order within a round.
    """
    result = RoundsResult([Series(subject) for subject in subjects], [])
    for series in result.series:
        progress(f"warming up {series.subject.condition.name}", 0.0)
        _warm_up(series, rounds.warmup)
    random = np.random.Generator(np.random.Philox(seed))
    round_number = 0
    while unfinished := [series for series in result.series if not _is_done(series, rounds)]:
        round_number += 1
        progress(f"round {round_number}", min(_compute_done_share(series, rounds) for series in result.series))
        result.yardstick_ms.append(time_yardstick(clock))
        for index in random.permutation(len(unfinished)):
            if settle_seconds:
                time.sleep(settle_seconds)
            unfinished[index].samples.append(unfinished[index].subject.sample())
    return result


def _warm_up(series: Series, warmup: int | None) -> None:
    series.peak_problem = reset_peak_memory()
    times_ms = series.warmup_ms
    while len(times_ms) < (MAX_WARMUP if warmup is None else warmup):
        times_ms.append(series.subject.sample().image_ms)
        if warmup is None and len(times_ms) > 1 and times_ms[-1] >= _STABLE_SHARE * min(times_ms[:-1]):
            break
    series.peak_rss_bytes = read_process_memory().peak_rss_bytes


def _is_done(series: Series, rounds: Rounds) -> bool:
    return _compute_done_share(series, rounds) >= 1.0


def _compute_done_share(series: Series, rounds: Rounds) -> float:
    """How much of a condition's measurement is over, from 0."""
    rounds_taken = len(series.samples)
    if rounds.repeats is not None:
        share = rounds_taken / rounds.repeats
        return share if rounds.duration is None or not rounds_taken else max(share, series.seconds / rounds.duration)
    assert rounds.duration is not None
    return max(min(series.seconds / rounds.duration, rounds_taken / MIN_ROUNDS), rounds_taken / MAX_ROUNDS)


_YARDSTICK_INPUT = np.linspace(0.1, 1.0, 1 << 15, dtype=np.float64)


def time_yardstick(clock: Clock = time.perf_counter_ns) -> float:
    """Milliseconds of a fixed piece of arithmetic on one core (NumPy without BLAS, whose threads would spin on)."""
    start_ns = clock()
    for _ in range(8):
        np.exp(np.sin(_YARDSTICK_INPUT))
    return (clock() - start_ns) / 1e6
