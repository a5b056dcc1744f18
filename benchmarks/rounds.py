"""Conditions timed in turns: each round visits all of them, so that a drifting machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Condition = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of one condition, one per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)


def interleaved(
    conditions: Mapping[str, Condition], rounds: int, warmup: int = 1, pause: float = 0.0
) -> dict[str, Times]:
    """Times every condition once a round, in an order that turns round by one each time.

    Args:
        warmup: rounds that are not counted.
        pause: seconds before each condition, in which what the one before left running comes to rest.
    """
    seconds: dict[str, list[float]] = {name: [] for name in conditions}
    names = list(conditions)
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
            started = time.perf_counter()
            conditions[name]()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def ratio(times: Mapping[str, Times], slow: str, fast: str) -> float:
    """How many times faster `fast` is than `slow`: the median of the rounds' own ratios."""
    return median(a / b for a, b in zip(times[slow].seconds, times[fast].seconds, strict=True))
