"""Solvers: each a short function from a time grid to the evaluations of a trajectory, and the registries of names.

A new solver is one such function and one line of `SOLVERS` (fixed steps), `STOCHASTIC_SOLVERS` (with noise),
`ADAPTIVE_SOLVERS` or `ADAPTIVE_RULES` (steps that depend on the error); the command line, the pipeline and the tests
find it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from runtime.sampling.adaptive import ADAMS_STEP, BLOCK_STEP, HEUN_STEP, PSEUDO_STEP, AdaptiveSolver, make_steps
from runtime.sampling.blocks import plan_heun_block
from runtime.sampling.controllers import ElementaryController, NormController, PIController
from runtime.sampling.dopri5 import DOPRI5_STEP, step_dopri5_reference
from runtime.sampling.grids import Grid, build_grid_from_steps, build_uniform_grid
from runtime.sampling.guidance import FULL_INTERVAL, GuidanceInterval
from runtime.sampling.plan import BASE, NEW, Combination, Evaluation, TermKey
from runtime.sampling.sde import Diffusion, plan_euler_maruyama, plan_stochastic_heun
from runtime.sampling.tableaus import RUNGE_KUTTA, SEARCHED_TABLES, MultistepTable
from runtime.system.errors import RequestError


def plan_euler(grid: Grid) -> list[Evaluation]:
    """Plan Euler steps: order 1, one evaluation a step."""
    return [_plan_step(t, {NEW: t_next - t}) for t, t_next in pairwise(grid)]


def plan_heun(grid: Grid) -> list[Evaluation]:
    """Plan Heun steps: order 2, two evaluations a step, SiT's `heun2`."""
    plan: list[Evaluation] = []
    for t, t_next in pairwise(grid):
        plan += plan_heun_block(len(plan), t, t_next, block="heun")[0]
    return plan


def make_adams_bashforth(order: int) -> Callable[[Grid], list[Evaluation]]:
    """Return the Adams–Bashforth method of an order on any grid: one evaluation a step after a Runge–Kutta start."""

    def plan_on(grid: Grid) -> list[Evaluation]:
        plan: list[Evaluation] = []
        slopes: list[tuple[float, int]] = []  # time and index of the slopes at step ends
        for t, t_next in pairwise(grid):
            slopes.append((t, len(plan)))
            if len(slopes) < order:
                plan += _plan_runge_kutta_step(order, len(plan), t, t_next)
                continue
            recent_slopes = slopes[-order:]
            weights = _integrate_interpolant([time for time, _ in recent_slopes], t, t_next)
            past_weights: dict[TermKey, float] = {
                index: w for (_, index), w in zip(recent_slopes[:-1], weights[:-1], strict=True)
            }
            plan.append(_plan_step(t, {**past_weights, NEW: weights[-1]}))
        return plan

    return plan_on


def plan_searched(grid: Grid) -> list[Evaluation]:
    """Plan the published searched solver with this grid (arXiv 2505.21114)."""
    return plan_multistep(SEARCHED_TABLES[len(grid) - 1])


def plan_multistep(table: MultistepTable, interval: GuidanceInterval = FULL_INTERVAL) -> list[Evaluation]:
    """Plan one evaluation a step, each step along a combination of all slopes so far.

    The last `table.num_refiner_steps` evaluations are the refiner's, which reads the slope before. Where guidance
    begins or ends between the two, the refiner would read a velocity of the other kind, and the predictor replaces it.
    """
    grid = build_grid_from_steps(table.step_sizes)
    plan: list[Evaluation] = []
    for i, ((t, t_next), row) in enumerate(zip(pairwise(grid), table.coefficients, strict=True)):
        h = t_next - t
        past_weights: dict[TermKey, float] = {j: h * c for j, c in enumerate(row) if c}
        step = replace(_plan_step(t, {**past_weights, NEW: h * (1 - sum(row))}), guided=interval.is_active(t))
        if i >= len(grid) - 1 - table.num_refiner_steps and plan[i - 1].guided == step.guided:
            step = replace(step, network="refiner", condition=i - 1, add=i - 1, block="R")
        plan.append(step)
    return plan


def build_searched_grid(steps: int) -> Grid:
    """Return the time points of the published table with `steps` evaluations."""
    if steps not in SEARCHED_TABLES:
        raise RequestError(
            f"searched solver with {steps} steps",
            allowed=f"{min(SEARCHED_TABLES)} to {max(SEARCHED_TABLES)} steps (published tables)",
        )
    return build_grid_from_steps(SEARCHED_TABLES[steps].step_sizes)


