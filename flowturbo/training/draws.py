"""Everything random in training, keyed by the seed and the position of a sample in the stream of samples.

Position p = step · batch size + row. What a sample shows (photograph, crop, flip, noise, t, label dropout) depends on
(seed, p) alone, so a resumed run and a run split over processes draw exactly what one uninterrupted process draws.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_ORDER_STREAM = 1 << 62  # keys of epoch orders lie above all positions


def generator(seed: int, position: int) -> np.random.Generator:
    """The random stream of one sample."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return generator(seed, _ORDER_STREAM + epoch).permutation(size)


def positions(step: int, batch_size: int) -> range:
    """Positions of the samples of one step."""
    return range(step * batch_size, (step + 1) * batch_size)


def sample_indices(seed: int, where: range, size: int) -> NDArray[np.int64]:
    """Which item of a set of `size` each position shows: every epoch is a new permutation."""
    return np.asarray([_epoch_order(seed, p // size, size)[p % size] for p in where], dtype=np.int64)
