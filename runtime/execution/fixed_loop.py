"""The deployed sampling loop of fixed samplers: a plan's evaluations, one engine call each, on buffers that never leave
the device. Samplers that look at what they get run in `adaptive_loop.py`, on the same networks and memory."""

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
from runtime.sampling.guidance import Rows
from runtime.sampling.history import place
from runtime.sampling.plan import BASE, HISTORY, NEW, Callback, Evaluation, Name
from runtime.system.errors import NonFiniteError

Floats = NDArray[np.float32]
RowsWhen = Callable[[bool], Rows]
"""The rows of an evaluation, with guidance and without."""
Drawn = Callable[[int], Floats]
"""The k-th normal draw of every image, [B, C, H, W]."""

WORKSPACES = 8
"""Sizes (images, rows) whose buffers are kept; a service with mixed guidance meets many."""


@dataclass
class Usage:
    """Engine calls and wall time by stage, for run.json."""

    calls: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, seconds: float, calls: int = 1) -> None:
        self.calls[stage] = self.calls.get(stage, 0) + calls
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def conditioning(self, conditioner: Conditioner) -> Iterator[None]:
        """Counts what a conditioner does inside."""
        started, before = time.perf_counter(), conditioner.calls
        yield
        self.add("conditioning", time.perf_counter() - started, conditioner.calls - before)


@dataclass(frozen=True)
class Trunk:
    """A network as the loop sees it: its trunk engine, contract and conditioner."""

    engine: Engine
    spec: GraphSpec
    conditioner: Conditioner


class Workspaces:
    """Workspaces by size, so that later pictures allocate nothing but coefficients; few are kept."""

    def __init__(self, backend: Backend, spec: GraphSpec) -> None:
        self._backend, self._spec = backend, spec
        self._kept: dict[tuple[int, int], Workspace] = {}

    def sizes(self) -> set[tuple[int, int]]:
        """Images and rows of those that are kept."""
        return set(self._kept)

    def take(self, images: int, rows: int) -> Workspace:
        """A cleared one that belongs to the caller until it is given back."""
        space = self._kept.pop((images, rows), None) or Workspace(self._backend, self._spec, images, rows)
        space.clear()
        return space

    def give_back(self, space: Workspace) -> None:
        """Keeps it for the next trajectory of its size."""
        while len(self._kept) >= WORKSPACES:
            self._kept.pop(next(iter(self._kept)))
        self._kept[space.images, space.most_rows] = space


class Loop:
    """Runs plans."""

    def __init__(self, backend: Backend, networks: Mapping[str, Trunk]) -> None:
        self.backend, self.networks = backend, networks
        self.workspaces = Workspaces(backend, networks["predictor"].spec)

    def run(
        self,
        plan: Sequence[Evaluation],
        noise: Floats,
        rows: Rows | RowsWhen,
        usage: Usage,
        callback: Callback | None = None,
        drawn: Drawn | None = None,
    ) -> Floats:
        """From noise [B, C, H, W] to latents [B, C, H, W].

        Args:
            rows: of every evaluation; or a function of whether guidance acts.
            drawn: the normal draws of a stochastic plan.

        Raises:
            NonFiniteError: the network gave NaN or infinity; names the evaluation.
        """
        images = len(noise)
        when = (lambda guided: rows) if isinstance(rows, Rows) else rows
        each = [when(evaluation.guided) for evaluation in plan]
        space = self.workspaces.take(images, max(len(r.labels) for r in each))
        space.base.upload(noise)
        mods = self._modulations(plan, each, usage)
        placed = place(plan)
        arrays = coefficient_arrays(plan, [p.held for p in placed], images)
        coefficients = {name: upload(self.backend, array) for name, array in arrays.items()}
        norms = self.backend.buffer((2, len(plan), images), np.float32)
        for index, (evaluation, slots, mixed) in enumerate(zip(plan, placed, each, strict=True)):
            modulations = mods(index)
            for draw in slots.drawn:
                assert drawn is not None
                space.slope_slots[slots.held[draw]].upload(drawn(draw.index))
            started = time.perf_counter()
            inputs = evaluation_inputs(space, mixed) | {"mods": modulations}
            inputs |= {name: buffer.slot(index) for name, buffer in coefficients.items()}
            if evaluation.condition is not None and evaluation.add is not None:
                inputs["v"] = space.rows(slots.held[evaluation.condition], len(mixed.labels))
                inputs["add"] = space.rows(slots.held[evaluation.add], len(mixed.labels))
            outputs = evaluation_outputs(space, slots.slope, mixed)
            outputs |= {"err": norms.slot(0).slot(index), "v_rms": norms.slot(1).slot(index)}
            self.networks[evaluation.network].engine.run(inputs, outputs)
            usage.add(evaluation.network, time.perf_counter() - started)
            if evaluation.update is not None:
                space.flip()
            if callback:
                callback({"index": index, "evaluations": len(plan), "t": evaluation.t, "block": evaluation.block})
        latents = space.base.numpy()
        _check_finite(plan, latents, norms.numpy()[1])
        self.workspaces.give_back(space)  # not one that holds NaN: fixed batches are filled with what is there
        return latents

    def _modulations(self, plan: Sequence[Evaluation], rows: Sequence[Rows], usage: Usage) -> Callable[[int], Buffer]:
        """Gives an evaluation's [N, M] buffer, made by the network that makes the evaluation."""
        tables: dict[str, ModulationTable] = {}
        position: dict[int, int] = {}
        for name, network in self.networks.items():
            indices = [index for index, evaluation in enumerate(plan) if evaluation.network == name]
            position |= {index: place for place, index in enumerate(indices)}
            with usage.conditioning(network.conditioner):
                tables[name] = network.conditioner.table(
                    [plan[index].t for index in indices], [rows[index].labels for index in indices]
                )

        def buffer(index: int) -> Buffer:
            name = plan[index].network
            with usage.conditioning(self.networks[name].conditioner):
                return tables[name][position[index]]

        return buffer


