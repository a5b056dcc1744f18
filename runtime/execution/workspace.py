"""Device memory of a trajectory: points, history, the rows of earlier evaluations, and what says how rows are mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.backends.base import Backend, Buffer
from runtime.directory.contract import GraphSpec
from runtime.sampling.guidance import BranchBatch
from runtime.sampling.plan import HISTORY


class Workspace:
    """Memory of B images and at most N rows. Nothing in it leaves the device but the latents at the end."""

    def __init__(self, backend: Backend, spec: GraphSpec, images: int, rows: int) -> None:
        self._backend = backend
        sizes = {"B": images, "N": rows}

        def make(name: str, specs: Mapping[str, Any]) -> Buffer:
            return backend.allocate(specs[name].resolve_shape(sizes), specs[name].numpy_dtype)

        self.images, self.max_rows = images, rows
        self.points = (make("base", spec.inputs), make("base", spec.inputs))
        self.current = 0
        self.slopes = make("slopes", spec.inputs)
        self.slope_slots = [self.slopes.slot(k) for k in range(HISTORY)]
        row_shape = spec.outputs["rows"].resolve_shape(sizes)
        history = backend.allocate((HISTORY, *row_shape), np.float32)
        self._velocities = [history.slot(k) for k in range(HISTORY)]
        self._guidance_buffers: dict[int, tuple[BranchBatch, Buffer, Buffer]] = {}
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
    def next_point(self) -> Buffer:
        """Where the next point goes."""
        return self.points[1 - self.current]

    def swap_points(self) -> None:
        """The next point becomes the base."""
        self.current = 1 - self.current

    def upload_guidance(self, branches: BranchBatch) -> Mapping[str, Buffer]:
        """The contract's `row_image` and `mix` for these rows; uploaded once."""
        num_rows = len(branches.labels)
        cached = self._guidance_buffers.get(num_rows)
        if cached is None or cached[0] is not branches:
            row_image = (
                cached[1] if cached else self._backend.allocate(branches.row_image.shape, branches.row_image.dtype)
            )
            mix = cached[2] if cached else self._backend.allocate(branches.mix.shape, branches.mix.dtype)
            row_image.upload(branches.row_image)
            mix.upload(branches.mix)
            cached = self._guidance_buffers[num_rows] = (branches, row_image, mix)
        return {"pair": cached[1], "mix": cached[2]}

    def slice_velocities(self, slot: int, count: int) -> Buffer:
        """The first `count` rows of an evaluation whose slope is in `slot`: [count, C, H, W]."""
        velocities = self._velocities[slot]
        return velocities if count == self.max_rows else velocities.head(count)

    def copy_image(
        self,
        index: int,
        other_workspace: Workspace,
        other_index: int,
        slots: Mapping[int, int],
        rows: Sequence[tuple[int, int]],
    ) -> None:
        """Copies an image from another workspace, on the device.

        Args:
            index, other_index: its index here and there.
            slots: slot there → slot here, of what it holds.
            rows: its rows, (index there, index here).
        """
        for target_point, source_point in (
            (self.base, other_workspace.base),
            (self.next_point, other_workspace.next_point),
        ):
            target_point.slot(index).copy_from(source_point.slot(other_index))
        for source, target in slots.items():
            self.slope_slots[target].slot(index).copy_from(other_workspace.slope_slots[source].slot(other_index))
            for source_row, target_row in rows:
                self._velocities[target].slot(target_row).copy_from(
                    other_workspace._velocities[source].slot(source_row)
                )
