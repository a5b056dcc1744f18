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

from runtime.sampling.blocks import REFINER_STEP, heun_block, pseudo_block, refiner_block
from runtime.sampling.guidance import EVERYWHERE, Interval, Segment
from runtime.sampling.plan import BASE, Evaluation, Feedback, Steps
from runtime.system.errors import RequestError

SAFETY, GROWTH, SHRINK = 0.9, 3.0, 0.2
INTEGRAL, PROPORTIONAL = 0.35, 0.2
"""PI control (Gustafsson 1991) for an error of order h²: h' = 0.9·h·E^(−0.35)·E_prev^0.2."""
MAX_NFE = 1000


@dataclass(frozen=True)
class Control:
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
    interval: Interval = EVERYWHERE
    refiner: bool = False
    backwards: bool = False

    def __post_init__(self) -> None:
        for what, value, low, high in (
            ("tolerance", self.tolerance, 1e-6, 10.0),
            ("constant", self.constant, 1e-3, 10.0),
            ("first step", self.first_step if self.first_step is not None else 1.0, 1e-6, 1.0),
        ):
            if not low <= value <= high:
                raise RequestError(f"{what} {value:g}", allowed=f"{low:g} to {high:g}")


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
        unguided: the predictor's outside the guidance interval.
        short: the evaluations ran short, and the rest was taken in equal steps.
    """

    steps: list[PathStep] = field(default_factory=list)
    nfe: dict[str, int] = field(default_factory=lambda: {"predictor": 0, "refiner": 0})
    unguided: int = 0
    short: bool = False

    @property
    def used(self) -> int:
        return sum(self.nfe.values())

    @property
    def accepted(self) -> list[PathStep]:
        return [step for step in self.steps if step.accepted]

    @property
    def rejected(self) -> int:
        return len(self.steps) - len(self.accepted)


Ask = Generator[Evaluation, Feedback, Feedback]
Floats = NDArray[Any]


class Image:
    """The side of a controller that talks to the loop: counts evaluations, names slopes, remembers what to undo."""

    def __init__(self, control: Control, journal: Journal) -> None:
        self.control, self.journal = control, journal
        self.made = 0
        self.guided = True
        self.scale = (control.tolerance, control.tolerance)
        self._undo = False

    def ask(self, evaluations: Sequence[Evaluation], keeps: tuple[int, ...] = ()) -> Ask:
        """Evaluates a block; the feedback of its last evaluation, which carries the error."""
        feedback = Feedback(0.0, 0.0)
        for evaluation in evaluations:
            feedback = yield replace(
                evaluation,
                guided=self.guided,
                scale=self.scale,
                undo=self._undo,
                keeps=tuple(name for name in keeps if name < self.made),
            )
            self._undo = False
            self.made += 1
            self.journal.nfe[evaluation.network] += 1
            self.journal.unguided += evaluation.network == "predictor" and not self.guided
        return feedback

    def slope(self, t: float) -> Ask:
        """Asks the predictor at the base."""
        return self.ask([Evaluation("predictor", t, {BASE: 1.0}, block="H")])

    def judge(self, t: float, t_next: float, block: str, error: float | None, *, accepted: bool) -> bool:
        """Notes a step, and takes it back if it is not accepted."""
        self.journal.steps.append(PathStep(t, t_next - t, block, error, accepted))
        self._undo = not accepted
        return accepted

    def left(self) -> int:
        """Evaluations that may still be made."""
        return self.control.max_nfe - self.journal.used

    def runs_short(self, segment: Segment, t: float, h: float, *, trial: int = 1, cost: int = 1) -> bool:
        """Whether it is time to finish in equal steps: one more trial would leave too few evaluations to finish at
        all; or they are in their last quarter and would not do for steps of h.

        Args:
            trial: evaluations of one more trial.
            cost: evaluations of one equal step.
        """
        if self.left() < trial + self._needed(segment, cost):
            return True
        steps = abs(self._end - t) / h
        return self.left() <= self.control.max_nfe // 4 and steps * cost > self.left()

    def equal_times(self, segment: Segment, t: float, cost: int = 1) -> list[float]:
        """Ends of the equal steps that finish a stretch, with its share of the evaluations that are left."""
        self.journal.short = True
        available = self.left() - self._needed(segment, cost) + cost
        share = available * abs(segment.end - t) / abs(self._end - t)
        steps = max(1, min(available, round(share)) // cost)
        return [*(t + (segment.end - t) * i / steps for i in range(1, steps)), segment.end]

    @property
    def _end(self) -> float:
        return 0.0 if self.control.backwards else 1.0

    def _needed(self, segment: Segment, cost: int) -> int:
        """Evaluations that finishing takes at least: a step here, a slope and a step in every later stretch."""
        segments = self.control.interval.segments(backwards=self.control.backwards)
        return cost + (1 + cost) * (len(segments) - 1 - segments.index(segment))


class StepSize:
    """PI control of the step size, over the error's size in units of the tolerance."""

    def __init__(self, first: float) -> None:
        self.h = first
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


