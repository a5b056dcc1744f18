"""Dormand–Prince 5(4), SiT's default sampler: a step for the adaptive loop, and the reference's own loop.

As `DOPRI5_STEP` it lands on the end of time and has an error norm per image. `step_dopri5_reference` does as
torchdiffeq does inside SiT's sampler: both branches of all images in one norm, steps beyond the end, and a quartic that
is read at t = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from runtime.sampling.adaptive import Slope, Slopes, Step, Trial, TrialGenerator
from runtime.sampling.controllers import Accepts, ElementaryController, Floats, Journal, StepControl, StepSession
from runtime.sampling.plan import BASE, NEW, AdaptiveSteps, Combination, Evaluation, TermKey
from runtime.sampling.tableaus import DORMAND_PRINCE as TABLE
from runtime.sampling.tableaus import DORMAND_PRINCE_MID as MID

_ORDER, _STAGES = 5, 6


def _try_stages(session: StepSession, slopes: Slopes, t: float, t_next: float, accepts: Accepts) -> TrialGenerator:
    """Try a step; six evaluations, the last of which is the slope of the next step."""
    first_index = session.next_index
    stages = _plan_stages(first_index, slopes[-1].index, t, t_next - t)
    feedback, is_accepted = yield from session.try_step(stages, t, t_next, accepts)
    return Trial(feedback, is_accepted, (Slope(t_next, first_index + _STAGES - 1),) if is_accepted else slopes)


DOPRI5_STEP = Step(_try_stages, nfe=_STAGES, error_order=_ORDER)


def step_dopri5_reference(control: StepControl, journal: Journal, noise: Floats) -> AdaptiveSteps:
    """Step as torchdiffeq 0.2 does: the step is never shortened, and the end is read off the last step's quartic."""
    controller = ElementaryController(control, _ORDER, noise)
    session = StepSession(control, journal, controller.scale)
    t, slope = 0.0, 0
    yield from controller.start(session, t)
    while True:
        first_index, h = session.next_index, controller.h
        stages = _plan_stages(first_index, slope, t, h)
        feedback, is_accepted = yield from session.try_step(stages, t, t + h, controller.is_acceptable)
        controller.update(h, feedback, is_accepted=is_accepted)
        if is_accepted:
            if t + h >= 1.0:
                return _interpolate_quartic((1.0 - t) / h, h, [slope, *range(first_index, first_index + _STAGES)])
            t, slope = t + h, first_index + _STAGES - 1


def _plan_stages(first_index: int, slope: int, t: float, h: float) -> list[Evaluation]:
    """Plan the six new evaluations of a step from a known slope; the last one is the slope of the next step."""
    names = [slope, *range(first_index, first_index + _STAGES)]
    evaluations = []
    for stage in range(1, _STAGES + 1):
        point: Combination = {BASE: 1.0, **_weight_slopes(TABLE.a[stage], names, h)}
        is_last = stage == _STAGES
        error = (
            {**_weight_slopes(TABLE.error_weights[:-1], names, h), NEW: h * float(TABLE.error_weights[-1])}
            if is_last
            else None
        )
        time = t + h if TABLE.c[stage] == 1 else t + float(TABLE.c[stage]) * h
        evaluations.append(Evaluation("predictor", time, point, point if is_last else None, error, block="dopri5"))
    return evaluations


def _weight_slopes(weights: Sequence[Fraction], names: Sequence[int], h: float) -> dict[TermKey, float]:
    return {name: h * float(w) for name, w in zip(names, weights, strict=False) if w}


def _interpolate_quartic(x: float, h: float, names: list[int]) -> Combination:
    """Return the polynomial through both ends, their slopes and the midpoint, at the fraction x of the step."""
    y0: Combination = {BASE: 1.0}
    y1: Combination = {BASE: 1.0, **_weight_slopes(TABLE.a[_STAGES], names, h)}
    middle: Combination = {BASE: 1.0, **_weight_slopes(MID, names, h)}
    f0: Combination = {names[0]: h}
    f1: Combination = {names[_STAGES]: h}
    parts: list[tuple[float, Combination]] = [
        (1.0, y0),
        (x, f0),
        (x**2, _add_combinations((-4, f0), (1, f1), (-11, y0), (-5, y1), (16, middle))),
        (x**3, _add_combinations((5, f0), (-3, f1), (18, y0), (14, y1), (-32, middle))),
        (x**4, _add_combinations((-2, f0), (2, f1), (-8, y0), (-8, y1), (16, middle))),
    ]
    return _add_combinations(*parts)


def _add_combinations(*parts: tuple[float, Combination]) -> Combination:
    total: dict[TermKey, float] = {}
    for factor, combination in parts:
        for key, value in combination.items():
            total[key] = total.get(key, 0.0) + factor * value
    return total
