"""Samplers that choose their own steps: one loop over a `Step`, which makes a trial, and a controller of its length.

The loop is a generator for one image: it yields evaluations and receives their feedback (`plan.AdaptiveSteps`).
`execution/adaptive_loop.py` runs the generators of a batch together, `plan.integrate` runs one in plain arithmetic.
Every sampler lands exactly on the end of time, puts a step end on every edge of the guidance interval, starts anew
there, and never uses more evaluations than it may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Literal

from runtime.sampling.blocks import MAX_REFINER_STEP, plan_heun_block, plan_pseudo_block, plan_refiner_block
from runtime.sampling.controllers import Accepts, Controller, Floats, Journal, StepControl, StepSession
from runtime.sampling.plan import BASE, NEW, AdaptiveSteps, Evaluation, Feedback, TermKey
from runtime.system.errors import RequestError


@dataclass(frozen=True)
class Slope:
    """A slope in the history: the flow time that it belongs to, and the number of its evaluation."""

    t: float
    index: int


Slopes = tuple[Slope, ...]
"""Slopes that a step may start from, the newest last; empty where none is known."""


@dataclass(frozen=True)
class Trial:
    """A step that was tried.

    Attributes:
        feedback: of the evaluation that carries the error.
        is_accepted: whether it was taken.
        slopes: for the next step if it was, for the next trial of the same step if not.
    """

    feedback: Feedback
    is_accepted: bool
    slopes: Slopes


TrialGenerator = Generator[Evaluation, Feedback, Trial]


@dataclass(frozen=True)
class Step:
    """A way to make one step.

    Attributes:
        attempt: tries a step from slopes and its start to its end.
        nfe: most evaluations of one trial.
        error_order: k of an error estimate that goes with h^k.
        max_growth: longest step over the one before it in the same segment.
        needs_slope: it starts from a slope; otherwise it can evaluate its own.
        finisher: takes the equal steps of a budget that runs short; None for the step itself.
    """

    attempt: Callable[[StepSession, Slopes, float, float, Accepts], TrialGenerator]
    nfe: int
    error_order: int = 2
    max_growth: float = math.inf
    needs_slope: bool = True
    finisher: Step | None = None


def take_steps(session: StepSession, step: Step, controller: Controller) -> AdaptiveSteps:
    """Integrate one image from one end of time to the other."""
    finisher = step.finisher or step
    for segment in session.segments:
        session.guided = segment.guided
        t = segment.start
        slopes: Slopes = ()
        h_before = math.inf
        equal_ends: list[float] = []  # of the steps that finish the segment when the evaluations run short
        while t != segment.end:
            if step.needs_slope and not slopes:
                slopes = yield from _evaluate_slope(session, controller, t)
            if not equal_ends and session.is_budget_low(
                segment, t, controller.h, trial_nfe=step.nfe, equal_step_nfe=finisher.nfe
            ):
                slopes = slopes or (yield from _evaluate_slope(session, controller, t))
                equal_ends = session.plan_equal_steps(segment, t, finisher.nfe)
            if equal_ends:
                t_next = equal_ends.pop(0)
                trial = yield from finisher.attempt(session, slopes, t, t_next, lambda error: True)
            else:
                h = min(controller.h, step.max_growth * h_before)
                t_next = session.choose_trial_end(segment, t, h)
                trial = yield from step.attempt(session, slopes, t, t_next, controller.is_acceptable)
                controller.update(abs(t_next - t), trial.feedback, is_accepted=trial.is_accepted)
            slopes = trial.slopes
            if trial.is_accepted:
                h_before, t = abs(t_next - t), t_next
    return None


def _evaluate_slope(session: StepSession, controller: Controller, t: float) -> Generator[Evaluation, Feedback, Slopes]:
    slope = Slope(t, session.next_index)
    yield from controller.start(session, t)
    return (slope,)


def _try_pseudo(session: StepSession, slopes: Slopes, t: float, t_next: float, accepts: Accepts) -> TrialGenerator:
    """Try a pseudo corrector: error h/2·(d_new − d_old), one evaluation.

    The estimate is that of the Euler step inside, so the trapezoid that is taken is better than the tolerance says
    (local extrapolation): the error at the end goes with the tolerance.
    """
    slope = Slope(t_next, session.next_index)
    evaluations, _ = plan_pseudo_block(slope.index, t, t_next, slopes[-1].index)
    feedback, is_accepted = yield from session.try_step(evaluations, t, t_next, accepts)
    return Trial(feedback, is_accepted, (slope,) if is_accepted else slopes)


def _try_heun(session: StepSession, slopes: Slopes, t: float, t_next: float, accepts: Accepts) -> TrialGenerator:
    """Try Heun's step from a slope at its very start; it hands no slope on, so each step evaluates one at its start."""
    _, trapezoid = plan_heun_block(slopes[-1].index, t, t_next)[0]
    feedback, is_accepted = yield from session.try_step([trapezoid], t, t_next, accepts)
    return Trial(feedback, is_accepted, () if is_accepted else slopes)