def trial_end(image: Image, segment: Segment, t: float, h: float) -> float:
    """Where the next trial ends: as `next_time`, but a first step that the user named is taken at its word."""
    first = image.control.first_step
    if first is not None and not image.journal.steps:
        left = segment.end - t
        return segment.end if first >= abs(left) else t + math.copysign(first, left)
    return next_time(t, h, segment.end)


def next_time(t: float, h: float, end: float) -> float:
    """Where a step of about h ends: exactly on `end` if that is near, and no tiny step is left before it."""
    left = abs(end - t)
    if h >= left * (1 - 1e-6):
        return end
    return t + math.copysign(left / 2 if 2 * h > left else h, end - t)


def lte(control: Control, journal: Journal, noise: Floats | None = None) -> Steps:
    """Steps as long as the pseudo corrector's error estimate allows: e = h/2·(d_new − d_old), one evaluation each.

    The estimate is that of the Euler step inside, so the trapezoid that is kept is better than the tolerance says
    (local extrapolation): the error at the end goes with the tolerance.
    """
    image, size = Image(control, journal), StepSize(_first_step(control))
    for segment in control.interval.segments(backwards=control.backwards):
        image.guided = segment.guided
        slope: int | None = None
        t = segment.start
        while t != segment.end:
            if slope is None:
                slope = image.made
                yield from image.slope(t)
            if image.runs_short(segment, t, size.h):
                yield from _equal_steps(image, segment, t, slope)
                break
            t_next = trial_end(image, segment, t, size.h)
            block, _ = pseudo_block(image.made, t, t_next, slope)
            made = image.made
            told = yield from image.ask(block)
            if image.judge(t, t_next, "P", told.error, accepted=told.error <= 1.0):
                size.accept(t_next - t, told.error)
                t, slope = t_next, made
            else:
                size.reject(t_next - t, told.error)
    return None


def norm(control: Control, journal: Journal, noise: Floats | None = None) -> Steps:
    """The owner's rule: steps of C / rms(v), v the slope at their start. Pseudo-corrector steps, none is given up."""
    image = Image(control, journal)
    image.scale = (1.0, 0.0)
    for segment in control.interval.segments(backwards=control.backwards):
        image.guided = segment.guided
        slope = image.made
        t = segment.start
        told = yield from image.slope(t)
        while t != segment.end:
            h = control.constant / max(told.size, 1e-6)
            if image.runs_short(segment, t, h):
                yield from _equal_steps(image, segment, t, slope)
                break
            t_next = trial_end(image, segment, t, h)
            block, _ = pseudo_block(image.made, t, t_next, slope)
            slope = image.made
            told = yield from image.ask(block)
            image.judge(t, t_next, "P", told.error, accepted=True)
            t = t_next
    return None


