"""How long a step is: controllers that read the error of a step and choose the length of the next one.

`StepControl` says what a sampler may do, `Journal` records what it did, and `StepSession` counts its evaluations.
`adaptive.py` joins a controller and a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.sampling.guidance import FULL_INTERVAL, GuidanceInterval, GuidanceSegment
from runtime.sampling.plan import BASE, NEW, Evaluation, Feedback
from runtime.system.errors import RequestError

SAFETY, GROWTH, SHRINK = 0.9, 3.0, 0.2
ATOL_PER_RTOL = 1e-3
"""SiT's dopri5 has an absolute tolerance of 1e-6 beside its relative one of 1e-3."""
MAX_NFE = 1000

Floats = NDArray[Any]
FeedbackGenerator = Generator[Evaluation, Feedback, Feedback]
Accepts = Callable[[float], bool]
"""Whether a step with this error is taken."""


@dataclass(frozen=True)
class StepControl:
    """What a sampler that chooses its own steps may do.

    Attributes:
        tolerance: of the error of a step, relative to 1 + |x|.
        constant: C of the norm rule, step = C / rms(v).
        max_nfe: largest number of evaluations of both networks; when they run short the rest is taken in equal steps.
        first_step: length of the first step tried, None to let the controller choose.
        interval: flow times in which guidance acts.
        refiner: whether there is a refiner to try.
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
        t, dt: start and length in flow time; dt is negative backwards.
        block: H, P, R or the method's name.
        error: in units of the tolerance; of the norm rule, rms in units of the latents; None where none is estimated.
        accepted: whether it was taken.
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


class StepSession:
    """The evaluations of one image: counts them, numbers their slopes, and takes rejected steps back.

    Attributes:
        next_index: number of the next evaluation, by which its slope is known.
        guided: whether guidance acts in the present segment.
        scale: (absolute, relative) tolerance in which errors are measured.
    """

    def __init__(self, control: StepControl, journal: Journal, scale: tuple[float, float] = (1.0, 0.0)) -> None:
        self.control, self.journal, self.scale = control, journal, scale
        self.next_index = 0
        self.guided = True
        self.segments = control.interval.split_segments(backwards=control.backwards)
        self._must_undo = False

    def evaluate(self, evaluations: Sequence[Evaluation], retained: tuple[int, ...] = ()) -> FeedbackGenerator:
        """Evaluate a block and return the feedback of its last evaluation, which carries the error.

        Args:
            retained: slopes that must stay in the history although the block does not read them.
        """
        feedback = Feedback(0.0, 0.0)
        for evaluation in evaluations:
            feedback = yield replace(
                evaluation, guided=self.guided, scale=self.scale, undo=self._must_undo, retained=retained
            )
            self._must_undo = False
            self.next_index += 1
            self.journal.nfe[evaluation.network] += 1
            self.journal.unguided_nfe += evaluation.network == "predictor" and not self.guided
        return feedback

    def evaluate_slope(self, t: float) -> FeedbackGenerator:
        """Evaluate the predictor at the base."""
        return self.evaluate([Evaluation("predictor", t, {BASE: 1.0}, block="H")])

    def try_step(
        self,
        evaluations: Sequence[Evaluation],
        t: float,
        t_next: float,
        accepts: Accepts,
        retained: tuple[int, ...] = (),
    ) -> Generator[Evaluation, Feedback, tuple[Feedback, bool]]:
        """Evaluate a block from t to t_next and record the step; return its feedback and whether it is taken.

        The next evaluation takes a rejected step back.
        """
        feedback = yield from self.evaluate(evaluations, retained)
        is_accepted = accepts(feedback.error)
        self.journal.steps.append(PathStep(t, t_next - t, evaluations[-1].block, feedback.error, is_accepted))
        self._must_undo = not is_accepted
        return feedback, is_accepted

    def count_remaining(self) -> int:
        """Return how many evaluations are left."""
        return self.control.max_nfe - self.journal.total_nfe

    def choose_trial_end(self, segment: GuidanceSegment, t: float, h: float) -> float:
        """Return where the next trial of about h ends; a first step that the user named has exactly its length."""
        first_step = self.control.first_step
        if first_step is not None and not self.journal.steps:
            remaining = segment.end - t
            return segment.end if first_step >= abs(remaining) else t + math.copysign(first_step, remaining)
        return choose_step_end(t, h, segment.end)

    def is_budget_low(
        self, segment: GuidanceSegment, t: float, h: float, *, trial_nfe: int, equal_step_nfe: int
    ) -> bool:
        """Return whether it is time to finish in equal steps.

        It is when one more trial would leave too few evaluations to finish at all, or when the last quarter of them is
        not enough for steps of h.
        """
        remaining = self.count_remaining()
        if remaining < trial_nfe + self._count_needed(segment, equal_step_nfe):
            return True
        num_steps = abs(self.segments[-1].end - t) / h
        return remaining <= self.control.max_nfe // 4 and num_steps * equal_step_nfe > remaining

    def plan_equal_steps(self, segment: GuidanceSegment, t: float, equal_step_nfe: int) -> list[float]:
        """Return the ends of the equal steps that finish a segment with its share of the evaluations left."""
        self.journal.is_budget_limited = True
        available = self.count_remaining() - self._count_needed(segment, equal_step_nfe) + equal_step_nfe
        num_evaluations = available * abs(segment.end - t) / abs(self.segments[-1].end - t)
        num_steps = max(1, min(available, round(num_evaluations)) // equal_step_nfe)
        return [*(t + (segment.end - t) * i / num_steps for i in range(1, num_steps)), segment.end]

    def _count_needed(self, segment: GuidanceSegment, step_nfe: int) -> int:
        """Return the least evaluations that finishing takes: a step here, a slope and a step in each later segment."""
        num_later = len(self.segments) - 1 - self.segments.index(segment)
        return step_nfe + (1 + step_nfe) * num_later


def choose_step_end(t: float, h: float, end: float) -> float:
    """Return where a step of about h ends: exactly on `end` if that is near, and no tiny step is left before it."""
    remaining = abs(end - t)
    if h >= remaining * (1 - 1e-6):
        return end
    return t + math.copysign(remaining / 2 if 2 * h > remaining else h, end - t)


class Controller(Protocol):
    """Choose the lengths of the steps of one image.

    Attributes:
        scale: (absolute, relative) tolerance in which errors are measured.
        h: length of the next step to try, in flow time; set by `start` and `update`.
    """

    scale: tuple[float, float]
    h: float

    def start(self, session: StepSession, t: float) -> FeedbackGenerator:
        """Evaluate the slope at t, where none is known."""

    def is_acceptable(self, error: float) -> bool:
        """Return whether a step with this error is taken."""

    def update(self, h: float, feedback: Feedback, *, is_accepted: bool) -> None:
        """Choose the next length after a trial of length h > 0."""


class PIController:
    """PI control (Gustafsson 1991): h' = 0.9·h·E^(−0.7/k)·E_prev^(0.4/k), with E the error in units of the tolerance.

    Args:
        error_order: k of an error estimate that goes with h^k.
    """

    def __init__(self, control: StepControl, error_order: int, noise: Floats | None = None) -> None:
        self.scale = (control.tolerance, control.tolerance)
        self.h = control.first_step or min(0.1, 0.5 * math.sqrt(control.tolerance))
        self._order = error_order
        self._previous_error = 1.0
        self._has_rejected = False

    def start(self, session: StepSession, t: float) -> FeedbackGenerator:
        return session.evaluate_slope(t)

    def is_acceptable(self, error: float) -> bool:
        return error <= 1.0

    def update(self, h: float, feedback: Feedback, *, is_accepted: bool) -> None:
        if is_accepted:
            error = max(feedback.error, 1e-10)
            factor = SAFETY * error ** (-0.7 / self._order) * self._previous_error ** (0.4 / self._order)
            # No growth directly after a rejection: the step would be rejected again.
            self.h = h * min(1.0 if self._has_rejected else GROWTH, max(SHRINK, factor))
            self._previous_error = error
        else:
            self.h = h * min(0.8, max(SHRINK, SAFETY * feedback.error ** (-1 / self._order)))
        self._has_rejected = not is_accepted


class NormController:
    """Take steps of C / rms(v), with v the slope at their start. No step is rejected."""

    def __init__(self, control: StepControl, error_order: int, noise: Floats | None = None) -> None:
        self.scale = (1.0, 0.0)
        self.h = 0.0
        self._constant = control.constant

    def start(self, session: StepSession, t: float) -> FeedbackGenerator:
        feedback = yield from session.evaluate_slope(t)
        self.update(self.h, feedback, is_accepted=True)
        return feedback

    def is_acceptable(self, error: float) -> bool:
        return True

    def update(self, h: float, feedback: Feedback, *, is_accepted: bool) -> None:
        self.h = self._constant / max(feedback.slope_rms, 1e-6)


class ElementaryController:
    """The controller of torchdiffeq: h' = 0.9·h·E^(−1/k), at most ten times longer and no shorter than a fifth.

    Args:
        noise: the start of the trajectory [C, H, W], from which the first length is estimated.
    """

    def __init__(self, control: StepControl, error_order: int, noise: Floats) -> None:
        self.scale = (ATOL_PER_RTOL * control.tolerance, control.tolerance)
        self.h = 0.0
        self._order, self._noise = error_order, noise

    def start(self, session: StepSession, t: float) -> FeedbackGenerator:
        """Evaluate the slope; at the first time also a probe that estimates h (Hairer, Nørsett & Wanner I, II.4)."""
        if self.h:
            return (yield from session.evaluate_slope(t))
        atol, rtol = self.scale
        first_index = session.next_index
        slope_evaluation = Evaluation("predictor", t, {BASE: 1.0}, error={NEW: 1.0}, block="dopri5")
        feedback = yield from session.evaluate([slope_evaluation])
        if session.control.first_step is not None:
            self.h = session.control.first_step
            return feedback
        d0, d1 = rms(self._noise / (atol + rtol * abs(self._noise))), feedback.error
        h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        dt = -h0 if session.control.backwards else h0
        probe = Evaluation(
            "predictor",
            t + dt,
            {BASE: 1.0, first_index: dt},
            error={first_index: -1.0, NEW: 1.0},
            block="dopri5",
        )
        d2 = (yield from session.evaluate([probe])).error / h0
        h1: float = max(1e-6, h0 * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / self._order)
        self.h = min(100 * h0, h1)
        return feedback

    def is_acceptable(self, error: float) -> bool:
        return error <= 1.0

    def update(self, h: float, feedback: Feedback, *, is_accepted: bool) -> None:
        least, most = 1.0 if feedback.error < 1 else SHRINK, 10.0
        factor: float = SAFETY / feedback.error ** (1 / self._order) if feedback.error else most
        self.h = h * min(most, max(factor, least))


def rms(array: Floats) -> float:
    """Return the root mean square, computed in float64."""
    return float(np.sqrt(np.mean(np.square(np.asarray(array, np.float64)))))
