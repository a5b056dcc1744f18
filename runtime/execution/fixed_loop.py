"""The deployed loop of fixed samplers: one engine call per evaluation, on buffers that never leave the device.

Adaptive samplers run in `adaptive_loop.py`, on the same networks and memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, Buffer, Engine
from runtime.directory.contract import GraphSpec
from runtime.execution.conditioning import Conditioner, ModulationTable
from runtime.execution.workspace import Workspace
from runtime.sampling.guidance import BranchBatch
from runtime.sampling.history import assign_slots
from runtime.sampling.plan import BASE, HISTORY, NEW, Callback, Evaluation, HistoryKey
from runtime.system.errors import NonFiniteError

Floats = NDArray[np.float32]
BranchFactory = Callable[[bool], BranchBatch]
"""The rows of an evaluation, with guidance and without."""
DrawNoise = Callable[[int], Floats]
"""The k-th normal draw of every image, [B, C, H, W]."""

MAX_WORKSPACES = 8
"""Largest number of sizes (images, rows) with buffers in the pool; a service with mixed guidance needs many."""


@dataclass
class Usage:
    """Engine calls and wall time by stage, for run.json."""

    calls: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, seconds: float, calls: int = 1) -> None:
        self.calls[stage] = self.calls.get(stage, 0) + calls
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def count_conditioning(self, conditioner: Conditioner) -> Iterator[None]:
        """Count the calls and the time of a conditioner in this block."""
        start_time, calls_before = time.perf_counter(), conditioner.calls
        yield
        self.add("conditioning", time.perf_counter() - start_time, conditioner.calls - calls_before)


@dataclass(frozen=True)
class LoadedNetwork:
    """The trunk engine of a network, its contract and its conditioner."""

    engine: Engine
    spec: GraphSpec
    conditioner: Conditioner


class WorkspacePool:
    """Workspaces by size, so that later pictures allocate nothing but coefficients."""

    def __init__(self, backend: Backend, spec: GraphSpec) -> None:
        self._backend, self._spec = backend, spec
        self._idle: dict[tuple[int, int], Workspace] = {}

    def list_sizes(self) -> set[tuple[int, int]]:
        """Return the images and rows of the workspaces in the pool."""
        return set(self._idle)

    def acquire(self, images: int, rows: int) -> Workspace:
        """Return a cleared workspace, which belongs to the caller until `release`."""
        workspace = self._idle.pop((images, rows), None) or Workspace(self._backend, self._spec, images, rows)
        workspace.clear()
        return workspace

    def release(self, workspace: Workspace) -> None:
        """Put a workspace back for the next trajectory of its size; the oldest ones are dropped."""
        while len(self._idle) >= MAX_WORKSPACES:
            self._idle.pop(next(iter(self._idle)))
        self._idle[workspace.images, workspace.max_rows] = workspace


class FixedLoop:
    """Runs plans."""

    def __init__(self, backend: Backend, networks: Mapping[str, LoadedNetwork]) -> None:
        self.backend, self.networks = backend, networks
        self.workspaces = WorkspacePool(backend, networks["predictor"].spec)

    def run(
        self,
        plan: Sequence[Evaluation],
        noise: Floats,
        branches: BranchBatch | BranchFactory,
        usage: Usage,
        callback: Callback | None = None,
        draw_noise: DrawNoise | None = None,
    ) -> Floats:
        """Integrate from noise [B, C, H, W] to latents [B, C, H, W].

        Args:
            branches: of every evaluation; or a function of whether guidance acts.
            draw_noise: the normal draws of a stochastic plan.

        Raises:
            NonFiniteError: the network gave NaN or infinity; names the evaluation.
        """
        num_images = len(noise)
        branch_factory = (lambda guided: branches) if isinstance(branches, BranchBatch) else branches
        branch_batches = [branch_factory(evaluation.guided) for evaluation in plan]
        workspace = self.workspaces.acquire(num_images, max(len(r.labels) for r in branch_batches))
        workspace.base.upload(noise)
        get_modulations = self._compute_modulations(plan, branch_batches, usage)
        assignments = assign_slots(plan)
        arrays = build_coefficient_arrays(plan, [p.slots for p in assignments], num_images)
        coefficients = {name: upload_array(self.backend, array) for name, array in arrays.items()}
        norms = self.backend.allocate((2, len(plan), num_images), np.float32)
        for index, (evaluation, assignment, branch_batch) in enumerate(
            zip(plan, assignments, branch_batches, strict=True)
        ):
            modulations = get_modulations(index)
            for draw in assignment.new_draws:
                if draw_noise is None:
                    raise AssertionError(f"draw {draw.index} of a plan that is run without noise")
                workspace.slope_slots[assignment.slots[draw]].upload(draw_noise(draw.index))
            start_time = time.perf_counter()
            inputs = collect_inputs(workspace, branch_batch) | {"mods": modulations}
            inputs |= {name: buffer.slot(index) for name, buffer in coefficients.items()}
            if evaluation.condition is not None and evaluation.add is not None:
                num_rows = len(branch_batch.labels)
                inputs["velocity"] = workspace.slice_velocities(assignment.slots[evaluation.condition], num_rows)
                inputs["residual"] = workspace.slice_velocities(assignment.slots[evaluation.add], num_rows)
            outputs = collect_outputs(workspace, assignment.slope_slot, branch_batch)
            outputs |= {"err": norms.slot(0).slot(index), "slope_rms": norms.slot(1).slot(index)}
            self.networks[evaluation.network].engine.run(inputs, outputs)
            usage.add(evaluation.network, time.perf_counter() - start_time)
            if evaluation.update is not None:
                workspace.swap_points()
            if callback:
                callback({"index": index, "evaluations": len(plan), "t": evaluation.t, "block": evaluation.block})
        latents, slope_rms = workspace.base.numpy(), norms.numpy()[1]
        if not (np.isfinite(latents).all() and np.isfinite(slope_rms).all()):
            broken = np.flatnonzero(~np.isfinite(slope_rms).all(axis=1))
            first = int(broken[0]) if len(broken) else len(plan) - 1
            raise make_non_finite_error(plan[first].network, first + 1, plan[first].t, len(plan))
        self.workspaces.release(workspace)  # a workspace with NaN in it is not used again
        return latents

    def _compute_modulations(
        self, plan: Sequence[Evaluation], branch_batches: Sequence[BranchBatch], usage: Usage
    ) -> Callable[[int], Buffer]:
        """Return a function from an evaluation's index to its modulations [N, M], by the conditioner of its network."""
        tables: dict[str, ModulationTable] = {}
        position: dict[int, int] = {}
        for name, network in self.networks.items():
            indices = [index for index, evaluation in enumerate(plan) if evaluation.network == name]
            position |= {index: order for order, index in enumerate(indices)}
            with usage.count_conditioning(network.conditioner):
                tables[name] = network.conditioner.build_table(
                    [plan[index].t for index in indices], [branch_batches[index].labels for index in indices]
                )

        def buffer(index: int) -> Buffer:
            name = plan[index].network
            with usage.count_conditioning(self.networks[name].conditioner):
                return tables[name][position[index]]

        return buffer