@dataclass(frozen=True)
class Solver:
    """A registered solver of fixed steps.

    Attributes:
        plan: grid → evaluations.
        grid: number of steps → its default grid.
        order: of convergence; 0 where the method has none in the classical sense.
        default_steps: used when the user names no number.
        has_own_grid: no other grid can be used.
    """

    plan: Callable[[Grid], list[Evaluation]]
    order: int
    default_steps: int
    grid: Callable[[int], Grid] = build_uniform_grid
    has_own_grid: bool = False


@dataclass(frozen=True)
class StochasticSolver:
    """A registered solver that adds noise. `order` is its strong order."""

    plan: Callable[[Grid, Diffusion], list[Evaluation]]
    order: int
    default_steps: int


SOLVERS = {
    "euler": Solver(plan_euler, 1, 25),
    "heun": Solver(plan_heun, 2, 12),
    "ab2": Solver(make_adams_bashforth(2), 2, 12),
    "ab3": Solver(make_adams_bashforth(3), 3, 12),
    "ab4": Solver(make_adams_bashforth(4), 4, 16),
    "searched": Solver(plan_searched, 0, 8, build_searched_grid, has_own_grid=True),
}
"""Fixed, deterministic steps."""

STOCHASTIC_SOLVERS = {
    "sde-euler": StochasticSolver(plan_euler_maruyama, 1, 250),
    "sde-heun": StochasticSolver(plan_stochastic_heun, 1, 125),
}
"""Fixed steps with noise."""

ADAPTIVE_SOLVERS = {
    "dopri5": AdaptiveSolver(make_steps(DOPRI5_STEP, ElementaryController), "tolerance", 1e-3, min_nfe=(8, 7)),
    "dopri5-reference": AdaptiveSolver(step_dopri5_reference, "tolerance", 1e-3, is_joint=True),
}
"""Solvers that choose their own steps."""

ADAPTIVE_RULES = {
    "norm": AdaptiveSolver(make_steps(PSEUDO_STEP, NormController), "constant", 0.125),
    "norm-ab2": AdaptiveSolver(make_steps(ADAMS_STEP, NormController), "constant", 0.125),
    "lte": AdaptiveSolver(make_steps(PSEUDO_STEP, PIController), "tolerance", 1e-2),
    "lte-heun": AdaptiveSolver(make_steps(HEUN_STEP, PIController), "tolerance", 1e-2),
    "lte-ab2": AdaptiveSolver(make_steps(ADAMS_STEP, PIController), "tolerance", 1e-2),
    "blocks": AdaptiveSolver(make_steps(BLOCK_STEP, PIController), "tolerance", 1e-2, tries_refiner=True),
}
"""A controller and a step, by the name that --adaptive takes: P steps where the name says no other."""


def _plan_step(t: float, update: Combination) -> Evaluation:
    return Evaluation("predictor", t, {BASE: 1.0}, {BASE: 1.0, **update})


def _plan_runge_kutta_step(order: int, first_index: int, t: float, t_next: float) -> list[Evaluation]:
    h, table = t_next - t, RUNGE_KUTTA[order]
    plan = []
    for stage, (c, row) in enumerate(zip(table.c, table.a, strict=True)):
        point: dict[TermKey, float] = {BASE: 1.0, **{first_index + j: h * float(a) for j, a in enumerate(row) if a}}
        is_last = stage == order - 1
        past_weights: dict[TermKey, float] = {first_index + j: h * float(b) for j, b in enumerate(table.b[:-1])}
        update: Combination | None = {BASE: 1.0, **past_weights, NEW: h * float(table.b[-1])} if is_last else None
        plan.append(Evaluation("predictor", t + float(c) * h, point, update))
    return plan


def _integrate_interpolant(times: Sequence[float], start: float, end: float) -> list[float]:
    """Return weights w with Σ w·f(times) = ∫ of the polynomial through the f, from start to end."""
    h = end - start
    scaled = (np.asarray(times) - start) / h  # well conditioned, and the integral runs from 0 to 1
    powers = np.vander(scaled, increasing=True).T
    moments = 1.0 / np.arange(1, len(times) + 1)
    return [float(w) for w in h * np.linalg.solve(powers, moments)]