def blocks(control: Control, journal: Journal, noise: Floats | None = None) -> Steps:
    """Tries the cheapest block first: R, then P, then H, and keeps the first whose error is inside the tolerance.

    A refiner step is only tried where it is as short as refiners are trained for, and after a slope was handed on.
    """
    image, size = Image(control, journal), StepSize(_first_step(control))
    for segment in control.interval.segments(backwards=control.backwards):
        image.guided = segment.guided
        slope: int | None = None
        t = segment.start
        while t != segment.end:
            if image.runs_short(segment, t, size.h, trial=_ROUND):
                if slope is None:
                    slope = image.made
                    yield from image.slope(t)
                yield from _equal_steps(image, segment, t, slope)
                break
            t_next = trial_end(image, segment, t, size.h)
            told, slope_next = yield from _cheapest(image, t, t_next, slope)
            if slope_next is not None:
                size.accept(t_next - t, told)
                t, slope = t_next, slope_next
            else:
                size.reject(t_next - t, told)
                slope = image.made - 2  # the Heun block's first: a fresh slope at this very point
    return None


_ROUND = 5
"""Evaluations that trying R, P and H takes."""


def _cheapest(
    image: Image, t: float, t_next: float, slope: int | None
) -> Generator[Evaluation, Feedback, tuple[float, int | None]]:
    """Error of the first block inside the tolerance and the slope it hands on; or the least error, and None."""
    tried = []
    for block in ("R", "P", "H"):
        made = image.made
        if block == "H":
            evaluations, hands_on = heun_block(made, t, t_next)
        elif slope is None:
            continue
        elif block == "P":
            evaluations, hands_on = pseudo_block(made, t, t_next, slope)
        elif image.control.refiner and abs(t_next - t) <= REFINER_STEP + 1e-9:
            evaluations, hands_on = refiner_block(made, t, t_next, slope)
        else:
            continue
        keeps = () if block == "H" or slope is None else (slope,)
        told = yield from image.ask(evaluations, keeps)
        if image.judge(t, t_next, block, told.error, accepted=told.error <= 1.0):
            return told.error, hands_on
        tried.append(told.error)
    return min(tried), None


def _first_step(control: Control) -> float:
    if control.first_step is not None:
        return control.first_step
    return min(0.1, 0.5 * math.sqrt(control.tolerance))


def _equal_steps(image: Image, segment: Segment, t: float, slope: int) -> Generator[Evaluation, Feedback, None]:
    """Finishes a stretch in equal pseudo-corrector steps."""
    for t_next in image.equal_times(segment, t):
        block, _ = pseudo_block(image.made, t, t_next, slope)
        slope = image.made
        told = yield from image.ask(block)
        image.judge(t, t_next, "P", told.error, accepted=True)
        t = t_next


Controller = Callable[[Control, Journal, Floats], Steps]


@dataclass(frozen=True)
class Rule:
    """A registered controller.

    Attributes:
        steps: makes the generator of one image from what it may do, its journal and its noise [C, H, W].
        setting: the field of `Control` that says how fine its steps are.
        default: of that field.
        tries_refiner: it uses one where there is one.
        joint: one generator steers a whole batch, both branches of every image, as the reference does.
        least_nfe: evaluations that the first stretch of time takes at least, and every further one.
    """

    steps: Controller
    setting: str
    default: float
    tries_refiner: bool = False
    joint: bool = False
    least_nfe: tuple[int, int] = (2, 2)

    def check_budget(self, control: Control) -> None:
        """Raises RequestError where the evaluations would not do for one step in every stretch of time."""
        first, each = self.least_nfe
        least = first + each * (len(control.interval.segments()) - 1)
        if not least <= control.max_nfe <= 100_000:
            raise RequestError(
                f"at most {control.max_nfe} evaluations",
                allowed=f"{least} to 100000: a slope and a step between any two edges of the guidance interval",
            )


def rms(array: Floats) -> float:
    """Root mean square in float64."""
    return float(np.sqrt(np.mean(np.square(np.asarray(array, np.float64)))))