def _try_adams(session: StepSession, slopes: Slopes, t: float, t_next: float, accepts: Accepts) -> TrialGenerator:
    """Try a step of Adams–Bashforth 2 after a first pseudo-corrector step; one evaluation, at the end of the step.

    The error is the difference to the trapezoid over the same step, which has order two as well (Milne): it goes with
    h³. With r the step over the one before, x' = x + h·((1 + r/2)·d − r/2·d_before).
    """
    if len(slopes) < 2:
        trial = yield from _try_pseudo(session, slopes, t, t_next, accepts)
        return replace(trial, slopes=(*slopes, *trial.slopes)) if trial.is_accepted else trial
    before, start = slopes
    h, end = t_next - t, Slope(t_next, session.next_index)
    ratio = h / (start.t - before.t)
    update: dict[TermKey, float] = {BASE: 1.0, start.index: h * (1 + ratio / 2), before.index: -h * ratio / 2}
    error: dict[TermKey, float] = {start.index: -h * (1 + ratio) / 2, before.index: h * ratio / 2, NEW: h / 2}
    evaluation = Evaluation("predictor", t_next, update, update, error, block="AB2")
    feedback, is_accepted = yield from session.try_step([evaluation], t, t_next, accepts)
    return Trial(feedback, is_accepted, (start, end) if is_accepted else slopes)


def _try_blocks(session: StepSession, slopes: Slopes, t: float, t_next: float, accepts: Accepts) -> TrialGenerator:
    """Try the cheapest block first: R, then P, then H, and take the first with an error inside the tolerance.

    R is only tried where it is as short as refiners are trained for. R and P need a slope that was handed on.
    """
    slope = slopes[-1].index if slopes else -1
    can_refine = session.control.refiner and abs(t_next - t) <= MAX_REFINER_STEP + 1e-9
    feedbacks = []
    for block in ("H",) if not slopes else ("R", "P", "H") if can_refine else ("P", "H"):
        first_index = session.next_index
        if block == "H":
            evaluations, next_slope = plan_heun_block(first_index, t, t_next)
        else:
            plan_block = plan_refiner_block if block == "R" else plan_pseudo_block
            evaluations, next_slope = plan_block(first_index, t, t_next, slope)
        retained = () if block == "H" else (slope,)
        feedback, is_accepted = yield from session.try_step(evaluations, t, t_next, accepts, retained)
        feedbacks.append(feedback)
        if is_accepted:
            return Trial(feedback, is_accepted, (Slope(t_next, next_slope),))
    # The first evaluation of the Heun block is a fresh slope at this very point.
    return Trial(min(feedbacks, key=lambda f: f.error), False, (Slope(t, session.next_index - 2),))


PSEUDO_STEP = Step(_try_pseudo, nfe=1)
HEUN_STEP = Step(_try_heun, nfe=2)
ADAMS_STEP = Step(_try_adams, nfe=1, error_order=3, max_growth=2.0)  # else extrapolation ruins it where rms(v) is small
BLOCK_STEP = Step(_try_blocks, nfe=5, needs_slope=False, finisher=PSEUDO_STEP)


@dataclass(frozen=True)
class AdaptiveSolver:
    """A registered sampler that chooses its own steps.

    Attributes:
        steps: makes the generator of one image from what it may do, its journal and its noise [C, H, W].
        parameter: the field of `StepControl` that says how fine its steps are.
        default: of that field.
        tries_refiner: it uses a refiner where there is one.
        is_joint: one generator steers a whole batch, both branches of every image, as the reference does.
        min_nfe: least evaluations of the first segment of time, and of every further one.
    """

    steps: Callable[[StepControl, Journal, Floats], AdaptiveSteps]
    parameter: Literal["tolerance", "constant"]
    default: float
    tries_refiner: bool = False
    is_joint: bool = False
    min_nfe: tuple[int, int] = (2, 2)

    def check_budget(self, control: StepControl) -> None:
        """Check that the evaluations are enough for one step in every segment of time.

        Raises:
            RequestError: they are not, or there are too many.
        """
        first_nfe, later_nfe = self.min_nfe
        minimum = first_nfe + later_nfe * (len(control.interval.split_segments()) - 1)
        if not minimum <= control.max_nfe <= 100_000:
            raise RequestError(
                f"at most {control.max_nfe} evaluations",
                allowed=f"{minimum} to 100000: a slope and a step between any two edges of the guidance interval",
            )


def make_steps(
    step: Step, make_controller: Callable[[StepControl, int, Floats], Controller]
) -> Callable[[StepControl, Journal, Floats], AdaptiveSteps]:
    """Join a step and a controller into what `AdaptiveSolver` holds."""

    def start_steps(control: StepControl, journal: Journal, noise: Floats) -> AdaptiveSteps:
        controller = make_controller(control, step.error_order, noise)
        return take_steps(StepSession(control, journal, controller.scale), step, controller)

    return start_steps
