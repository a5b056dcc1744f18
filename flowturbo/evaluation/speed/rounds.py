"""Time subjects in turns: each once a round, in random order, so that a drifting machine slows all alike.

Nothing is discarded. Warm-up samples come before the rounds and are reported beside the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from flowturbo.evaluation.speed.memory import read_process_memory, reset_peak_memory
from flowturbo.evaluation.speed.timed_pipeline import Clock
from runtime.system.progress import SILENT, Progress

MIN_ROUNDS, MAX_ROUNDS = 10, 1000
MAX_WARMUP = 10
_STABLE_SHARE = 0.95


@dataclass
class Sample:
    """One run of a subject; of a pipeline or a baseline it makes a batch of pictures.

    Attributes:
        image_ms: duration of the run; of pictures, from the request to encoded PNGs of the whole batch.
        png_ms: the part of it that encodes.
        calls: the part of it in engine calls, each by stage, on the device's clock.
    """

    image_ms: float
    png_ms: float = 0.0
    calls: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def host_ms(self) -> float:
        """Return the rest: noise, coefficients, buffers, conversion to 8 bits, waiting."""
        return self.image_ms - self.png_ms - sum(map(sum, self.calls.values()))


class TimedSubject(Protocol):
    """Something that is timed: `sample` runs it once, `name` is shown as progress."""

    @property
    def name(self) -> str: ...

    def sample(self) -> Sample: ...


S = TypeVar("S", bound=TimedSubject)


@dataclass
class TimedCall:
    """A function call as a subject."""

    name: str
    call: Callable[[], object]
    clock: Clock = time.perf_counter_ns

    def sample(self) -> Sample:
        start_ns = self.clock()
        self.call()
        return Sample((self.clock() - start_ns) / 1e6)


@dataclass(frozen=True)
class Rounds:
    """How long to measure each subject.

    Attributes:
        repeats: exactly this many rounds (fewer if `duration` is over); None: as many as fit, at least `MIN_ROUNDS`.
        duration: seconds per subject; None: no limit.
        warmup: samples before; None: until one is no longer 5 % faster than all before it, at most `MAX_WARMUP`.
        min_repeats: with `repeats`: rounds that are made however long they take.
    """

    repeats: int | None = None
    duration: float | None = 10.0
    warmup: int | None = None
    min_repeats: int = 1


@dataclass
class Series(Generic[S]):
    """Samples of one subject, in the order of the rounds.

    Attributes:
        warmup_ms: durations of the warm-up.
        peak_rss_bytes: peak of resident memory during its warm-up, with everything loaded that is compared.
        peak_problem: why that peak includes more than this subject; "" if it does not.
    """

    subject: S
    samples: list[Sample] = field(default_factory=list)
    warmup_ms: list[float] = field(default_factory=list)
    peak_rss_bytes: int | None = None
    peak_problem: str = ""

    @property
    def seconds(self) -> float:
        return sum(sample.image_ms for sample in self.samples) / 1e3


@dataclass
class RoundsResult(Generic[S]):
    """The series, and the duration of fixed arithmetic in every round, which shows the machine's own speed."""

    series: list[Series[S]]
    yardstick_ms: list[float]


def measure_in_turns(
    subjects: Sequence[S],
    rounds: Rounds | Sequence[Rounds],
    *,
    progress: Progress = SILENT,
    clock: Clock = time.perf_counter_ns,
    settle_seconds: float = 0.0,
    seed: int = 0,
) -> RoundsResult[S]:
    """Measure every subject.

    Args:
        rounds: for all subjects, or one for each.
        clock: of the yardstick.
        settle_seconds: pause before each sample, for libraries with threads in this process that spin after their work.
        seed: of the order within a round.
    """
    limits = [rounds] * len(subjects) if isinstance(rounds, Rounds) else rounds
    result = RoundsResult([Series(subject) for subject in subjects], [])
    for series, limit in zip(result.series, limits, strict=True):
        progress.stage(f"warming up {series.subject.name}")
        _warm_up(series, limit.warmup)
    random = np.random.Generator(np.random.Philox(seed))
    while True:
        shares = [_compute_done_share(series, limit) for series, limit in zip(result.series, limits, strict=True)]
        progress.update("rounds (% done)", round(100 * min(1.0, *shares)), 100)
        unfinished = [series for series, share in zip(result.series, shares, strict=True) if share < 1]
        if not unfinished:
            return result
        result.yardstick_ms.append(time_yardstick(clock))
        for index in random.permutation(len(unfinished)):
            if settle_seconds:
                time.sleep(settle_seconds)
            unfinished[index].samples.append(unfinished[index].subject.sample())


def time_calls(
    calls: Mapping[str, Callable[[], object]], rounds: int | Rounds, *, settle_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Return the milliseconds of each call, one per round; a number of rounds is after one call that warms up."""
    subjects = [TimedCall(name, call) for name, call in calls.items()]
    limit = Rounds(rounds, duration=None, warmup=1) if isinstance(rounds, int) else rounds
    result = measure_in_turns(subjects, limit, settle_seconds=settle_seconds)
    return {series.subject.name: [sample.image_ms for sample in series.samples] for series in result.series}


def _warm_up(series: Series[S], warmup: int | None) -> None:
    series.peak_problem = reset_peak_memory()
    times_ms = series.warmup_ms
    while len(times_ms) < (MAX_WARMUP if warmup is None else warmup):
        times_ms.append(series.subject.sample().image_ms)
        if warmup is None and len(times_ms) > 1 and times_ms[-1] >= _STABLE_SHARE * min(times_ms[:-1]):
            break
    series.peak_rss_bytes = read_process_memory().peak_rss_bytes


def _compute_done_share(series: Series[S], rounds: Rounds) -> float:
    """Return the share of a subject's measurement that is done; 1 or more at its end."""
    rounds_taken = len(series.samples)
    time_share = 0.0 if rounds.duration is None else series.seconds / rounds.duration
    if rounds.repeats is None:
        return max(min(time_share, rounds_taken / MIN_ROUNDS), rounds_taken / MAX_ROUNDS)
    return max(rounds_taken / rounds.repeats, time_share if rounds_taken >= rounds.min_repeats else 0.0)


_YARDSTICK_INPUT = np.linspace(0.1, 1.0, 1 << 15, dtype=np.float64)


def time_yardstick(clock: Clock = time.perf_counter_ns) -> float:
    """Return milliseconds of fixed arithmetic on one core (NumPy without BLAS: its threads would spin on)."""
    start_ns = clock()
    for _ in range(8):
        np.exp(np.sin(_YARDSTICK_INPUT))
    return (clock() - start_ns) / 1e6
