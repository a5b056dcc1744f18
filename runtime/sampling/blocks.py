"""FlowTurbo's schedules: the grammar ``H1P5R3`` and the three blocks (arXiv 2409.18128, section 3)."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, cast

from runtime.sampling.grids import Grid, build_uniform_grid
from runtime.sampling.guidance import FULL_INTERVAL, GuidanceInterval
from runtime.sampling.plan import BASE, NEW, Evaluation
from runtime.system.errors import RequestError

Block = Literal["H", "P", "R"]
SCHEDULE_GRAMMAR = "blocks H (Heun), P (pseudo corrector) and R (refiner), each with a count, for example H1P5R3"
MAX_REFINER_STEP = 0.12
"""Largest step the released refiners were trained for."""


@dataclass(frozen=True)
class BlockSchedule:
    """Blocks in order, one per step.

    Attributes:
        blocks: for example ("H", "P", "P", "R").
        consistent: the variant of R whose second call reads the first refined velocity and which hands on the second.
    """

    blocks: tuple[Block, ...]
    consistent: bool = False

    @property
    def steps(self) -> int:
        return len(self.blocks)

    @property
    def needs_refiner(self) -> bool:
        return "R" in self.blocks

    def __str__(self) -> str:
        runs: list[tuple[str, int]] = []
        for block in self.blocks:
            runs.append((block, runs.pop()[1] + 1 if runs and runs[-1][0] == block else 1))
        return "".join(f"{block}{n}" for block, n in runs)


def is_schedule(text: str) -> bool:
    """Return whether the text is written in the grammar at all."""
    return re.fullmatch(r"([HPR][0-9]*)+", text.strip().upper()) is not None


def parse_schedule(text: str, *, force: bool = False, consistent: bool = False) -> BlockSchedule:
    """Parse ``H1P5R3``.

    Args:
        force: allow the orders that the paper shows to fail (a refiner step before a Heun or pseudo-corrector one).

    Raises:
        RequestError: the text is not a schedule, has no step, starts with R, or orders blocks in a way that fails.
    """
    if not re.fullmatch(r"([HPR][0-9]{1,4})+", text.strip().upper()):
        raise RequestError(f"schedule {text!r}", allowed=SCHEDULE_GRAMMAR)
    runs = re.findall(r"([HPR])([0-9]+)", text.strip().upper())
    total = sum(int(n) for _, n in runs)
    if not 1 <= total <= 1000:
        raise RequestError(f"schedule {text!r} has {total} steps", allowed="1 to 1000 steps in all")
    blocks = tuple(cast(Block, block) for block, n in runs for _ in range(int(n)))
    if blocks[0] == "R":
        raise RequestError(
            f"schedule {text!r} starts with a refiner step, which needs a velocity to refine",
            remedy="put H or P first, for example H1R3",
        )
    if not force and any(a == "R" and b != "R" for a, b in pairwise(blocks)):
        raise RequestError(
            f"schedule {text!r} has R before H or P, which FlowTurbo's paper shows to fail (FID 14 to 31)",
            allowed="all R blocks last",
            remedy="reorder it, or pass --force to try all the same",
        )
    return BlockSchedule(blocks, consistent)


def plan_flowturbo(
    schedule: BlockSchedule, grid: Grid | None = None, interval: GuidanceInterval = FULL_INTERVAL
) -> list[Evaluation]:
    """Return the evaluations of a schedule on `grid` (uniform if None): n blocks, n steps, n + 1 points.

    An H or P evaluation is guided where `interval` acts at its time, an R block where it acts at its start. The refiner
    is trained on velocities of one kind, guided or not. Where it would read one of the other kind, the predictor is
    evaluated once more at its start (one NFE, at most once per edge of the interval).
    """
    grid = build_uniform_grid(schedule.steps) if grid is None else grid
    if len(grid) != schedule.steps + 1:
        raise RequestError(
            f"{len(grid)} time points for {schedule.steps} blocks", allowed=f"{schedule.steps + 1} points"
        )
    steps = [b - a for block, a, b in zip(schedule.blocks, grid[:-1], grid[1:], strict=True) if block == "R"]
    if steps and max(steps) > MAX_REFINER_STEP:
        warnings.warn(
            f"refiner steps of {max(steps):.3f} in {schedule} are longer than the {MAX_REFINER_STEP} refiners are "
            "trained for; use more blocks",
            stacklevel=2,
        )
    plan: list[Evaluation] = []
    slope: int | None = None
    for block, t, t_next in zip(schedule.blocks, grid[:-1], grid[1:], strict=True):
        if block == "R" and slope is not None:
            guided = interval.is_active(t)
            if plan[slope].guided != guided:
                plan.append(Evaluation("predictor", t, {BASE: 1.0}, block=block, guided=guided))
                slope = len(plan) - 1
            evaluations, slope = plan_refiner_block(len(plan), t, t_next, slope, schedule.consistent)
            plan += [replace(evaluation, guided=guided) for evaluation in evaluations]
            continue
        evaluations, slope = (
            plan_heun_block(len(plan), t, t_next, block)
            if block == "H" or slope is None
            else plan_pseudo_block(len(plan), t, t_next, slope)
        )
        plan += [replace(evaluation, guided=interval.is_active(evaluation.t)) for evaluation in evaluations]
    return plan


# A block function takes the index of its first evaluation, the start and end of the step and the slope handed to it,
# and returns its evaluations and the slope that it hands on.


def plan_heun_block(first_index: int, t: float, t_next: float, block: str = "H") -> tuple[list[Evaluation], int]:
    """Plan Heun's step: slopes at both ends, hands on the second. A leading P, without a slope yet, is the same."""
    h = t_next - t
    return [
        Evaluation("predictor", t, {BASE: 1.0}, block=block),
        Evaluation(
            "predictor",
            t_next,
            {BASE: 1.0, first_index: h},
            {BASE: 1.0, first_index: h / 2, NEW: h / 2},
            {first_index: -h / 2, NEW: h / 2},
            block=block,
        ),
    ], first_index + 1


def plan_pseudo_block(first_index: int, t: float, t_next: float, slope: int) -> tuple[list[Evaluation], int]:
    """Plan a pseudo corrector (algorithm 2): the incoming slope replaces the one at the start; one evaluation.

    The incoming slope was taken at the predicted, not the corrected, point of this time; the trapezoid keeps order
    two on any grid all the same (the difference telescopes).
    """
    h = t_next - t
    return [
        Evaluation(
            "predictor",
            t_next,
            {BASE: 1.0, slope: h},
            {BASE: 1.0, slope: h / 2, NEW: h / 2},
            {slope: -h / 2, NEW: h / 2},
            block="P",
        )
    ], first_index


def plan_refiner_block(
    first_index: int, t: float, t_next: float, slope: int, consistent: bool = False
) -> tuple[list[Evaluation], int]:
    """Plan a refiner step as in the released code: both calls read the incoming v, the second is added to the first.

    d = refiner(x, v, t) + v; d' = refiner(x + h·d, v, t + h) + d; x += h/2·(d + d'); hands on d.
    """
    h = t_next - t
    return [
        Evaluation("refiner", t, {BASE: 1.0}, condition=slope, add=slope, block="R"),
        Evaluation(
            "refiner",
            t_next,
            {BASE: 1.0, first_index: h},
            {BASE: 1.0, first_index: h / 2, NEW: h / 2},
            {first_index: -h / 2, NEW: h / 2},
            condition=first_index if consistent else slope,
            add=first_index,
            block="R",
        ),
    ], first_index + 1 if consistent else first_index