def collect_inputs(workspace: Workspace, branches: BranchBatch) -> dict[str, Buffer]:
    """Return the inputs that depend neither on time nor on coefficients."""
    return {
        "base": workspace.base,
        "slopes": workspace.slopes,
        "atol": workspace.atol,
        "rtol": workspace.rtol,
        **workspace.upload_guidance(branches),
    }


def collect_outputs(workspace: Workspace, slope_slot: int, branches: BranchBatch) -> dict[str, Buffer]:
    """Return the outputs of one call."""
    return {
        "slope": workspace.slope_slots[slope_slot],
        "velocities": workspace.slice_velocities(slope_slot, len(branches.labels)),
        "x_next": workspace.next_point,
    }


def build_coefficient_arrays(
    plan: Sequence[Evaluation], slot_maps: Sequence[Mapping[HistoryKey, int]], images: int
) -> dict[str, Floats]:
    """Return the contract's a, b and e of all evaluations of a plan, equal for all images: [E, K + 1 or K + 2, B]."""
    shapes = {
        "point_coef": (len(plan), HISTORY + 1),
        "update_coef": (len(plan), HISTORY + 2),
        "error_coef": (len(plan), HISTORY + 1),
    }
    coefficients = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for index, (evaluation, slots) in enumerate(zip(plan, slot_maps, strict=True)):
        fill_coefficients({name: array[index] for name, array in coefficients.items()}, evaluation, slots)
    return {name: np.repeat(array[:, :, None], images, axis=2) for name, array in coefficients.items()}


def fill_coefficients(arrays: Mapping[str, Floats], evaluation: Evaluation, slots: Mapping[HistoryKey, int]) -> None:
    """Write one image's a [K + 1], b [K + 2] and e [K + 1] in the contract's order: base (not e), slots, new."""
    combinations = {
        "point_coef": evaluation.point,
        "update_coef": evaluation.update or {BASE: 1.0},
        "error_coef": evaluation.error or {},
    }
    for name, combination in combinations.items():
        row, offset = arrays[name], 0 if name == "error_coef" else 1
        for key, value in combination.items():
            row[{BASE: 0, NEW: len(row) - 1}[key] if isinstance(key, str) else offset + slots[key]] = value


def upload_array(backend: Backend, array: NDArray[np.generic]) -> Buffer:
    """Copy a host array into memory of the backend."""
    buffer = backend.allocate(array.shape, array.dtype)
    buffer.upload(array)
    return buffer


def make_non_finite_error(network: str, evaluation: int, t: float, total: int | None = None) -> NonFiniteError:
    """Make the error for a NaN or infinity of a network; evaluations count from 1."""
    return NonFiniteError(
        f"the {network} gave NaN or infinity at evaluation {evaluation}{f' of {total}' if total else ''} (t = {t:.3f})",
        remedy="build this network in a wider precision: flowturbo-export build-engines --precision bf16 (or fp32)",
    )