def evaluation_inputs(space: Workspace, rows: Rows) -> dict[str, Buffer]:
    """The inputs of every call that depend neither on time nor on coefficients."""
    return {"base": space.base, "slopes": space.slopes, "atol": space.atol, "rtol": space.rtol, **space.mixed(rows)}


def evaluation_outputs(space: Workspace, slope: int, rows: Rows) -> dict[str, Buffer]:
    """The latents that one call writes."""
    return {
        "slope": space.slope_slots[slope],
        "rows": space.rows(slope, len(rows.labels)),
        "x_next": space.spare,
    }


def coefficient_arrays(
    plan: Sequence[Evaluation], held: Sequence[Mapping[Name, int]], images: int
) -> dict[str, Floats]:
    """The contract's a, b and e of every evaluation of a plan, the same for all images: [E, K + 1 or K + 2, B]."""
    arrays = {"a": (len(plan), HISTORY + 1), "b": (len(plan), HISTORY + 2), "e": (len(plan), HISTORY + 1)}
    filled = {name: np.zeros(shape, np.float32) for name, shape in arrays.items()}
    for index, (evaluation, slots) in enumerate(zip(plan, held, strict=True)):
        fill_coefficients({name: array[index] for name, array in filled.items()}, evaluation, slots)
    return {name: np.repeat(array[:, :, None], images, axis=2) for name, array in filled.items()}


def fill_coefficients(into: Mapping[str, Floats], evaluation: Evaluation, held: Mapping[Name, int]) -> None:
    """Writes one image's a [K + 1], b [K + 2] and e [K + 1] in the contract's order: base (not e), slots, new."""
    combinations = {"a": evaluation.point, "b": evaluation.update or {BASE: 1.0}, "e": evaluation.error or {}}
    for name, combination in combinations.items():
        row, first = into[name], 0 if name == "e" else 1
        for key, value in combination.items():
            row[_position(key, len(row), first, held)] = value


def _position(key: str | Name, length: int, first: int, held: Mapping[Name, int]) -> int:
    if isinstance(key, str):
        return {BASE: 0, NEW: length - 1}[key]
    return first + held[key]


def upload(backend: Backend, array: NDArray[np.generic]) -> Buffer:
    """A host array in memory of the backend."""
    buffer = backend.buffer(array.shape, array.dtype)
    buffer.upload(array)
    return buffer


def broken_network(network: str, evaluation: int, t: float, of: int | None = None) -> NonFiniteError:
    """What a NaN of a network is reported as; evaluations count from 1."""
    return NonFiniteError(
        f"the {network} gave NaN or infinity at evaluation {evaluation}{f' of {of}' if of else ''} (t = {t:.3f})",
        remedy="build this network in a wider precision: flowturbo-export build-engines --precision bf16 (or fp32)",
    )


def _check_finite(plan: Sequence[Evaluation], latents: Floats, v_rms: Floats) -> None:
    if np.isfinite(latents).all() and np.isfinite(v_rms).all():
        return
    broken = np.flatnonzero(~np.isfinite(v_rms).all(axis=1))
    first = int(broken[0]) if len(broken) else len(plan) - 1
    raise broken_network(plan[first].network, first + 1, plan[first].t, len(plan))
