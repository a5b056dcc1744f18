"""Device memory of a trajectory: points, history, rows of earlier evaluations, and the guidance matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from runtime.backends.base import Backend, Buffer
from runtime.directory.contract import GraphSpec, TensorSpecs
from runtime.sampling.guidance import BranchBatch
from runtime.sampling.plan import HISTORY


class Workspace:
    """Memory of B images and at most N rows. Only the latents at the end leave the device."""

    def __init__(self, backend: Backend, spec: GraphSpec, images: int, rows: int) -> None:
        self._backend = backend
        sizes = {"B": images, "N": rows}

        def make(name: str, specs: TensorSpecs) -> Buffer:
            return backend.allocate(specs[name].resolve_shape(sizes), specs[name].numpy_dtype)

        self.images, self.max_rows = images, rows
        self.points = (make("base", spec.inputs), make("base", spec.inputs))
        self.current = 0
        self.slopes = make("slopes", spec.inputs)
        self.slope_slots = [self.slopes.slot(k) for k in range(HISTORY)]
        row_shape = spec.outputs["velocities"].resolve_shape(sizes)
        history = backend.allocate((HISTORY, *row_shape), np.float32)
        self._velocities = [history.slot(k) for k in range(HISTORY)]
        self._guidance_buffers: dict[int, tuple[BranchBatch | None, dict[str, Buffer]]] = {}
        self.atol, self.rtol = make("atol", spec.inputs), make("rtol", spec.inputs)

    def clear(self) -> None:
        """Clear what an earlier picture left: a NaN would spoil a sum even where its coefficient is 0."""
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
        """The point that an evaluation writes, [B, C, H, W]."""
        return self.points[1 - self.current]

    def swap_points(self) -> None:
        """Make the next point the base."""
        self.current = 1 - self.current

    def upload_guidance(self, branches: BranchBatch) -> Mapping[str, Buffer]:
        """Return the contract's `pair` and `mix` of these rows; uploaded once."""
        num_rows, arrays = len(branches.labels), {"row_image": branches.row_image, "mix": branches.mix}
        uploaded, buffers = self._guidance_buffers.get(num_rows, (None, {}))
        if uploaded is not branches:
            buffers = buffers or {name: self._backend.allocate(a.shape, a.dtype) for name, a in arrays.items()}
            for name, array in arrays.items():
                buffers[name].upload(array)
            self._guidance_buffers[num_rows] = (branches, buffers)
        return buffers

    def slice_velocities(self, slot: int, count: int) -> Buffer:
        """Return the first `count` rows of the evaluation with its slope in `slot`: [count, C, H, W]."""
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
        """Copy an image from another workspace, on the device.

        Args:
            index, other_index: its index here and there.
            slots: slot there → slot here, of the slopes that it holds.
            rows: its rows, (index there, index here).
        """
        self.base.slot(index).copy_from(other_workspace.base.slot(other_index))
        self.next_point.slot(index).copy_from(other_workspace.next_point.slot(other_index))
        for source, target in slots.items():
            self.slope_slots[target].slot(index).copy_from(other_workspace.slope_slots[source].slot(other_index))
            for source_row, target_row in rows:
                self._velocities[target].slot(target_row).copy_from(
                    other_workspace._velocities[source].slot(source_row)
                )
