"""Decoding a large picture in overlapping tiles, so that memory is that of one tile.

The decoder comes in two parts (`tile_graph.py`). Its head, with the attention, sees the whole picture at the size of
the latents; what follows it takes tiles of features. But norms look at the whole picture too: tiles that are decoded
apart have other colours. So the decoder of a tile is told what its norms would see in the whole picture (their
moments), and gives its share of it. Nobody knows the moments before: all tiles are decoded again and again, each time
nearer to moments that the pictures made with them really have. Half a step at a time: a full one overshoots, because
early norms change what later ones see.

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
"""Root mean square, over the groups of all norms, of what the last pass moved means by, in standard deviations, and
standard deviations by, as a share of themselves (`benchmarks/tiles.py` shows what is left in pictures)."""


@dataclass(frozen=True)
class Tiling:
    """How a square of features is cut.

    Attributes:
        side, tile: S and T; T < S.
        overlap: features that neighbours share at least; what both see is blended from one to the other.
        trim: features at an inner edge of a tile that are not used: there a tile sees its padding, not its neighbour.
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
        """A third of a tile is shared with each neighbour."""
        return cls(side, tile, max(3, tile // 3), 1)

    def compute_starts(self) -> list[int]:
        """First features of the tiles along a side: as few as will do, spread evenly."""
        gaps = math.ceil((self.side - self.tile) / (self.tile - self.overlap))
        return [round(i * (self.side - self.tile) / gaps) for i in range(gaps + 1)]

    def list_corners(self) -> Iterator[tuple[int, int]]:
        """First row and column of every tile."""
        starts = self.compute_starts()
        return ((top, left) for top in starts for left in starts)

    def compute_weight(self, start: int, factor: int) -> Floats:
        """What a tile's pixels count along a side, [T·F]: nothing in the trim, then rising; full at the edge."""
        ramp_width = self.overlap - 2 * self.trim
        ramp = np.clip(((np.arange(self.tile * factor) + 0.5) / factor - self.trim) / ramp_width, 0, 1)
        weight = np.ones_like(ramp)
        if start > 0:
            weight = np.minimum(weight, ramp)
        if start + self.tile < self.side:
            weight = np.minimum(weight, ramp[::-1])
        return weight.astype(np.float32)

    def compute_core_mask(self, start: int) -> Floats:
        """Which features of a tile along a side are its own, [T] of 0 and 1: each is one tile's."""
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
        """Features [B, E, S, S] to pictures [B, 3, S·F, S·F] in [0, 1], and whether all pixels were finite, [B].

        Warns when the moments were still moving after `MAX_PASSES`.
        """
        moments = np.zeros(self._inputs["moments"].shape, np.float32)
        change = math.inf
        for pass_index in range(MAX_PASSES):
            pictures, finite, new_moments = self._run_pass(features, moments, has_moments=pass_index > 0)
            if not (finite == 1).all():
                break
            change = _compute_change(moments, new_moments) if pass_index else math.inf
            if change <= MOMENT_TOLERANCE:
                break
            moments = _average_moments(moments, new_moments) if pass_index else new_moments
        else:
            warnings.warn(f"tiles had not settled after {MAX_PASSES} passes (moved by {change:.2g})", stacklevel=2)
        return pictures, finite

    def _run_pass(self, features: Floats, moments: Floats, *, has_moments: bool) -> tuple[Floats, Floats, Floats]:
        """Decodes every tile once: pictures, finiteness, and the moments that they have together, [2, B, M]."""
        size, pixels = self.tiling.side * self._factor, self.tiling.tile * self._factor
        pictures = np.zeros((len(features), 3, size, size), np.float32)
        total = np.zeros((size, size), np.float32)
        finite, sums = np.ones(len(features), np.float32), np.zeros_like(moments)
        self._inputs["moments"].upload(moments)
        self._inputs["given"].upload(np.full(1, has_moments, np.float32))
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
    """Means and variances, [B, M] each, of means and mean squares [2, B, M]."""
    mean, square = moments
    return mean, np.maximum(square - mean**2, 1e-12)


def _compute_change(old_moments: Floats, new_moments: Floats) -> float:
    (mean, variance), (new_mean, new_variance) = _compute_variance(old_moments), _compute_variance(new_moments)
    squared_change = (new_mean - mean) ** 2 / variance + (np.log(new_variance / variance) / 2) ** 2
    return float(np.sqrt(np.mean(squared_change))) if squared_change.size else 0.0


def _average_moments(old_moments: Floats, new_moments: Floats) -> Floats:
    """Half way from one set of moments to another."""
    (mean, variance), (new_mean, new_variance) = _compute_variance(old_moments), _compute_variance(new_moments)
    middle = (mean + new_mean) / 2
    moments: Floats = np.stack([middle, np.sqrt(variance * new_variance) + middle**2])
    return moments
