"""Noise: one stream per image, so a picture depends on its seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class NoiseStream:
    """The normal numbers of a batch of seeds: first the initial noise, then the draws of a stochastic sampler.

    A seed gives the same numbers on every machine and in every batch.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int]) -> None:
        self._streams = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        self._shape = shape
        self.initial = self._sample()
        self._next_index = 0

    def draw(self, index: int) -> Floats:
        """Return draw `index` of every image, [B, C, H, W]; in order, each once."""
        if index != self._next_index:
            raise AssertionError(f"draw {index} was asked for after {self._next_index - 1}")
        self._next_index += 1
        return self._sample()

    def _sample(self) -> Floats:
        return np.stack([stream.standard_normal(self._shape, dtype=np.float32) for stream in self._streams])


def sample_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Floats:
    """Return the initial noise [len(seeds), *shape]."""
    return NoiseStream(seeds, shape).initial
