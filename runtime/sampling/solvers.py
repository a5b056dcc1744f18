"""Solvers: each a short function from a time grid to the evaluations of a trajectory, and the registries of names.

A new solver is one such function and one line of `SOLVERS` (fixed steps), `STOCHASTIC` (with noise), `CONTROLLED` or
`RULES` (steps that depend on what is seen); the command line, the pipeline and the tests find it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from runtime.sampling import controllers
from runtime.sampling.blocks import heun_block
from runtime.sampling.controllers import Rule
from runtime.sampling.dopri5 import dopri5, dopri5_reference
from runtime.sampling.grids import Grid, from_steps, uniform
from runtime.sampling.guidance import EVERYWHERE, Interval
from runtime.sampling.plan import BASE, NEW, Combination, Evaluation, Key
from runtime.sampling.sde import Diffusion, euler_maruyama, stochastic_heun
from runtime.sampling.tableaus import RUNGE_KUTTA, SEARCHED, SearchedTable
from runtime.system.errors import RequestError


def euler(grid: Grid) -> list[Evaluation]:
    """Order 1, one evaluation a step."""
    return [_step(t, {NEW: t_next - t}) for t, t_next in _intervals(grid)]


def heun(grid: Grid) -> list[Evaluation]:
    """Order 2, two evaluations a step: SiT's `heun2`."""
    plan: list[Evaluation] = []
    for t, t_next in _intervals(grid):
        plan += heun_block(len(plan), t, t_next, block="heun")[0]
    return plan


def adams_bashforth(order: int) -> Callable[[Grid], list[Evaluation]]:
    """Order `order` on any grid, one evaluation a step after a Runge–Kutta start of the same order."""

    def plan_on(grid: Grid) -> list[Evaluation]:
        plan: list[Evaluation] = []
        known: list[tuple[float, int]] = []  # time and index of the slopes at step ends
        for t, t_next in _intervals(grid):
            known.append((t, len(plan)))
            if len(known) < order:
                plan += _runge_kutta_step(order, len(plan), t, t_next)
                continue
            recent = known[-order:]
            weights = _interpolated_integral([time for time, _ in recent], t, t_next)
            past: dict[Key, float] = {index: w for (_, index), w in zip(recent[:-1], weights[:-1], strict=True)}
            plan.append(_step(t, {**past, NEW: weights[-1]}))
        return plan

    return plan_on


def searched(grid: Grid) -> list[Evaluation]:
    """The published searched solver whose own grid this is (arXiv 2505.21114)."""
    return multistep(SEARCHED[len(grid) - 1])


def multistep(table: SearchedTable, interval: Interval = EVERYWHERE) -> list[Evaluation]:
    """One evaluation a step, each step along a combination of all slopes so far; the last `table.refiner` ones are
    the refiner's, which reads the slope before. Where guidance begins or ends between the two, the refiner would read
    a velocity of the other kind, and the predictor is asked in its place.
    """
    grid = from_steps(table.steps)
    plan: list[Evaluation] = []
    for i, ((t, t_next), row) in enumerate(zip(_intervals(grid), table.rows, strict=True)):
        h = t_next - t
        past: dict[Key, float] = {j: h * c for j, c in enumerate(row) if c}
        step = replace(_step(t, {**past, NEW: h * (1 - sum(row))}), guided=interval.acts(t))
        if i >= len(grid) - 1 - table.refiner and plan[i - 1].guided == step.guided:
            step = replace(step, network="refiner", condition=i - 1, add=i - 1, block="R")
        plan.append(step)
    return plan


def searched_grid(steps: int) -> Grid:
    """Time points of the published table with `steps` evaluations."""
    if steps not in SEARCHED:
        raise RequestError(
            f"searched solver with {steps} steps",
            allowed=f"{min(SEARCHED)} to {max(SEARCHED)} steps (published tables)",
        )
    return from_steps(SEARCHED[steps].steps)


@dataclass(frozen=True)
class Solver:
    """A registered solver of fixed steps.

    Attributes:
        plan: grid → evaluations.
        grid: number of steps → its default grid.
        order: of convergence; 0 where the method has none in the classical sense.
        default_steps: used when the user names no number.
        own_grid: no other grid can be used.
    """

    plan: Callable[[Grid], list[Evaluation]]
    order: int
    default_steps: int
    grid: Callable[[int], Grid] = uniform
    own_grid: bool = False


@dataclass(frozen=True)
class StochasticSolver:
    """A registered solver that adds noise. `order` is its strong order."""

    plan: Callable[[Grid, Diffusion], list[Evaluation]]
    order: int
    default_steps: int


SOLVERS = {
    "euler": Solver(euler, 1, 25),
    "heun": Solver(heun, 2, 12),
    "ab2": Solver(adams_bashforth(2), 2, 12),
    "ab3": Solver(adams_bashforth(3), 3, 12),
    "ab4": Solver(adams_bashforth(4), 4, 16),
    "searched": Solver(searched, 0, 8, searched_grid, own_grid=True),
}
"""Fixed, deterministic steps."""

STOCHASTIC = {
    "sde-euler": StochasticSolver(euler_maruyama, 1, 250),
    "sde-heun": StochasticSolver(stochastic_heun, 1, 125),
}
"""Fixed steps with noise."""

CONTROLLED = {
    "dopri5": Rule(dopri5, "tolerance", 1e-3, least_nfe=(8, 7)),
    "dopri5-reference": Rule(dopri5_reference, "tolerance", 1e-3, joint=True),
}
"""Solvers that choose their own steps."""

RULES = {
    "norm": Rule(controllers.norm, "constant", 0.125),
    "lte": Rule(controllers.lte, "tolerance", 1e-2),
    "blocks": Rule(controllers.blocks, "tolerance", 1e-2, tries_refiner=True),
}
"""Step control for FlowTurbo's blocks, by the name that --adaptive takes."""


def _intervals(grid: Grid) -> list[tuple[float, float]]:
    return list(pairwise(grid))


def _step(t: float, update: Combination) -> Evaluation:
    """One evaluation at the start of a step, which ends the step."""
    return Evaluation("predictor", t, {BASE: 1.0}, {BASE: 1.0, **update})


def _runge_kutta_step(order: int, first: int, t: float, t_next: float) -> list[Evaluation]:
    h, table = t_next - t, RUNGE_KUTTA[order]
    plan = []
    for stage, (c, row) in enumerate(zip(table.c, table.a, strict=True)):
        point: dict[Key, float] = {BASE: 1.0, **{first + j: h * float(a) for j, a in enumerate(row) if a}}
        last = stage == order - 1
        past: dict[Key, float] = {first + j: h * float(b) for j, b in enumerate(table.b[:-1])}
        update: Combination | None = {BASE: 1.0, **past, NEW: h * float(table.b[-1])} if last else None
        plan.append(Evaluation("predictor", t + float(c) * h, point, update))
    return plan


def _interpolated_integral(times: Sequence[float], start: float, end: float) -> list[float]:
    """Weights w with Σ w·f(times) = ∫ of the polynomial through the f, from start to end: Adams on any grid."""
    h = end - start
    scaled = (np.asarray(times) - start) / h  # well conditioned, and the integral runs from 0 to 1
    powers = np.vander(scaled, increasing=True).T
    moments = 1.0 / np.arange(1, len(times) + 1)
    return [float(w) for w in h * np.linalg.solve(powers, moments)]
