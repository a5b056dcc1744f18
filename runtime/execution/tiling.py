"""Decode a large picture in overlapping tiles, so that memory is that of one tile.

The decoder has two parts (`tile_graph.py`). Its head, with the attention, sees the whole picture at the size of the
latents; the rest takes tiles of features. But norms depend on the whole picture too: tiles that are decoded apart have
other colours. So the decoder of a tile reads the moments that its norms would have in the whole picture, and returns
its share of them. The moments are not known before, so all tiles are decoded several times, until the moments agree
with the pictures that they give. Each pass goes half of the way: a full one overshoots, because early norms change the
input of later ones.

Letters: B images, E channels of features, S side of the picture's features (and latents), T of a tile's, F pixels per
latent, M groups of norms.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, Engine
from runtime.directory.contract import GraphSpec

Floats = NDArray[np.float32]

MAX_PASSES = 12
MOMENT_TOLERANCE = 0.01
"""Bound of the rms, over the groups of all norms, of the last pass's change of means, in standard deviations, and of
standard deviations, relative to themselves (`benchmarks/tiles.py` measures the error that is left in pictures)."""


@dataclass(frozen=True)
class Tiling:
    """How a square of features is cut.

    Attributes:
        side, tile: S and T; T < S.
        overlap: features that neighbours share at least; their pictures are blended there.
        trim: features at an inner edge of a tile that are not used: they see padding, not the neighbour.
    """

    side: int
    tile: int
    overlap: int
    trim: int

    def __post_init__(self) -> None:
        if not 0 <= 2 * self.trim < self.overlap < self.tile < self.side:
            raise ValueError(f"tiles of {self.tile} with overlap {self.overlap}, trim {self.trim} for {self.side}")

    @classmethod
    def with_default_overlap(cls, side: int, tile: int) -> Tiling:
        """Make a tiling in which each tile shares a third with its neighbour."""
        return cls(side, tile, max(3, tile // 3), 1)

    def compute_starts(self) -> list[int]:
        """Return the first features of the tiles along a side: as few as possible, spread evenly."""
        gaps = math.ceil((self.side - self.tile) / (self.tile - self.overlap))
        return [round(i * (self.side - self.tile) / gaps) for i in range(gaps + 1)]

    def list_corners(self) -> Iterator[tuple[int, int]]:
        """Return the first row and column of every tile."""
        starts = self.compute_starts()
        return ((top, left) for top in starts for left in starts)

    def compute_weight(self, start: int, factor: int) -> Floats:
        """Return the weights of a tile's pixels along a side, [T·F]: 0 in the trim, then rising to 1."""
        ramp_width = self.overlap - 2 * self.trim
        ramp = np.clip(((np.arange(self.tile * factor) + 0.5) / factor - self.trim) / ramp_width, 0, 1)
        weight = np.ones_like(ramp)
        if start > 0:
            weight = np.minimum(weight, ramp)
        if start + self.tile < self.side:
            weight = np.minimum(weight, ramp[::-1])
        return weight.astype(np.float32)

    def compute_core_mask(self, start: int) -> Floats:
        """Return which features along a side belong to this tile, [T] of 0 and 1: each belongs to one tile."""
        starts = self.compute_starts()
        index = starts.index(start)
        core_start = 0 if index == 0 else (starts[index - 1] + self.tile + start) // 2
        core_end = self.side if index == len(starts) - 1 else (start + self.tile + starts[index + 1]) // 2
        positions = start + np.arange(self.tile)
        return ((positions >= core_start) & (positions < core_end)).astype(np.float32)


class TiledDecoder:
    """A decoder of tiles and its memory."""

    def __init__(self, backend: Backend, engine: Engine, spec: GraphSpec, images: int, side: int) -> None:
        self._engine, sizes = engine, {"B": images}
        self._inputs, self._outputs = (
            {
                name: backend.allocate(tensor.resolve_shape(sizes), tensor.numpy_dtype)
                for name, tensor in tensors.items()
            }
            for tensors in (spec.inputs, spec.outputs)
        )
        tile = self._inputs["features"].shape[-1]
        self.tiling, self._factor = Tiling.with_default_overlap(side, tile), self._outputs["images"].shape[-1] // tile
        self.calls = 0

    def decode(self, features: Floats) -> tuple[Floats, Floats]:
        """Decode features [B, E, S, S] to pictures [B, 3, S·F, S·F] in [0, 1], and whether all pixels are finite, [B].

        Warns when the moments still change after `MAX_PASSES`.
        """
        moments = np.zeros(self._inputs["moments"].shape, np.float32)
        change = math.inf
        for pass_index in range(MAX_PASSES):
            pictures, finite, new_moments = self._run_pass(features, moments, has_moments=pass_index > 0)
            if not (finite == 1).all():
                break
            if not pass_index:
                moments = new_moments
                continue
            (mean, variance), (new_mean, new_variance) = _compute_variance(moments), _compute_variance(new_moments)
            squared_change = (new_mean - mean) ** 2 / variance + (np.log(new_variance / variance) / 2) ** 2
            change = float(np.sqrt(np.mean(squared_change))) if squared_change.size else 0.0
            if change <= MOMENT_TOLERANCE:
                break
            middle = (mean + new_mean) / 2
            moments = np.stack([middle, np.sqrt(variance * new_variance) + middle**2])
        else:
            warnings.warn(f"tiles had not settled after {MAX_PASSES} passes (moved by {change:.2g})", stacklevel=2)
        return pictures, finite

    def _run_pass(self, features: Floats, moments: Floats, *, has_moments: bool) -> tuple[Floats, Floats, Floats]:
        """Decode every tile once; return pictures, whether they are finite, and their common moments, [2, B, M]."""
        size, pixels = self.tiling.side * self._factor, self.tiling.tile * self._factor
        pictures = np.zeros((len(features), 3, size, size), np.float32)
        total = np.zeros((size, size), np.float32)
        finite, sums = np.ones(len(features), np.float32), np.zeros_like(moments)
        self._inputs["moments"].upload(moments)
        self._inputs["has_moments"].upload(np.full(1, has_moments, np.float32))
        for top, left in self.tiling.list_corners():
            tile = features[:, :, top : top + self.tiling.tile, left : left + self.tiling.tile]
            self._inputs["features"].upload(np.ascontiguousarray(tile))
            self._inputs["core"].upload(
                np.outer(self.tiling.compute_core_mask(top), self.tiling.compute_core_mask(left))
            )
            self._engine.run(self._inputs, self._outputs)
            self.calls += 1
            weight = np.outer(
                self.tiling.compute_weight(top, self._factor), self.tiling.compute_weight(left, self._factor)
            )
            rows, columns = (slice(offset * self._factor, offset * self._factor + pixels) for offset in (top, left))
            pictures[:, :, rows, columns] += weight * self._outputs["images"].numpy()
            total[rows, columns] += weight
            finite = np.minimum(finite, self._outputs["finite"].numpy())
            sums += self._outputs["sums"].numpy()
        return pictures / total, finite, sums / np.float32(self.tiling.side**2)


def _compute_variance(moments: Floats) -> tuple[Floats, Floats]:
    """Convert means and mean squares [2, B, M] to means and variances, [B, M] each."""
    mean, square = moments
    return mean, np.maximum(square - mean**2, 1e-12)
