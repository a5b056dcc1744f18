"""The deployed loop of samplers that look at what they get: every image takes its own steps, batches stay together.

Each image is steered by its own generator (`plan.Steps`). In every round the images that ask the same network for the
same kind of rows share one engine call; those that are done leave the batch and cost nothing. Only two numbers an
image, its error and the size of its velocity, come to the host; latents move between batches on the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


@dataclass
class Trajectory:
    """A generator and the images that it steers: one, or several that share every decision.

    Attributes:
        images: their places in the batch.
        evaluation: what it asks for next; None when it is done.
        next_index: evaluations so far; the next one's name.
        slots: slots of the slopes that it may still read.
    """

    steps: AdaptiveSteps
    images: tuple[int, ...]
    evaluation: Evaluation | None = None
    end: Combination | None = None
    next_index: int = 0
    slots: SlotMap = field(default_factory=dict)
    batch: _TrajectoryBatch | None = None

    def start(self) -> None:
        self._advance(None)

    def send_feedback(self, feedback: Feedback) -> None:
        """Sends what came of the evaluation and takes the next one."""
        self.next_index += 1
        self._advance(feedback)

    def _advance(self, feedback: Feedback | None) -> None:
        try:
            self.evaluation = next(self.steps) if feedback is None else self.steps.send(feedback)
        except StopIteration as stop:
            self.evaluation, self.end = None, stop.value
            return
        missing = self.evaluation.list_dependencies() - self.slots.keys()
        assert not missing, f"evaluation {self.next_index} reads {missing}, which an evaluation since has not read"
        self.slots = {name: slot for name, slot in self.slots.items() if name in self.evaluation.list_dependencies()}


class _TrajectoryBatch:
    """Images that are evaluated together, and their memory."""

    def __init__(
        self, backend: Backend, workspace: Workspace, trajectories: Sequence[Trajectory], branches: BranchBatch
    ) -> None:
        self.workspace, self.branches, self.last_slot = workspace, branches, -1
        self.trajectories = tuple(trajectories)
        images = [image for trajectory in trajectories for image in trajectory.images]
        self.image_index = {image: index for index, image in enumerate(images)}
        self.remaining = len(trajectories)
        num_images = workspace.images  # more than its own where a fixed batch is filled up
        self._coefficients = {
            name: (np.zeros((size, num_images), np.float32), backend.allocate((size, num_images), np.float32))
            for name, size in (("a", HISTORY + 1), ("b", HISTORY + 2), ("e", HISTORY + 1))
        }
        self.norms = {name: backend.allocate((num_images,), np.float32) for name in ("err", "v_rms")}

    def find_branches(self, image: int) -> list[int]:
        """Rows of one image, the conditional ones first."""
        return [int(row) for row in np.flatnonzero(self.branches.row_image == self.image_index[image])]

    def upload_coefficients(self) -> dict[str, Buffer]:
        """The contract's a, b and e for what every actor asks now; the tolerances go into the workspace."""
        scales = np.zeros((2, self.workspace.images), np.float32)
        scales[0] = 1.0
        for array, _ in self._coefficients.values():
            array.fill(0)
        for trajectory in self.trajectories:
            assert trajectory.evaluation is not None
            for image in trajectory.images:
                index = self.image_index[image]
                columns = {name: array[:, index] for name, (array, _) in self._coefficients.items()}
                fill_coefficients(columns, trajectory.evaluation, trajectory.slots)
                scales[:, index] = trajectory.evaluation.scale
        for array, buffer in self._coefficients.values():
            buffer.upload(array)
        self.workspace.atol.upload(scales[0])
        self.workspace.rtol.upload(scales[1])
        return {name: buffer for name, (_, buffer) in self._coefficients.items()}


