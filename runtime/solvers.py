"""Solvers: each a short function from a time grid to the evaluations of a trajectory, and the registry of their names.

A new solver is one such function and one line of `SOLVERS`; the command line, the pipeline and the tests find it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from runtime.errors import RequestError
from runtime.grids import Grid, from_steps, uniform
from runtime.plan import BASE, NEW, Combination, Evaluation, check_history
from runtime.schedule import flowturbo_plan, heun_block, parse_schedule
from runtime.tables import RUNGE_KUTTA, SEARCHED


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
            past: dict[str | int, float] = {index: w for (_, index), w in zip(recent[:-1], weights[:-1], strict=True)}
            plan.append(_step(t, {**past, NEW: weights[-1]}))
        return plan

    return plan_on


def searched(grid: Grid) -> list[Evaluation]:
    """The published searched solver whose own grid this is (arXiv 2505.21114)."""
    table = SEARCHED[len(grid) - 1]
    plan = []
    for (t, t_next), row in zip(_intervals(grid), table.rows, strict=True):
        h = t_next - t
        past: dict[str | int, float] = {j: h * c for j, c in enumerate(row) if c}
        plan.append(_step(t, {**past, NEW: h * (1 - sum(row))}))
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
    """A registered solver.

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


SOLVERS = {
    "euler": Solver(euler, 1, 25),
    "heun": Solver(heun, 2, 12),
    "ab2": Solver(adams_bashforth(2), 2, 12),
    "ab3": Solver(adams_bashforth(3), 3, 12),
    "ab4": Solver(adams_bashforth(4), 4, 16),
    "searched": Solver(searched, 0, 8, searched_grid, own_grid=True),
}

FLOWTURBO = "flowturbo"
"""Name of the solver that a schedule string describes."""


@dataclass(frozen=True)
class Sampler:
    """A resolved sampler: its evaluations and the name that reports and pictures carry."""

    name: str
    plan: tuple[Evaluation, ...]

    def __post_init__(self) -> None:
        check_history(self.plan)

    @property
    def needs_refiner(self) -> bool:
        return any(evaluation.network == "refiner" for evaluation in self.plan)


def resolve_sampler(
    schedule: str | None = None,
    solver: str | None = None,
    steps: int | None = None,
    grid: Grid | None = None,
    *,
    force: bool = False,
) -> Sampler:
    """The sampler that a request names: a schedule string, or a solver and a number of steps.

    Raises:
        RequestError: both or neither are given, a name is unknown, or the solver cannot take these steps or this grid.
    """
    if (schedule is None) == (solver in (None, FLOWTURBO)) and not (schedule and solver == FLOWTURBO):
        raise RequestError(
            f"schedule {schedule!r} and solver {solver!r}",
            allowed="a schedule (for flowturbo) or a solver with --steps, not both and not neither",
        )
    if schedule is not None:
        parsed = parse_schedule(schedule, force=force)
        if steps is not None and steps != parsed.steps:
            raise RequestError(
                f"schedule {schedule} has {parsed.steps} steps, --steps is {steps}", remedy="leave --steps out"
            )
        return Sampler(str(parsed), tuple(flowturbo_plan(parsed, grid)))
    assert solver is not None
    if solver not in SOLVERS:
        raise RequestError(f"solver {solver!r}", allowed=", ".join([FLOWTURBO, *SOLVERS]))
    method = SOLVERS[solver]
    if grid is not None and method.own_grid:
        raise RequestError(f"a time grid for {solver}, which has its own", remedy="leave the grid out")
    steps = len(grid) - 1 if grid is not None else method.default_steps if steps is None else steps
    return Sampler(f"{solver}-{steps}", tuple(method.plan(grid if grid is not None else method.grid(steps))))


def _intervals(grid: Grid) -> list[tuple[float, float]]:
    return list(pairwise(grid))


def _step(t: float, update: Combination) -> Evaluation:
    """One evaluation at the start of a step, which ends the step."""
    return Evaluation("predictor", t, {BASE: 1.0}, {BASE: 1.0, **update})


def _runge_kutta_step(order: int, first: int, t: float, t_next: float) -> list[Evaluation]:
    h, table = t_next - t, RUNGE_KUTTA[order]
    plan = []
    for stage, (c, row) in enumerate(zip(table.c, table.a, strict=True)):
        point: dict[str | int, float] = {BASE: 1.0, **{first + j: h * float(a) for j, a in enumerate(row) if a}}
        last = stage == order - 1
        past: dict[str | int, float] = {first + j: h * float(b) for j, b in enumerate(table.b[:-1])}
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
