"""Dormand–Prince 5(4), SiT's default sampler, with its own step control.

`step_dopri5` lands on the end of time and has an error norm per image. `step_dopri5_reference` does as torchdiffeq does
inside
SiT's sampler: both branches of all images in one norm, steps beyond the end, and a quartic that is read at t = 1.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from fractions import Fraction

from runtime.sampling.controllers import Floats, Journal, StepControl, StepSession, choose_trial_end, rms
from runtime.sampling.plan import BASE, NEW, AdaptiveSteps, Combination, Evaluation, Feedback, TermKey
from runtime.sampling.tableaus import DORMAND_PRINCE as TABLE
from runtime.sampling.tableaus import DORMAND_PRINCE_MID as MID

ATOL_PER_RTOL = 1e-3
"""SiT's sampler takes an absolute tolerance of 1e-6 beside its relative one of 1e-3."""
_ORDER, _STAGES = 5, 6
_SAFETY, _GROWTH, _SHRINK = 0.9, 10.0, 0.2


def step_dopri5(control: StepControl, journal: Journal, noise: Floats) -> AdaptiveSteps:
    """Six evaluations a step; a step end on 1 and on every edge of the guidance interval."""
    session = _open_session(control, journal)
    h = None
    for segment in control.interval.split_segments(backwards=control.backwards):
        session.guided = segment.guided
        t, slope = segment.start, session.next_index
        if h is None:
            h = yield from _estimate_first_step(session, t, noise)
        else:
            yield from session.evaluate_slope(t)
        equal_times: list[float] = []
        while t != segment.end:
            if not equal_times and session.is_budget_low(segment, t, h, trial_cost=_STAGES, step_cost=_STAGES):
                equal_times = session.plan_equal_steps(segment, t, step_cost=_STAGES)
            t_next = equal_times.pop(0) if equal_times else choose_trial_end(session, segment, t, h)
            first_index = session.next_index
            feedback = yield from session.evaluate(_plan_stages(first_index, slope, t, t_next - t))
            is_accepted = feedback.error <= 1.0 or journal.is_budget_limited
            h = _choose_step(abs(t_next - t), feedback.error)
            if session.record_step(t, t_next, "dopri5", feedback.error, accepted=is_accepted):
                t, slope = t_next, first_index + _STAGES - 1
    return None


def step_dopri5_reference(control: StepControl, journal: Journal, noise: Floats) -> AdaptiveSteps:
    """As torchdiffeq 0.2 does: the step is never shortened, and the end is read off the last step's quartic."""
    session = _open_session(control, journal)
    t, slope = 0.0, 0
    h = yield from _estimate_first_step(session, t, noise)
    while True:
        first_index = session.next_index
        feedback = yield from session.evaluate(_plan_stages(first_index, slope, t, h))
        error = feedback.error
        if session.record_step(t, t + h, "dopri5", error, accepted=error <= 1.0):
            if t + h >= 1.0:
                return _interpolate_quartic((1.0 - t) / h, h, [slope, *range(first_index, first_index + _STAGES)])
            t, slope = t + h, first_index + _STAGES - 1
        h = _choose_step(h, error)


def _open_session(control: StepControl, journal: Journal) -> StepSession:
    session = StepSession(control, journal)
    session.scale = (ATOL_PER_RTOL * control.tolerance, control.tolerance)
    return session


def _estimate_first_step(session: StepSession, t: float, noise: Floats) -> Generator[Evaluation, Feedback, float]:
    """Hairer, Nørsett & Wanner I, II.4, from two evaluations; the first is the slope at the start."""
    atol, rtol = session.scale
    sign = -1.0 if session.control.backwards else 1.0
    first_index = session.next_index
    feedback = yield from session.evaluate([Evaluation("predictor", t, {BASE: 1.0}, error={NEW: 1.0}, block="dopri5")])
    if session.control.first_step is not None:
        return session.control.first_step
    d0, d1 = rms(noise / (atol + rtol * abs(noise))), feedback.error
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    probe = Evaluation(
        "predictor",
        t + sign * h0,
        {BASE: 1.0, first_index: sign * h0},
        error={first_index: -1.0, NEW: 1.0},
        block="dopri5",
    )
    d2 = (yield from session.evaluate([probe])).error / h0
    h1: float = max(1e-6, h0 * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / _ORDER)
    return min(100 * h0, h1)


def _plan_stages(first_index: int, slope: int, t: float, h: float) -> list[Evaluation]:
    """The six new evaluations of a step whose first slope is known; the last is at its end and serves the next step."""
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
    """The polynomial through both ends, their slopes and the midpoint, at the share x of the step."""
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


def _choose_step(h: float, error: float) -> float:
    """torchdiffeq's elementary controller: at most ten times longer, no shorter than a fifth."""
    if error == 0:
        return h * _GROWTH
    factor: float = min(_GROWTH, max(_SAFETY / error ** (1 / _ORDER), 1.0 if error < 1 else _SHRINK))
    return h * factor
