"""Conditions timed in turns: each round visits all of them, so that a drifting machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

TimedCall = Callable[[], object]


@dataclass(frozen=True)
class RoundTimes:
    """Seconds of one condition, one per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)


def time_in_turns(
    conditions: Mapping[str, TimedCall], rounds: int, warmup: int = 1, pause_seconds: float = 0.0
) -> dict[str, RoundTimes]:
    """Times every condition once a round, in an order that turns round by one each time.

    Args:
        warmup: rounds that are not counted.
        pause_seconds: seconds before each condition, in which what the one before left running comes to rest.
    """
    seconds: dict[str, list[float]] = {name: [] for name in conditions}
    names = list(conditions)
    for round_index in range(warmup + rounds):
        offset = round_index % len(names)
        for name in names[offset:] + names[:offset]:
            time.sleep(pause_seconds)
            started = time.perf_counter()
            conditions[name]()
            if round_index >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: RoundTimes(tuple(values)) for name, values in seconds.items()}


def compute_speedup(times: Mapping[str, RoundTimes], slow: str, fast: str) -> float:
    """How many times faster `fast` is than `slow`: the median of the rounds' own ratios."""
    return median(a / b for a, b in zip(times[slow].seconds, times[fast].seconds, strict=True))
