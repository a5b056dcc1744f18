"""How long a step is: controllers that watch the error of their steps. Each is a short generator for one image.

A controller yields evaluations (`plan.Steps`), is told the error and the size of each slope, and writes what it did
into a `Journal`. The loop that runs them (`adaptive_loop.py`) does the batching; `plan.integrate` runs one in
plain arithmetic. All of them land exactly on the end of time, put a step end on every edge of the guidance interval,
where they start anew, and never use more evaluations than they may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.sampling.blocks import MAX_REFINER_STEP, plan_heun_block, plan_pseudo_block, plan_refiner_block
from runtime.sampling.guidance import FULL_INTERVAL, GuidanceInterval, GuidanceSegment
from runtime.sampling.plan import BASE, AdaptiveSteps, Evaluation, Feedback
from runtime.system.errors import RequestError

SAFETY, GROWTH, SHRINK = 0.9, 3.0, 0.2
INTEGRAL, PROPORTIONAL = 0.35, 0.2
"""PI control (Gustafsson 1991) for an error of order h²: h' = 0.9·h·E^(−0.35)·E_prev^0.2."""
MAX_NFE = 1000


@dataclass(frozen=True)
class StepControl:
    """What a controller may do.

    Attributes:
        tolerance: of the error of a step, relative to 1 + |x|.
        constant: C of the norm rule, step = C / rms(v).
        max_nfe: evaluations of both networks, at most; when they run short the rest is taken in equal steps.
        first_step: length of the first step tried, None to let the controller choose.
        interval: where guidance acts.
        refiner: whether there is one to try.
        backwards: from data to noise.
    """

    tolerance: float = 1e-2
    constant: float = 0.125
    max_nfe: int = MAX_NFE
    first_step: float | None = None
    interval: GuidanceInterval = FULL_INTERVAL
    refiner: bool = False
    backwards: bool = False

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("tolerance", self.tolerance, 1e-6, 10.0),
            ("constant", self.constant, 1e-3, 10.0),
            ("first step", self.first_step if self.first_step is not None else 1.0, 1e-6, 1.0),
        ):
            if not low <= value <= high:
                raise RequestError(f"{name} {value:g}", allowed=f"{low:g} to {high:g}")


@dataclass(frozen=True)
class PathStep:
    """One step that was tried.

    Attributes:
        t, dt: where it started and its length; negative backwards.
        block: H, P, R or the method's name.
        error: in units of the tolerance; of the norm rule, rms in units of the latents; None where none is estimated.
        accepted: whether it was kept.
    """

    t: float
    dt: float
    block: str
    error: float | None
    accepted: bool


@dataclass
class Journal:
    """What happened to one image.

    Attributes:
        steps: tried, in order.
        nfe: evaluations by network.
        unguided_nfe: the predictor's outside the guidance interval.
        is_budget_limited: the evaluations ran short, and the rest was taken in equal steps.
    """

    steps: list[PathStep] = field(default_factory=list)
    nfe: dict[str, int] = field(default_factory=lambda: {"predictor": 0, "refiner": 0})
    unguided_nfe: int = 0
    is_budget_limited: bool = False

    @property
    def total_nfe(self) -> int:
        return sum(self.nfe.values())

    @property
    def accepted(self) -> list[PathStep]:
        return [step for step in self.steps if step.accepted]

    @property
    def rejected(self) -> int:
        return len(self.steps) - len(self.accepted)


FeedbackGenerator = Generator[Evaluation, Feedback, Feedback]
Floats = NDArray[Any]


