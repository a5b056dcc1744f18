"""Statistics of samples: percentiles, where there are enough samples for them, and ratios with an interval.

Timings drift and have long tails, so medians are compared. The interval comes from a bootstrap over blocks of
neighbouring samples (Künsch 1989): neighbours share the state of the machine, and resampling them one by one would make
the interval too narrow. From few blocks it is too narrow as well, so it is widened as Student's quantile is over the
normal one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

PERCENTILES = (50, 90, 95, 99)
RESAMPLES = 2000
MIN_TAIL_RESAMPLES = 10
"""Resamples beyond each end of an interval, so that the end is known: narrow tails need more of them."""
RESAMPLE_CHUNK = 1 << 20
"""Samples that are drawn at once: 8 MB of indices."""
BLOCK_FACTOR = 1.5
"""Blocks of 1.5·∛n samples: chosen on series whose neighbours correlate by a half, so that of 200 pairs of equal speed
at most five were called different, for 6 to 60 samples and noise of 3 and 10 % (`compare`, least effect 5 %)."""
MIN_SAMPLES = 6
"""Fewer samples give no interval."""


def count_required_samples(percentile: int) -> int:
    """Return the samples of which one is expected to lie above a percentile: 1, 10, 20, 100 for p50 … p99."""
    return 1 if percentile <= 50 else math.ceil(100 / (100 - percentile))


@dataclass(frozen=True)
class Statistics:
    """Times in milliseconds; every sample counts.

    A percentile is None where there are too few samples for it (`count_required_samples`).
    """

    count: int
    mean_ms: float | None
    sd_ms: float | None
    min_ms: float | None
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None


def summarise(samples_ms: ArrayLike) -> Statistics:
    """Return the statistics of samples in milliseconds; all None if there are none."""
    values = np.asarray(samples_ms, np.float64)
    count = len(values)
    if not count:
        return Statistics(0, *[None] * 8)
    p50, p90, p95, p99 = (
        _round_ms(np.percentile(values, p)) if count >= count_required_samples(p) else None for p in PERCENTILES
    )
    sd = _round_ms(values.std(ddof=1)) if count > 1 else None
    return Statistics(
        count, _round_ms(values.mean()), sd, _round_ms(values.min()), p50, p90, p95, p99, _round_ms(values.max())
    )


def _round_ms(value: float) -> float:
    """Round to a tenth of a microsecond, which no clock here resolves."""
    return round(float(value), 4)


@dataclass(frozen=True)
class Ratio:
    """median(b) / median(a) and the interval that holds it with `confidence`; None where samples are too few."""

    value: float
    low: float | None
    high: float | None
    confidence: float


def compute_median_ratio(
    a: Sequence[float], b: Sequence[float], *, confidence: float = 0.99, paired: bool = False, seed: int = 0
) -> Ratio:
    """Return how much longer b takes than a.

    Args:
        a, b: samples in the order in which they were taken.
        paired: a[i] and b[i] are of the same round, on an equally fast machine: rounds are resampled together, and a
            drift that both share cancels in the ratio.
        seed: of the resampling; the same samples give the same interval.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if paired:
        num_shared = min(len(first), len(second))
        first, second = first[:num_shared], second[:num_shared]
    value = float(np.median(second) / np.median(first))
    if min(len(first), len(second)) < MIN_SAMPLES:
        return Ratio(value, None, None, confidence)
    tail = (1 - confidence) / 2
    log_ratios = _resample_log_ratios(first, second, paired, max(RESAMPLES, math.ceil(MIN_TAIL_RESAMPLES / tail)), seed)
    low, high = np.quantile(log_ratios, [tail, 1 - tail]) - math.log(value)
    widening = _compute_widening(min(len(first), len(second)), tail)
    return Ratio(
        value, value * math.exp(min(low, 0.0) * widening), value * math.exp(max(high, 0.0) * widening), confidence
    )


def compute_speedup(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Return how many times faster `fast` is: the median of the ratios of samples of the same rounds."""
    return float(np.median([a / b for a, b in zip(slow, fast, strict=True)]))


def choose_block_length(count: int) -> int:
    """Return how many neighbours are resampled together: it grows as ∛count."""
    return max(1, round(BLOCK_FACTOR * math.pow(count, 1 / 3)))


def _resample_log_ratios(
    first: NDArray[np.float64], second: NDArray[np.float64], paired: bool, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return logarithms of the ratios of medians, [resamples]; in chunks, since long runs have many samples."""
    random = np.random.Generator(np.random.Philox(seed))
    size = max(1, RESAMPLE_CHUNK // max(len(first), len(second)))
    log_ratios = []
    for start in range(0, resamples, size):
        num_resamples = min(size, resamples - start)
        indices = _draw_block_indices(random, len(first), num_resamples)
        other_indices = indices if paired else _draw_block_indices(random, len(second), num_resamples)
        log_ratios.append(np.log(np.median(second[other_indices], axis=1)) - np.log(np.median(first[indices], axis=1)))
    return np.concatenate(log_ratios)


def _draw_block_indices(random: np.random.Generator, count: int, rows: int) -> NDArray[np.intp]:
    """Draw indices [rows, count]: blocks of neighbours from random places of the circle of samples."""
    length = choose_block_length(count)
    starts = random.integers(0, count, (rows, math.ceil(count / length), 1))
    indices = (starts + np.arange(length)) % count
    return indices.reshape(rows, -1)[:, :count]


def _compute_widening(count: int, tail: float) -> float:
    """Compute the factor for an interval from few blocks: Student's quantile over the normal one.

    By its expansion in 1/degrees of freedom (Abramowitz & Stegun 26.7.5).
    """
    z, degrees_of_freedom = -NormalDist().inv_cdf(tail), max(count / choose_block_length(count) - 1, 1.0)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return 1 + sum(term / degrees_of_freedom ** (power + 1) for power, term in enumerate(terms)) / z
