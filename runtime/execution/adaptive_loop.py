"""The deployed loop of adaptive samplers: every image takes its own steps, and batches stay together.

Each image is steered by its own generator (`plan.AdaptiveSteps`). In every round the images that need the same network
with the same kind of rows share one engine call; those that are done leave the batch and cost nothing. Only two numbers
per image, its error and the size of its velocity, come to the host; latents move between batches on the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, Buffer
from runtime.execution.conditioning import make_conditioning_key
from runtime.execution.fixed_loop import (
    FixedLoop,
    Floats,
    Usage,
    collect_inputs,
    collect_outputs,
    fill_coefficients,
    make_non_finite_error,
)
from runtime.execution.workspace import Workspace
from runtime.sampling.guidance import BranchBatch
from runtime.sampling.history import SlotMap, find_free_slot
from runtime.sampling.plan import HISTORY, AdaptiveSteps, Callback, Combination, Evaluation, Feedback, combine

ImageBranchFactory = Callable[[Sequence[int], bool], BranchBatch]
"""The rows of an evaluation of some images of the batch, with guidance or without."""


@dataclass(frozen=True)
class Finished:
    """The end of a trajectory: a combination that gives its last point, or None where the last update is that point."""

    end: Combination | None


class Trajectory:
    """A generator that is under way, and the images that it steers: one, or several that share every decision.

    Attributes:
        images: their places in the batch.
        evaluation: what the generator needs next.
        next_index: number of evaluations so far, which is the name of the next one's slope.
        slots: slots of the slopes that it may still read.
    """

    def __init__(self, steps: AdaptiveSteps, images: tuple[int, ...]) -> None:
        self._steps, self.images = steps, images
        self.evaluation: Evaluation = next(steps)
        self.next_index = 0
        self.slots: SlotMap = {}

    def advance(self, feedback: Feedback) -> Evaluation | Finished:
        """Send the feedback of the evaluation and return what follows."""
        self.next_index += 1
        try:
            self.evaluation = self._steps.send(feedback)
        except StopIteration as stop:
            return Finished(stop.value)
        dependencies = self.evaluation.list_dependencies()
        missing = dependencies - self.slots.keys()
        assert not missing, f"evaluation {self.next_index} reads {missing}, which an evaluation since has not read"
        self.slots = {name: slot for name, slot in self.slots.items() if name in dependencies}
        return self.evaluation


class _TrajectoryBatch:
    """Trajectories that are evaluated together, and their memory."""

    def __init__(
        self, backend: Backend, workspace: Workspace, trajectories: Sequence[Trajectory], branches: BranchBatch
    ) -> None:
        self.workspace, self.branches = workspace, branches
        self.trajectories = tuple(trajectories)
        images = [image for trajectory in trajectories for image in trajectory.images]
        self.image_index = {image: index for index, image in enumerate(images)}
        self.remaining = len(trajectories)
        self.last_slot = -1
        num_images = workspace.images  # more than the trajectories have where a fixed batch is filled up
        self._coefficients = {
            name: (np.zeros((size, num_images), np.float32), backend.allocate((size, num_images), np.float32))
            for name, size in (
                ("point_coef", HISTORY + 1),
                ("update_coef", HISTORY + 2),
                ("error_coef", HISTORY + 1),
            )
        }
        self.norms = {name: backend.allocate((num_images,), np.float32) for name in ("err", "slope_rms")}

    def find_indices(self, trajectory: Trajectory) -> list[int]:
        """Return the places of a trajectory's images in this batch."""
        return [self.image_index[image] for image in trajectory.images]

    def find_branches(self, image: int) -> list[int]:
        """Return the rows of one image, the conditional ones first."""
        return [int(row) for row in np.flatnonzero(self.branches.row_image == self.image_index[image])]

    def upload_coefficients(self) -> dict[str, Buffer]:
        """Return the contract's a, b and e of the present evaluations; the tolerances go into the workspace."""
        scales = np.zeros((2, self.workspace.images), np.float32)
        scales[0] = 1.0
        for array, _ in self._coefficients.values():
            array.fill(0)
        for trajectory in self.trajectories:
            for index in self.find_indices(trajectory):
                columns = {name: array[:, index] for name, (array, _) in self._coefficients.items()}
                fill_coefficients(columns, trajectory.evaluation, trajectory.slots)
                scales[:, index] = trajectory.evaluation.scale
        for array, buffer in self._coefficients.values():
            buffer.upload(array)
        self.workspace.atol.upload(scales[0])
        self.workspace.rtol.upload(scales[1])
        return {name: buffer for name, (_, buffer) in self._coefficients.items()}