class StepSession:
    """The side of a controller that talks to the loop: counts evaluations, names slopes, remembers what to undo."""

    def __init__(self, control: StepControl, journal: Journal) -> None:
        self.control, self.journal = control, journal
        self.next_index = 0
        self.guided = True
        self.scale = (control.tolerance, control.tolerance)
        self._undo = False

    def evaluate(self, evaluations: Sequence[Evaluation], retained: tuple[int, ...] = ()) -> FeedbackGenerator:
        """Evaluates a block; the feedback of its last evaluation, which carries the error."""
        feedback = Feedback(0.0, 0.0)
        for evaluation in evaluations:
            feedback = yield replace(
                evaluation,
                guided=self.guided,
                scale=self.scale,
                undo=self._undo,
                retained=tuple(name for name in retained if name < self.next_index),
            )
            self._undo = False
            self.next_index += 1
            self.journal.nfe[evaluation.network] += 1
            self.journal.unguided_nfe += evaluation.network == "predictor" and not self.guided
        return feedback

    def evaluate_slope(self, t: float) -> FeedbackGenerator:
        """Asks the predictor at the base."""
        return self.evaluate([Evaluation("predictor", t, {BASE: 1.0}, block="H")])

    def record_step(self, t: float, t_next: float, block: str, error: float | None, *, accepted: bool) -> bool:
        """Notes a step, and takes it back if it is not accepted."""
        self.journal.steps.append(PathStep(t, t_next - t, block, error, accepted))
        self._undo = not accepted
        return accepted

    def count_remaining(self) -> int:
        """Evaluations that may still be made."""
        return self.control.max_nfe - self.journal.total_nfe

    def is_budget_low(
        self, segment: GuidanceSegment, t: float, h: float, *, trial_cost: int = 1, step_cost: int = 1
    ) -> bool:
        """Whether it is time to finish in equal steps: one more trial would leave too few evaluations to finish at
        all; or they are in their last quarter and would not do for steps of h.

        Args:
            trial_cost: evaluations of one more trial.
            step_cost: evaluations of one equal step.
        """
        if self.count_remaining() < trial_cost + self._count_needed(segment, step_cost):
            return True
        num_steps = abs(self._end_time - t) / h
        return self.count_remaining() <= self.control.max_nfe // 4 and num_steps * step_cost > self.count_remaining()

    def plan_equal_steps(self, segment: GuidanceSegment, t: float, step_cost: int = 1) -> list[float]:
        """Ends of the equal steps that finish a stretch, with its share of the evaluations that are left."""
        self.journal.is_budget_limited = True
        available = self.count_remaining() - self._count_needed(segment, step_cost) + step_cost
        num_evaluations = available * abs(segment.end - t) / abs(self._end_time - t)
        num_steps = max(1, min(available, round(num_evaluations)) // step_cost)
        return [*(t + (segment.end - t) * i / num_steps for i in range(1, num_steps)), segment.end]

    @property
    def _end_time(self) -> float:
        return 0.0 if self.control.backwards else 1.0

    def _count_needed(self, segment: GuidanceSegment, step_cost: int) -> int:
        """Evaluations that finishing takes at least: a step here, a slope and a step in every later stretch."""
        segments = self.control.interval.split_segments(backwards=self.control.backwards)
        return step_cost + (1 + step_cost) * (len(segments) - 1 - segments.index(segment))


class PIController:
    """PI control of the step size, over the error's size in units of the tolerance."""

    def __init__(self, first_step: float) -> None:
        self.h = first_step
        self._previous = 1.0
        self._rejected = False

    def accept(self, h: float, error: float) -> None:
        """The next step, after one of length h that was kept; no longer than h if one was given up before it."""
        error = max(error, 1e-10)
        factor = SAFETY * error**-INTEGRAL * self._previous**PROPORTIONAL
        self.h = abs(h) * min(1.0 if self._rejected else GROWTH, max(SHRINK, factor))
        self._previous, self._rejected = error, False

    def reject(self, h: float, error: float) -> None:
        """A shorter step, after one of length h that was given up."""
        self.h = abs(h) * min(0.8, max(SHRINK, SAFETY * error**-0.5))
        self._rejected = True


def choose_trial_end(session: StepSession, segment: GuidanceSegment, t: float, h: float) -> float:
    """Where the next trial ends: as `choose_step_end`, but a first step that the user named is taken at its word."""
    first_step = session.control.first_step
    if first_step is not None and not session.journal.steps:
        remaining = segment.end - t
        return segment.end if first_step >= abs(remaining) else t + math.copysign(first_step, remaining)
    return choose_step_end(t, h, segment.end)


def choose_step_end(t: float, h: float, end: float) -> float:
    """Where a step of about h ends: exactly on `end` if that is near, and no tiny step is left before it."""
    remaining = abs(end - t)
    if h >= remaining * (1 - 1e-6):
        return end
    return t + math.copysign(remaining / 2 if 2 * h > remaining else h, end - t)


def step_lte(control: StepControl, journal: Journal, noise: Floats | None = None) -> AdaptiveSteps:
    """Steps as long as the pseudo corrector's error estimate allows: e = h/2·(d_new − d_old), one evaluation each.

    The estimate is that of the Euler step inside, so the trapezoid that is kept is better than the tolerance says
    (local extrapolation): the error at the end goes with the tolerance.
    """
    session, controller = StepSession(control, journal), PIController(_choose_first_step(control))
    for segment in control.interval.split_segments(backwards=control.backwards):
        session.guided = segment.guided
        slope: int | None = None
        t = segment.start
        while t != segment.end:
            if slope is None:
                slope = session.next_index
                yield from session.evaluate_slope(t)
            if session.is_budget_low(segment, t, controller.h):
                yield from _finish_in_equal_steps(session, segment, t, slope)
                break
            t_next = choose_trial_end(session, segment, t, controller.h)
            block, _ = plan_pseudo_block(session.next_index, t, t_next, slope)
            first_index = session.next_index
            feedback = yield from session.evaluate(block)
            if session.record_step(t, t_next, "P", feedback.error, accepted=feedback.error <= 1.0):
                controller.accept(t_next - t, feedback.error)
                t, slope = t_next, first_index
            else:
                controller.reject(t_next - t, feedback.error)
    return None


def step_norm(control: StepControl, journal: Journal, noise: Floats | None = None) -> AdaptiveSteps:
    """The owner's rule: steps of C / rms(v), v the slope at their start. Pseudo-corrector steps, none is given up."""
    session = StepSession(control, journal)
    session.scale = (1.0, 0.0)
    for segment in control.interval.split_segments(backwards=control.backwards):
        session.guided = segment.guided
        slope = session.next_index
        t = segment.start
        feedback = yield from session.evaluate_slope(t)
        while t != segment.end:
            h = control.constant / max(feedback.slope_rms, 1e-6)
            if session.is_budget_low(segment, t, h):
                yield from _finish_in_equal_steps(session, segment, t, slope)
                break
            t_next = choose_trial_end(session, segment, t, h)
            block, _ = plan_pseudo_block(session.next_index, t, t_next, slope)
            slope = session.next_index
            feedback = yield from session.evaluate(block)
            session.record_step(t, t_next, "P", feedback.error, accepted=True)
            t = t_next
    return None


def step_blocks(control: StepControl, journal: Journal, noise: Floats | None = None) -> AdaptiveSteps:
    """Tries the cheapest block first: R, then P, then H, and keeps the first whose error is inside the tolerance.

    A refiner step is only tried where it is as short as refiners are trained for, and after a slope was handed on.
    """
    session, controller = StepSession(control, journal), PIController(_choose_first_step(control))
    for segment in control.interval.split_segments(backwards=control.backwards):
        session.guided = segment.guided
        slope: int | None = None
        t = segment.start
        while t != segment.end:
            if session.is_budget_low(segment, t, controller.h, trial_cost=_BLOCK_TRIAL_NFE):
                if slope is None:
                    slope = session.next_index
                    yield from session.evaluate_slope(t)
                yield from _finish_in_equal_steps(session, segment, t, slope)
                break
            t_next = choose_trial_end(session, segment, t, controller.h)
            error, slope_next = yield from _try_blocks(session, t, t_next, slope)
            if slope_next is not None:
                controller.accept(t_next - t, error)
                t, slope = t_next, slope_next
            else:
                controller.reject(t_next - t, error)
                slope = session.next_index - 2  # the Heun block's first: a fresh slope at this very point
    return None


_BLOCK_TRIAL_NFE = 5
"""Evaluations that trying R, P and H takes."""


def _try_blocks(
    session: StepSession, t: float, t_next: float, slope: int | None
) -> Generator[Evaluation, Feedback, tuple[float, int | None]]:
    """Error of the first block inside the tolerance and the slope it hands on; or the least error, and None."""
    errors = []
    for block in ("R", "P", "H"):
        first_index = session.next_index
        if block == "H":
            evaluations, next_slope = plan_heun_block(first_index, t, t_next)
        elif slope is None:
            continue
        elif block == "P":
            evaluations, next_slope = plan_pseudo_block(first_index, t, t_next, slope)
        elif session.control.refiner and abs(t_next - t) <= MAX_REFINER_STEP + 1e-9:
            evaluations, next_slope = plan_refiner_block(first_index, t, t_next, slope)
        else:
            continue
        retained = () if block == "H" or slope is None else (slope,)
        feedback = yield from session.evaluate(evaluations, retained)
        if session.record_step(t, t_next, block, feedback.error, accepted=feedback.error <= 1.0):
            return feedback.error, next_slope
        errors.append(feedback.error)
    return min(errors), None


def _choose_first_step(control: StepControl) -> float:
    if control.first_step is not None:
        return control.first_step
    return min(0.1, 0.5 * math.sqrt(control.tolerance))


def _finish_in_equal_steps(
    session: StepSession, segment: GuidanceSegment, t: float, slope: int
) -> Generator[Evaluation, Feedback, None]:
    """Finishes a stretch in equal pseudo-corrector steps."""
    for t_next in session.plan_equal_steps(segment, t):
        block, _ = plan_pseudo_block(session.next_index, t, t_next, slope)
        slope = session.next_index
        feedback = yield from session.evaluate(block)
        session.record_step(t, t_next, "P", feedback.error, accepted=True)
        t = t_next


StepFunction = Callable[[StepControl, Journal, Floats], AdaptiveSteps]


@dataclass(frozen=True)
class AdaptiveSolver:
    """A registered controller.

    Attributes:
        steps: makes the generator of one image from what it may do, its journal and its noise [C, H, W].
        parameter: the field of `StepControl` that says how fine its steps are.
        default: of that field.
        tries_refiner: it uses one where there is one.
        is_joint: one generator steers a whole batch, both branches of every image, as the reference does.
        min_nfe: evaluations that the first stretch of time takes at least, and every further one.
    """

    steps: StepFunction
    parameter: str
    default: float
    tries_refiner: bool = False
    is_joint: bool = False
    min_nfe: tuple[int, int] = (2, 2)

    def check_budget(self, control: StepControl) -> None:
        """Raises RequestError where the evaluations would not do for one step in every stretch of time."""
        first_cost, later_cost = self.min_nfe
        minimum = first_cost + later_cost * (len(control.interval.split_segments()) - 1)
        if not minimum <= control.max_nfe <= 100_000:
            raise RequestError(
                f"at most {control.max_nfe} evaluations",
                allowed=f"{minimum} to 100000: a slope and a step between any two edges of the guidance interval",
            )


def rms(array: Floats) -> float:
    """Root mean square in float64."""
    return float(np.sqrt(np.mean(np.square(np.asarray(array, np.float64)))))
