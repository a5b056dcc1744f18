"""Device memory of a trajectory: points, history, the rows of earlier evaluations, and what says how rows are mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.backends.base import Backend, Buffer
from runtime.directory.contract import GraphSpec
from runtime.sampling.guidance import Rows
from runtime.sampling.plan import HISTORY


class Workspace:
    """Memory of B images and at most N rows. Nothing in it leaves the device but the latents at the end."""

    def __init__(self, backend: Backend, spec: GraphSpec, images: int, rows: int) -> None:
        self._backend = backend
        sizes = {"B": images, "N": rows}

        def make(name: str, specs: Mapping[str, Any]) -> Buffer:
            return backend.buffer(specs[name].sized(sizes), specs[name].numpy)

        self.images, self.most_rows = images, rows
        self.points = (make("base", spec.inputs), make("base", spec.inputs))
        self.current = 0
        self.slopes = make("slopes", spec.inputs)
        self.slope_slots = [self.slopes.slot(k) for k in range(HISTORY)]
        row_shape = spec.outputs["rows"].sized(sizes)
        ring = backend.buffer((HISTORY, *row_shape), np.float32)
        self._rows = [ring.slot(k) for k in range(HISTORY)]
        self._mixing: dict[int, tuple[Rows, Buffer, Buffer]] = {}
        self.atol, self.rtol = make("atol", spec.inputs), make("rtol", spec.inputs)

    def clear(self) -> None:
        """Forgets an earlier picture: a NaN that it left would poison a sum in which its coefficient is 0."""
        self.slopes.upload(np.zeros(self.slopes.shape, np.float32))
        self.atol.upload(np.ones(self.images, np.float32))
        self.rtol.upload(np.zeros(self.images, np.float32))
        self.current = 0

    @property
    def base(self) -> Buffer:
        """The point that steps start from, [B, C, H, W]."""
        return self.points[self.current]

    @property
    def spare(self) -> Buffer:
        """Where the next point goes."""
        return self.points[1 - self.current]

    def flip(self) -> None:
        """The next point becomes the base."""
        self.current = 1 - self.current

    def mixed(self, rows: Rows) -> Mapping[str, Buffer]:
        """The contract's `pair` and `mix` for these rows; uploaded once."""
        count = len(rows.labels)
        known = self._mixing.get(count)
        if known is None or known[0] is not rows:
            pair = known[1] if known else self._backend.buffer(rows.pair.shape, rows.pair.dtype)
            mix = known[2] if known else self._backend.buffer(rows.mix.shape, rows.mix.dtype)
            pair.upload(rows.pair)
            mix.upload(rows.mix)
            known = self._mixing[count] = (rows, pair, mix)
        return {"pair": known[1], "mix": known[2]}

    def rows(self, slot: int, count: int) -> Buffer:
        """The first `count` rows of an evaluation whose slope is in `slot`: [count, C, H, W]."""
        ring = self._rows[slot]
        return ring if count == self.most_rows else ring.head(count)

    def image_from(
        self, place: int, other: Workspace, there: int, slots: Mapping[int, int], rows: Sequence[tuple[int, int]]
    ) -> None:
        """Copies an image from another workspace, on the device.

        Args:
            place, there: its index here and there.
            slots: slot there → slot here, of what it holds.
            rows: its rows, (index there, index here).
        """
        for mine, theirs in ((self.base, other.base), (self.spare, other.spare)):
            mine.slot(place).copy_from(theirs.slot(there))
        for source, target in slots.items():
            self.slope_slots[target].slot(place).copy_from(other.slope_slots[source].slot(there))
            for row_there, row_here in rows:
                self._rows[target].slot(row_here).copy_from(other._rows[source].slot(row_there))
