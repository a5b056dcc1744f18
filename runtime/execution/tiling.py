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
TOLERANCE = 0.01
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
    def of(cls, side: int, tile: int) -> Tiling:
        """A third of a tile is shared with each neighbour."""
        return cls(side, tile, max(3, tile // 3), 1)

    def starts(self) -> list[int]:
        """First features of the tiles along a side: as few as will do, spread evenly."""
        gaps = math.ceil((self.side - self.tile) / (self.tile - self.overlap))
        return [round(i * (self.side - self.tile) / gaps) for i in range(gaps + 1)]

    def places(self) -> Iterator[tuple[int, int]]:
        """First row and column of every tile."""
        starts = self.starts()
        return ((top, left) for top in starts for left in starts)

    def weight(self, start: int, factor: int) -> Floats:
        """What a tile's pixels count along a side, [T·F]: nothing in the trim, then rising; full at the edge."""
        across = self.overlap - 2 * self.trim
        rising = np.clip(((np.arange(self.tile * factor) + 0.5) / factor - self.trim) / across, 0, 1)
        weight = np.ones_like(rising)
        if start > 0:
            weight = np.minimum(weight, rising)
        if start + self.tile < self.side:
            weight = np.minimum(weight, rising[::-1])
        return weight.astype(np.float32)

    def core(self, start: int) -> Floats:
        """Which features of a tile along a side are its own, [T] of 0 and 1: each is one tile's."""
        starts = self.starts()
        at = starts.index(start)
        first = 0 if at == 0 else (starts[at - 1] + self.tile + start) // 2
        end = self.side if at == len(starts) - 1 else (start + self.tile + starts[at + 1]) // 2
        places = start + np.arange(self.tile)
        return ((places >= first) & (places < end)).astype(np.float32)


class TiledDecoder:
    """A decoder of tiles and its memory."""

    def __init__(self, backend: Backend, engine: Engine, spec: GraphSpec, images: int, side: int) -> None:
        self._engine, sizes = engine, {"B": images}
        self._inputs, self._outputs = (
            {name: backend.buffer(tensor.sized(sizes), tensor.numpy) for name, tensor in tensors.items()}
            for tensors in (spec.inputs, spec.outputs)
        )
        tile = self._inputs["features"].shape[-1]
        self.tiling, self._factor = Tiling.of(side, tile), self._outputs["images"].shape[-1] // tile
        self.calls = 0

    def decode(self, features: Floats) -> tuple[Floats, Floats]:
        """Features [B, E, S, S] to pictures [B, 3, S·F, S·F] in [0, 1], and whether all pixels were finite, [B].

        Warns when the moments were still moving after `MAX_PASSES`.
        """
        moments = np.zeros(self._inputs["moments"].shape, np.float32)
        moved = math.inf
        for turn in range(MAX_PASSES):
            pictures, finite, found = self._pass(features, moments, given=turn > 0)
            if not (finite == 1).all():
                break
            moved = _distance(moments, found) if turn else math.inf
            if moved <= TOLERANCE:
                break
            moments = _between(moments, found) if turn else found
        else:
            warnings.warn(f"tiles had not settled after {MAX_PASSES} passes (moved by {moved:.2g})", stacklevel=2)
        return pictures, finite

    def _pass(self, features: Floats, moments: Floats, *, given: bool) -> tuple[Floats, Floats, Floats]:
        """Decodes every tile once: pictures, finiteness, and the moments that they have together, [2, B, M]."""
        size, pixels = self.tiling.side * self._factor, self.tiling.tile * self._factor
        pictures = np.zeros((len(features), 3, size, size), np.float32)
        total = np.zeros((size, size), np.float32)
        finite, sums = np.ones(len(features), np.float32), np.zeros_like(moments)
        self._inputs["moments"].upload(moments)
        self._inputs["given"].upload(np.full(1, given, np.float32))
        for top, left in self.tiling.places():
            tile = features[:, :, top : top + self.tiling.tile, left : left + self.tiling.tile]
            self._inputs["features"].upload(np.ascontiguousarray(tile))
            self._inputs["core"].upload(np.outer(self.tiling.core(top), self.tiling.core(left)))
            self._engine.run(self._inputs, self._outputs)
            self.calls += 1
            weight = np.outer(self.tiling.weight(top, self._factor), self.tiling.weight(left, self._factor))
            rows, columns = (slice(at * self._factor, at * self._factor + pixels) for at in (top, left))
            pictures[:, :, rows, columns] += weight * self._outputs["images"].numpy()
            total[rows, columns] += weight
            finite = np.minimum(finite, self._outputs["finite"].numpy())
            sums += self._outputs["sums"].numpy()
        return pictures / total, finite, sums / np.float32(self.tiling.side**2)


def _spread(moments: Floats) -> tuple[Floats, Floats]:
    """Means and variances, [B, M] each, of means and mean squares [2, B, M]."""
    mean, square = moments
    return mean, np.maximum(square - mean**2, 1e-12)


def _distance(told: Floats, found: Floats) -> float:
    (mean, variance), (new_mean, new_variance) = _spread(told), _spread(found)
    moved = (new_mean - mean) ** 2 / variance + (np.log(new_variance / variance) / 2) ** 2
    return float(np.sqrt(np.mean(moved))) if moved.size else 0.0


def _between(told: Floats, found: Floats) -> Floats:
    """Half way from one set of moments to another."""
    (mean, variance), (new_mean, new_variance) = _spread(told), _spread(found)
    middle = (mean + new_mean) / 2
    moments: Floats = np.stack([middle, np.sqrt(variance * new_variance) + middle**2])
    return moments
