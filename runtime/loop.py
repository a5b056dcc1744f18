"""The deployed sampling loop: a plan's evaluations, one engine call each, on buffers that never leave the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, Buffer, Engine
from runtime.conditioning import Conditioner, ModulationTable
from runtime.contract import GraphSpec
from runtime.errors import NonFiniteError
from runtime.guidance import Rows
from runtime.plan import BASE, HISTORY, NEW, Callback, Combination, Evaluation

Floats = NDArray[np.float32]

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


class _Workspace:
    """Device memory of one trajectory of B images and N rows."""

    def __init__(self, backend: Backend, spec: GraphSpec, images: int, rows: int) -> None:
        sizes = {"B": images, "N": rows}

        def make(name: str, specs: Mapping[str, Any]) -> Buffer:
            return backend.buffer(specs[name].sized(sizes), specs[name].numpy)

        self.points = (make("base", spec.inputs), make("base", spec.inputs))
        self.slopes = make("slopes", spec.inputs)
        self.slope_slots = [self.slopes.slot(k) for k in range(HISTORY)]
        row_shape = spec.outputs["rows"].sized(sizes)
        rows_ring = backend.buffer((HISTORY, *row_shape), np.float32)
        self.rows = [rows_ring.slot(k) for k in range(HISTORY)]
        self.atol, self.rtol = make("atol", spec.inputs), make("rtol", spec.inputs)
        self.pair, self.mix = make("pair", spec.inputs), make("mix", spec.inputs)
        self.atol.upload(np.ones(images, np.float32))


class Loop:
    """Runs plans. Workspaces are kept by size, so that later pictures allocate nothing but coefficients."""

    def __init__(self, backend: Backend, networks: Mapping[str, Trunk]) -> None:
        self._backend, self._networks = backend, networks
        self._workspaces: dict[tuple[int, int], _Workspace] = {}

    def run(
        self, plan: Sequence[Evaluation], noise: Floats, rows: Rows, usage: Usage, callback: Callback | None = None
    ) -> Floats:
        """From noise [B, C, H, W] to latents [B, C, H, W].

        Raises:
            NonFiniteError: the network gave NaN or infinity; names the evaluation.
        """
        images = len(noise)
        space = self._workspace(images, len(rows.labels))
        space.slopes.upload(np.zeros(space.slopes.shape, np.float32))
        space.points[0].upload(noise)
        space.pair.upload(rows.pair)
        space.mix.upload(rows.mix)
        mods = self._modulations(plan, rows, usage)
        coefficients = {name: self._upload(array) for name, array in coefficient_arrays(plan, images).items()}
        norms = self._backend.buffer((2, len(plan), images), np.float32)
        current = 0
        for index, evaluation in enumerate(plan):
            modulations = mods(index)
            started = time.perf_counter()
            inputs = self._inputs(space, evaluation, current) | {"mods": modulations}
            inputs |= {name: buffer.slot(index) for name, buffer in coefficients.items()}
            outputs = {
                "slope": space.slope_slots[index % HISTORY],
                "rows": space.rows[index % HISTORY],
                "x_next": space.points[1 - current],
                "err": norms.slot(0).slot(index),
                "v_rms": norms.slot(1).slot(index),
            }
            self._networks[evaluation.network].engine.run(inputs, outputs)
            usage.add(evaluation.network, time.perf_counter() - started)
            if evaluation.update is not None:
                current = 1 - current
            if callback:
                callback({"index": index, "evaluations": len(plan), "t": evaluation.t, "block": evaluation.block})
        latents = space.points[current].numpy()
        _check_finite(plan, latents, norms.numpy()[1])
        return latents

    def _workspace(self, images: int, rows: int) -> _Workspace:
        if (images, rows) not in self._workspaces:
            spec = self._networks["predictor"].spec
            while len(self._workspaces) >= WORKSPACES:
                self._workspaces.pop(next(iter(self._workspaces)))
            self._workspaces[images, rows] = _Workspace(self._backend, spec, images, rows)
        return self._workspaces[images, rows]

    def _modulations(self, plan: Sequence[Evaluation], rows: Rows, usage: Usage) -> Callable[[int], Buffer]:
        """Gives an evaluation's [N, M] buffer, made by the network that makes the evaluation."""
        tables: dict[str, ModulationTable] = {}
        position: dict[int, int] = {}
        for name, network in self._networks.items():
            indices = [index for index, evaluation in enumerate(plan) if evaluation.network == name]
            position |= {index: place for place, index in enumerate(indices)}
            with usage.conditioning(network.conditioner):
                tables[name] = network.conditioner.table([plan[index].t for index in indices], rows.labels)

        def buffer(index: int) -> Buffer:
            name = plan[index].network
            with usage.conditioning(self._networks[name].conditioner):
                return tables[name][position[index]]

        return buffer

    def _inputs(self, space: _Workspace, evaluation: Evaluation, current: int) -> dict[str, Buffer]:
        inputs = {
            "base": space.points[current],
            "slopes": space.slopes,
            "atol": space.atol,
            "rtol": space.rtol,
            "pair": space.pair,
            "mix": space.mix,
        }
        if evaluation.condition is not None and evaluation.add is not None:
            inputs["v"] = space.rows[evaluation.condition % HISTORY]
            inputs["add"] = space.rows[evaluation.add % HISTORY]
        return inputs

    def _upload(self, array: Floats) -> Buffer:
        buffer = self._backend.buffer(array.shape, array.dtype)
        buffer.upload(array)
        return buffer


def coefficient_arrays(plan: Sequence[Evaluation], images: int) -> dict[str, Floats]:
    """The contract's a, b and e of every evaluation: [E, K + 1 or K + 2, B]; slopes sit in the slot index mod K."""
    a = np.zeros((len(plan), HISTORY + 1, images), np.float32)
    b = np.zeros((len(plan), HISTORY + 2, images), np.float32)
    e = np.zeros((len(plan), HISTORY + 1, images), np.float32)
    for index, evaluation in enumerate(plan):
        _fill(a[index], evaluation.point)
        _fill(b[index], evaluation.update or {BASE: 1.0})
        _fill(e[index], evaluation.error or {}, first=0)
    return {"a": a, "b": b, "e": e}


def _fill(row: Floats, combination: Combination, first: int = 1) -> None:
    """Puts coefficients in the contract's order: base (if it has one), slots, new slope."""
    for key, value in combination.items():
        position = 0 if key == BASE else len(row) - 1 if key == NEW else first + int(key) % HISTORY
        row[position] = value


def _check_finite(plan: Sequence[Evaluation], latents: Floats, v_rms: Floats) -> None:
    if np.isfinite(latents).all() and np.isfinite(v_rms).all():
        return
    broken = np.flatnonzero(~np.isfinite(v_rms).all(axis=1))
    first = int(broken[0]) if len(broken) else len(plan) - 1
    raise NonFiniteError(
        f"the {plan[first].network} gave NaN or infinity at evaluation {first + 1} of {len(plan)} "
        f"(t = {plan[first].t:.3f})",
        remedy="build this network in a wider precision: flowturbo-export build-engines --precision bf16 (or fp32)",
    )