class AdaptiveLoop:
    """Runs one batch of trajectories over a loop's networks and memory."""

    def __init__(
        self, loop: FixedLoop, branch_factory: ImageBranchFactory, usage: Usage, callback: Callback | None = None
    ) -> None:
        self._loop, self._branch_factory, self._usage, self._callback = loop, branch_factory, usage, callback
        self._batches: dict[Trajectory, _TrajectoryBatch] = {}
        self._calls = 0

    def run(self, trajectories: Sequence[Trajectory], noise: Floats) -> Floats:
        """Integrate from noise [B, C, H, W] to latents [B, C, H, W]; every image belongs to one trajectory.

        Raises:
            NonFiniteError: a network gave NaN or infinity; names the evaluation.
        """
        self._noise, self._latents = noise, np.empty_like(noise)
        active = list(trajectories)
        while active:
            groups: dict[tuple[str, bool], list[Trajectory]] = {}
            for trajectory in active:
                groups.setdefault((trajectory.evaluation.network, trajectory.evaluation.guided), []).append(trajectory)
            for (network, guided), group in groups.items():
                self._evaluate(network, guided, group)
            active = [trajectory for trajectory in active if trajectory in self._batches]
        return self._latents

    def _evaluate(self, network: str, guided: bool, trajectories: Sequence[Trajectory]) -> None:
        batch, slot = self._find_batch(trajectories, guided)
        workspace = batch.workspace
        for trajectory in trajectories:
            if trajectory.evaluation.undo:
                for index in batch.find_indices(trajectory):
                    workspace.base.slot(index).copy_from(workspace.next_point.slot(index))
        modulations = self._compute_modulations(batch, network)
        start_time = time.perf_counter()
        inputs = collect_inputs(workspace, batch.branches) | {"mods": modulations, **batch.upload_coefficients()}
        if network == "refiner":
            inputs |= {
                "velocity": self._gather_velocities(batch, "condition"),
                "residual": self._gather_velocities(batch, "add"),
            }
        outputs = collect_outputs(workspace, slot, batch.branches) | batch.norms
        self._loop.networks[network].engine.run(inputs, outputs)
        workspace.swap_points()
        err, slope_rms = (batch.norms[name].numpy().astype(np.float64) for name in ("err", "slope_rms"))
        self._usage.add(network, time.perf_counter() - start_time)
        batch.last_slot = slot
        for trajectory in trajectories:
            trajectory.slots[trajectory.next_index] = slot
            self._advance(trajectory, batch, err, slope_rms)

    def _advance(
        self, trajectory: Trajectory, batch: _TrajectoryBatch, err: NDArray[np.float64], slope_rms: NDArray[np.float64]
    ) -> None:
        """Send a trajectory its feedback, and take its latents when it is done."""
        evaluation, indices = trajectory.evaluation, batch.find_indices(trajectory)
        if not (np.isfinite(slope_rms[indices]).all() and np.isfinite(err[indices]).all()):
            raise make_non_finite_error(evaluation.network, trajectory.next_index + 1, evaluation.t)
        step = trajectory.advance(Feedback(_rms(err[indices]), _rms(slope_rms[indices])))
        if self._callback:
            event = {"index": self._calls, "evaluations": None, "t": evaluation.t, "block": evaluation.block}
            self._callback(event)
        self._calls += 1
        if isinstance(step, Finished):
            for image, index in zip(trajectory.images, indices, strict=True):
                self._latents[image] = _compute_end(step.end, trajectory.slots, batch.workspace, index)
                if not np.isfinite(self._latents[image]).all():
                    raise make_non_finite_error(evaluation.network, trajectory.next_index, evaluation.t)
            self._leave_batch(trajectory)

    def _gather_velocities(self, batch: _TrajectoryBatch, field_name: str) -> Buffer:
        """Return the velocities that a refiner reads; those of images with slopes in different slots are copied."""
        workspace, num_rows = batch.workspace, len(batch.branches.labels)
        slots = [trajectory.slots[getattr(trajectory.evaluation, field_name)] for trajectory in batch.trajectories]
        if len(set(slots)) == 1:
            return workspace.slice_velocities(slots[0], num_rows)
        velocities = self._loop.backend.allocate(workspace.slice_velocities(0, num_rows).shape, np.float32)
        for slot, trajectory in zip(slots, batch.trajectories, strict=True):
            for row in (row for image in trajectory.images for row in batch.find_branches(image)):
                velocities.slot(row).copy_from(workspace.slice_velocities(slot, num_rows).slot(row))
        return velocities

    def _compute_modulations(self, batch: _TrajectoryBatch, network: str) -> Buffer:
        times = {index: trajectory.evaluation.t for trajectory in batch.trajectories
                 for index in batch.find_indices(trajectory)}  # fmt: skip
        conditioner = self._loop.networks[network].conditioner
        default_time = next(iter(times.values()))  # of the images that fill up a fixed batch
        keys = [
            make_conditioning_key(times.get(int(index), default_time), label)
            for index, label in zip(batch.branches.row_image, batch.branches.labels, strict=True)
        ]
        with self._usage.count_conditioning(conditioner):
            return conditioner.compute_buffers([keys])[0]

    def _find_batch(self, trajectories: Sequence[Trajectory], guided: bool) -> tuple[_TrajectoryBatch, int]:
        """Return the batch of exactly these trajectories, gathered if they were apart, and a slot for their slopes."""
        images = [image for trajectory in trajectories for image in trajectory.images]
        branches = self._branch_factory(images, guided)
        batch = self._batches.get(trajectories[0])
        if (
            batch is not None
            and batch.trajectories == tuple(trajectories)
            and all(self._batches.get(trajectory) is batch for trajectory in trajectories)
            and len(batch.branches.labels) == len(branches.labels)
        ):
            slot = find_free_slot([trajectory.slots for trajectory in trajectories], batch.last_slot)
            if slot is not None:
                return batch, slot
        # Gathering also makes room where many images have their slopes in different slots.
        batch = self._gather_batch(trajectories, branches)
        assert batch.last_slot + 1 < HISTORY, "a trajectory needs more slopes than the history holds"
        return batch, batch.last_slot + 1

    def _gather_batch(self, trajectories: Sequence[Trajectory], branches: BranchBatch) -> _TrajectoryBatch:
        """Move trajectories into one batch, with the slopes that they hold in the first slots."""
        num_images = sum(len(trajectory.images) for trajectory in trajectories)
        num_images = max(num_images, int(branches.row_image.max()) + 1)  # more where a fixed batch is filled up
        workspace = self._loop.workspaces.acquire(num_images, len(branches.labels))
        batch = _TrajectoryBatch(self._loop.backend, workspace, trajectories, branches)
        for trajectory in trajectories:
            slots = {name: slot for slot, name in enumerate(trajectory.slots)}
            moves = {trajectory.slots[name]: slot for name, slot in slots.items()}
            old_batch = self._batches.get(trajectory)
            for image in trajectory.images:
                index = batch.image_index[image]
                if old_batch is None:
                    workspace.base.slot(index).upload(self._noise[image])
                    continue
                row_pairs = list(zip(old_batch.find_branches(image), batch.find_branches(image), strict=False))
                workspace.copy_image(index, old_batch.workspace, old_batch.image_index[image], moves, row_pairs)
            self._leave_batch(trajectory)
            trajectory.slots, self._batches[trajectory] = slots, batch
        batch.last_slot = max((len(trajectory.slots) for trajectory in trajectories), default=0) - 1
        return batch

    def _leave_batch(self, trajectory: Trajectory) -> None:
        batch = self._batches.pop(trajectory, None)
        if batch is not None:
            batch.remaining -= 1
            if not batch.remaining:
                self._loop.workspaces.release(batch.workspace)


def _compute_end(end: Combination | None, slots: SlotMap, workspace: Workspace, index: int) -> Floats:
    """Return the last point of the image at `index`, [C, H, W]."""
    if end is None:
        latents: Floats = workspace.base.slot(index).numpy()
        return latents
    slopes = {name: workspace.slope_slots[slot].slot(index).numpy() for name, slot in slots.items()}
    latents = combine(end, workspace.next_point.slot(index).numpy(), slopes).astype(np.float32)
    return latents


def _rms(values: NDArray[np.float64]) -> float:
    """Return the rms of all numbers of some images of equal size, from the rms of each."""
    return math.sqrt(float(np.mean(np.square(values))))
