"""Count sizes in streaming histograms, and find the clip of each calibration method.

A histogram has a fixed number of bins over [0, 2^k). Where a larger value comes, neighbouring bins are merged and k
grows. Bin edges are multiples of powers of two, so the counts depend on the values alone, not on their order. The
memory depends on neither.
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
_MIN_EXPONENT = -20
"""The first range is [0, 2^-20)."""
_NUM_CANDIDATES = 64

Counts = NDArray[np.int64]


class Histogram:
    """Counts of |x|.

    Attributes:
        counts: [BINS].
        exponent: k of the range [0, 2^k).
        largest: the largest |x| so far.
    """

    def __init__(self, counts: Counts | None = None, exponent: int = _MIN_EXPONENT, largest: float = 0.0) -> None:
        self.counts = np.zeros(BINS, np.int64) if counts is None else counts.astype(np.int64)
        self.exponent, self.largest = exponent, largest

    def add(self, values: Tensor) -> None:
        """Count the sizes of all elements.

        Raises:
            ValueError: an element is not finite.
        """
        sizes = values.detach().abs().flatten()
        largest = float(sizes.max())
        if not math.isfinite(largest):
            raise ValueError("a value that is not finite")
        self.largest = max(self.largest, largest)
        while largest >= math.ldexp(1.0, self.exponent):
            self._widen()
        indices = (sizes.double() * (BINS / math.ldexp(1.0, self.exponent))).long()
        self.counts += torch.bincount(indices, minlength=BINS).numpy()

    def _widen(self) -> None:
        coarse = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.concatenate([coarse, np.zeros_like(coarse)])
        self.exponent += 1

    def rebin(self, exponent: int) -> Counts:
        """Return the counts over the wider range [0, 2^exponent)."""
        widened = Histogram(self.counts, self.exponent)
        while widened.exponent < exponent:
            widened._widen()
        return widened.counts

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent) / BINS


def merge_histograms(histograms: Sequence[Histogram]) -> Histogram:
    """Return the histogram of all values together."""
    exponent = max(histogram.exponent for histogram in histograms)
    counts = np.sum([histogram.rebin(exponent) for histogram in histograms], axis=0)
    return Histogram(counts, exponent, max(histogram.largest for histogram in histograms))


def find_clip(histogram: Histogram, method: str) -> float:
    """Return the clip by one of `export.lowbit.ranges.CLIP_METHODS`; zero for an empty histogram."""
    if histogram.largest == 0.0:
        return 0.0
    match method:
        case "minmax":
            clip = histogram.largest
        case "percentile":
            shares_below = np.cumsum(histogram.counts) / histogram.counts.sum()
            clip = float((np.searchsorted(shares_below, PERCENTILE) + 1) * histogram.width)
        case "entropy":
            clip = _find_entropy_clip(histogram)
        case "mse":
            clip = _find_mse_clip(histogram)
        case _:
            raise ValueError(f"no method {method!r} of clips")
    return min(clip, histogram.largest)


def _find_mse_clip(histogram: Histogram) -> float:
    """Minimise the mean squared error of the quantised values, over clips from 3 % of the largest value up."""
    used_bins = np.flatnonzero(histogram.counts)
    centres, counts = (used_bins + 0.5) * histogram.width, histogram.counts[used_bins].astype(np.float64)
    candidates = np.geomspace(0.03, 1.0, _NUM_CANDIDATES) * histogram.largest
    errors = []
    for clip in candidates:
        step = clip / LEVELS
        errors.append(float(counts @ (centres - np.minimum(np.rint(centres / step), LEVELS) * step) ** 2))
    return float(candidates[int(np.argmin(errors))])


def _find_entropy_clip(histogram: Histogram, levels: int = LEVELS + 1) -> float:
    """Minimise the divergence KL(values ‖ quantised values), the clipped tail counted at the clip (Migacz 2017)."""
    counts = histogram.counts.astype(np.float64)
    num_used = int(np.flatnonzero(counts)[-1]) + 1
    least_divergence, best_cut = math.inf, num_used
    for cut in np.unique(np.linspace(min(levels, num_used), num_used, _NUM_CANDIDATES).astype(int)):
        inside = counts[:cut]
        reference = inside.copy()
        reference[-1] += counts[cut:].sum()
        groups = np.arange(cut) * levels // cut
        occupied = np.bincount(groups, inside > 0, levels)
        means = np.bincount(groups, inside, levels) / np.maximum(occupied, 1)
        quantised = np.where(inside > 0, means[groups], 0.0)
        if not quantised.any():
            continue
        p, q = reference / reference.sum(), quantised / quantised.sum()
        is_positive = p > 0
        divergence = float(np.sum(p[is_positive] * np.log(p[is_positive] / np.maximum(q[is_positive], 1e-12))))
        if divergence < least_divergence:
            least_divergence, best_cut = divergence, int(cut)
    return best_cut * histogram.width