class AdaptiveLoop:
    """Runs one batch of actors over a loop's networks and memory."""

    def __init__(
        self, loop: FixedLoop, branch_factory: ImageBranchFactory, usage: Usage, callback: Callback | None = None
    ) -> None:
        self._loop, self._branch_factory, self._usage, self._callback = loop, branch_factory, usage, callback
        self._calls = 0

    def run(self, trajectories: Sequence[Trajectory], noise: Floats) -> Floats:
        """From noise [B, C, H, W] to latents [B, C, H, W]; every image of the batch has one actor.

        Raises:
            NonFiniteError: a network gave NaN or infinity; names the evaluation.
        """
        self._noise, self._latents = noise, np.empty_like(noise)
        for trajectory in trajectories:
            trajectory.start()
        while active := [trajectory for trajectory in trajectories if trajectory.evaluation is not None]:
            groups: dict[tuple[str, bool], list[Trajectory]] = {}
            for trajectory in active:
                assert trajectory.evaluation is not None
                groups.setdefault((trajectory.evaluation.network, trajectory.evaluation.guided), []).append(trajectory)
            for (network, guided), group in groups.items():
                self._evaluate(network, guided, group)
        return self._latents

    def _evaluate(self, network: str, guided: bool, trajectories: Sequence[Trajectory]) -> None:
        batch, slot = self._find_batch(trajectories, guided)
        workspace, loaded = batch.workspace, self._loop.networks[network]
        self._undo_steps(batch)
        modulations = self._compute_modulations(batch, network)
        start_time = time.perf_counter()
        inputs = collect_inputs(workspace, batch.branches) | {"mods": modulations, **batch.upload_coefficients()}
        inputs |= self._collect_velocities(batch) if network == "refiner" else {}
        loaded.engine.run(inputs, collect_outputs(workspace, slot, batch.branches) | batch.norms)
        workspace.swap_points()
        err, slope_rms = (batch.norms[name].numpy().astype(np.float64) for name in ("err", "v_rms"))
        self._usage.add(network, time.perf_counter() - start_time)
        batch.last_slot = slot
        for trajectory in trajectories:
            trajectory.slots[trajectory.next_index] = slot
            self._finish_evaluation(trajectory, network, err, slope_rms, batch)

    def _collect_velocities(self, batch: _TrajectoryBatch) -> dict[str, Buffer]:
        """A refiner's v and add; those of images whose slopes lie in different slots are brought together."""
        workspace, num_rows = batch.workspace, len(batch.branches.labels)
        evaluations = [
            (trajectory, trajectory.evaluation)
            for trajectory in batch.trajectories
            if trajectory.evaluation is not None
        ]
        inputs: dict[str, Buffer] = {}
        for name, field_name in (("v", "condition"), ("add", "add")):
            slots = [trajectory.slots[getattr(evaluation, field_name)] for trajectory, evaluation in evaluations]
            if len(set(slots)) == 1:
                inputs[name] = workspace.slice_velocities(slots[0], num_rows)
                continue
            inputs[name] = self._loop.backend.allocate(workspace.slice_velocities(0, num_rows).shape, np.float32)
            for slot, (trajectory, _) in zip(slots, evaluations, strict=True):
                for row in (row for image in trajectory.images for row in batch.find_branches(image)):
                    inputs[name].slot(row).copy_from(workspace.slice_velocities(slot, num_rows).slot(row))
        return inputs

    def _undo_steps(self, batch: _TrajectoryBatch) -> None:
        """Puts images whose last step was given up back to where it started."""
        for trajectory in batch.trajectories:
            if trajectory.evaluation is not None and trajectory.evaluation.undo:
                for index in (batch.image_index[image] for image in trajectory.images):
                    batch.workspace.base.slot(index).copy_from(batch.workspace.next_point.slot(index))

    def _compute_modulations(self, batch: _TrajectoryBatch, network: str) -> Buffer:
        times = {
            batch.image_index[image]: trajectory.evaluation.t
            for trajectory in batch.trajectories if trajectory.evaluation is not None
            for image in trajectory.images
        }  # fmt: skip
        conditioner = self._loop.networks[network].conditioner
        default_time = next(iter(times.values()))
        keys = [
            make_conditioning_key(times.get(int(index), default_time), label)
            for index, label in zip(batch.branches.row_image, batch.branches.labels, strict=True)
        ]  # fmt: skip
        with self._usage.count_conditioning(conditioner):
            return conditioner.compute_buffers([keys])[0]

    def _find_batch(self, trajectories: Sequence[Trajectory], guided: bool) -> tuple[_TrajectoryBatch, int]:
        """The group of exactly these actors, with a slot for their next slopes; made if they were apart before."""
        batch = trajectories[0].batch
        is_same_batch = (
            batch is not None
            and batch.trajectories == tuple(trajectories)
            and all(trajectory.batch is batch for trajectory in trajectories)
        )
        branches = self._branch_factory([image for trajectory in trajectories for image in trajectory.images], guided)
        if not is_same_batch or batch is None or len(batch.branches.labels) != len(branches.labels):
            batch = self._gather_batch(trajectories, branches)
        slot = find_free_slot([trajectory.slots for trajectory in trajectories], batch.last_slot)
        if slot is None:  # many images, each with its slopes elsewhere
            batch = self._gather_batch(trajectories, branches)
            slot = find_free_slot([trajectory.slots for trajectory in trajectories], batch.last_slot)
        assert slot is not None, "an actor needs more slopes than the history holds"
        return batch, slot

    def _gather_batch(self, trajectories: Sequence[Trajectory], branches: BranchBatch) -> _TrajectoryBatch:
        """Brings actors into one batch, what they hold in the first slots."""
        images = [image for trajectory in trajectories for image in trajectory.images]
        workspace = self._loop.workspaces.acquire(self._count_images(images, branches), len(branches.labels))
        batch = _TrajectoryBatch(self._loop.backend, workspace, trajectories, branches)
        for trajectory in trajectories:
            slots = {name: slot for slot, name in enumerate(trajectory.slots)}
            moves = {trajectory.slots[name]: slot for name, slot in slots.items()}
            for image in trajectory.images:
                index, old_batch = batch.image_index[image], trajectory.batch
                if old_batch is None:
                    workspace.base.slot(index).upload(self._noise[image])
                    continue
                row_pairs = list(zip(old_batch.find_branches(image), batch.find_branches(image), strict=False))
                workspace.copy_image(index, old_batch.workspace, old_batch.image_index[image], moves, row_pairs)
            self._leave_batch(trajectory)
            trajectory.slots, trajectory.batch = slots, batch
        batch.last_slot = max((len(trajectory.slots) for trajectory in trajectories), default=0) - 1
        return batch

    def _count_images(self, images: Sequence[int], branches: BranchBatch) -> int:
        """Images of the engine's batch: these, or as many as the rows were filled up to."""
        return max(len(images), int(branches.row_image.max()) + 1)

    def _leave_batch(self, trajectory: Trajectory) -> None:
        batch = trajectory.batch
        if batch is not None:
            batch.remaining -= 1
            if not batch.remaining:
                self._loop.workspaces.release(batch.workspace)
        trajectory.batch = None

    def _finish_evaluation(
        self,
        trajectory: Trajectory,
        network: str,
        err: NDArray[np.float64],
        slope_rms: NDArray[np.float64],
        batch: _TrajectoryBatch,
    ) -> None:
        """Tells an actor what came of its evaluation; takes its latents when it is done."""
        assert trajectory.evaluation is not None
        indices = [batch.image_index[image] for image in trajectory.images]
        if not (np.isfinite(slope_rms[indices]).all() and np.isfinite(err[indices]).all()):
            raise make_non_finite_error(network, trajectory.next_index + 1, trajectory.evaluation.t)
        t, block = trajectory.evaluation.t, trajectory.evaluation.block
        trajectory.send_feedback(Feedback(_rms(err[indices]), _rms(slope_rms[indices])))
        self._calls += 1
        if self._callback:
            self._callback({"index": self._calls - 1, "evaluations": None, "t": t, "block": block})
        if trajectory.evaluation is None:
            for image, index in zip(trajectory.images, indices, strict=True):
                self._latents[image] = self._compute_end(trajectory, batch, index)
                if not np.isfinite(self._latents[image]).all():
                    raise make_non_finite_error(network, trajectory.next_index, t)
            self._leave_batch(trajectory)

    def _compute_end(self, trajectory: Trajectory, batch: _TrajectoryBatch, index: int) -> Floats:
        workspace = batch.workspace
        if trajectory.end is None:
            latents: Floats = workspace.base.slot(index).numpy()
            return latents
        slopes = {name: workspace.slope_slots[slot].slot(index).numpy() for name, slot in trajectory.slots.items()}
        latents_at_end: Floats = combine(trajectory.end, workspace.next_point.slot(index).numpy(), slopes).astype(
            np.float32
        )
        return latents_at_end


def _rms(values: NDArray[np.float64]) -> float:
    """Over images of equal size the rms of their rms is that of all their numbers."""
    return math.sqrt(float(np.mean(np.square(values))))
