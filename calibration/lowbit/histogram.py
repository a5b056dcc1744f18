"""Streaming histograms of sizes, and the clip that each calibration method takes from one.

A histogram has a fixed number of bins over [0, 2^k); where a larger value comes, neighbouring bins are merged and k
grows. Bin edges are multiples of powers of two, so the counts depend on the values alone, not on their order, and the
memory on neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = 4096
LEVELS = 127
"""Steps of a symmetric int8 scale on either side of zero."""
PERCENTILE = 0.9999
_SMALLEST = -20
"""A histogram begins over [0, 2^-20)."""
_CANDIDATES = 64

Counts = NDArray[np.int64]


class Histogram:
    """Counts of |x|.

    Attributes:
        counts: [BINS].
        exponent: k of the range [0, 2^k).
        largest: the largest |x| seen.
    """

    def __init__(self, counts: Counts | None = None, exponent: int = _SMALLEST, largest: float = 0.0) -> None:
        self.counts = np.zeros(BINS, np.int64) if counts is None else counts.astype(np.int64)
        self.exponent, self.largest = exponent, largest

    def add(self, values: Tensor) -> None:
        """Counts the sizes of all elements.

        Raises:
            ValueError: one is not finite.
        """
        sizes = values.detach().abs().flatten()
        largest = float(sizes.max())
        if not math.isfinite(largest):
            raise ValueError("a value that is not finite")
        self.largest = max(self.largest, largest)
        while largest >= math.ldexp(1.0, self.exponent):
            self._widen()
        places = (sizes.double() * (BINS / math.ldexp(1.0, self.exponent))).long()
        self.counts += torch.bincount(places, minlength=BINS).numpy()

    def _widen(self) -> None:
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.concatenate([merged, np.zeros_like(merged)])
        self.exponent += 1

    def over(self, exponent: int) -> Counts:
        """The counts over a wider range."""
        wide = Histogram(self.counts, self.exponent)
        while wide.exponent < exponent:
            wide._widen()
        return wide.counts

    @property
    def width(self) -> float:
        """Of a bin."""
        return math.ldexp(1.0, self.exponent) / BINS


def merged(histograms: Sequence[Histogram]) -> Histogram:
    """All values together."""
    exponent = max(one.exponent for one in histograms)
    counts = np.sum([one.over(exponent) for one in histograms], axis=0)
    return Histogram(counts, exponent, max(one.largest for one in histograms))


def clip(histogram: Histogram, method: str) -> float:
    """The clip by one of `export.lowbit.ranges.METHODS`; zero where nothing was seen."""
    if histogram.largest == 0.0:
        return 0.0
    found = {"minmax": _minmax, "percentile": _percentile, "entropy": _entropy, "mse": _mse}[method](histogram)
    return min(found, histogram.largest)


def _minmax(histogram: Histogram) -> float:
    return histogram.largest


def _percentile(histogram: Histogram) -> float:
    below = np.cumsum(histogram.counts) / histogram.counts.sum()
    return float((np.searchsorted(below, PERCENTILE) + 1) * histogram.width)


def _mse(histogram: Histogram) -> float:
    """Least mean squared error of the quantised values, over clips from 3 % of the largest value up."""
    used = np.flatnonzero(histogram.counts)
    centres, counts = (used + 0.5) * histogram.width, histogram.counts[used].astype(np.float64)
    candidates = np.geomspace(0.03, 1.0, _CANDIDATES) * histogram.largest
    errors = []
    for clip in candidates:
        step = clip / LEVELS
        errors.append(float(counts @ (centres - np.minimum(np.rint(centres / step), LEVELS) * step) ** 2))
    return float(candidates[int(np.argmin(errors))])


def _entropy(histogram: Histogram, levels: int = LEVELS + 1) -> float:
    """Least divergence KL(values ‖ quantised values), the clipped tail counted at the clip (Migacz 2017)."""
    counts = histogram.counts.astype(np.float64)
    used = int(np.flatnonzero(counts)[-1]) + 1
    best, clip = math.inf, used
    for kept in np.unique(np.linspace(min(levels, used), used, _CANDIDATES).astype(int)):
        inside = counts[:kept]
        reference = inside.copy()
        reference[-1] += counts[kept:].sum()
        groups = np.arange(kept) * levels // kept
        filled = np.bincount(groups, inside > 0, levels)
        means = np.bincount(groups, inside, levels) / np.maximum(filled, 1)
        shown = np.where(inside > 0, means[groups], 0.0)
        if not shown.any():
            continue
        p, q = reference / reference.sum(), shown / shown.sum()
        seen = p > 0
        divergence = float(np.sum(p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))))
        if divergence < best:
            best, clip = divergence, int(kept)
    return clip * histogram.width
