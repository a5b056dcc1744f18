"""Dormand–Prince 5(4), SiT's default sampler, with its own step control.

`dopri5` lands on the end of time and has an error norm per image. `dopri5_reference` does as torchdiffeq does inside
SiT's sampler: both branches of all images in one norm, steps beyond the end, and a quartic that is read at t = 1.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from fractions import Fraction

from runtime.sampling.controllers import Control, Floats, Image, Journal, rms, trial_end
from runtime.sampling.plan import BASE, NEW, Combination, Evaluation, Feedback, Key, Steps
from runtime.sampling.tableaus import DORMAND_PRINCE as TABLE
from runtime.sampling.tableaus import DORMAND_PRINCE_MID as MID

ATOL_PER_RTOL = 1e-3
"""SiT's sampler takes an absolute tolerance of 1e-6 beside its relative one of 1e-3."""
_ORDER, _STAGES = 5, 6
_SAFETY, _GROWTH, _SHRINK = 0.9, 10.0, 0.2


def dopri5(control: Control, journal: Journal, noise: Floats) -> Steps:
    """Six evaluations a step; a step end on 1 and on every edge of the guidance interval."""
    image = _image(control, journal)
    h = None
    for segment in control.interval.segments(backwards=control.backwards):
        image.guided = segment.guided
        t, slope = segment.start, image.made
        if h is None:
            h = yield from _first_step(image, t, noise)
        else:
            yield from image.slope(t)
        forced: list[float] = []
        while t != segment.end:
            if not forced and image.runs_short(segment, t, h, trial=_STAGES, cost=_STAGES):
                forced = image.equal_times(segment, t, cost=_STAGES)
            t_next = forced.pop(0) if forced else trial_end(image, segment, t, h)
            made = image.made
            told = yield from image.ask(_stages(made, slope, t, t_next - t))
            kept = told.error <= 1.0 or journal.short
            h = _optimal(abs(t_next - t), told.error)
            if image.judge(t, t_next, "dopri5", told.error, accepted=kept):
                t, slope = t_next, made + _STAGES - 1
    return None


def dopri5_reference(control: Control, journal: Journal, noise: Floats) -> Steps:
    """As torchdiffeq 0.2 does: the step is never shortened, and the end is read off the last step's quartic."""
    image = _image(control, journal)
    t, slope = 0.0, 0
    h = yield from _first_step(image, t, noise)
    while True:
        made = image.made
        told = yield from image.ask(_stages(made, slope, t, h))
        ratio = told.error
        if image.judge(t, t + h, "dopri5", ratio, accepted=ratio <= 1.0):
            if t + h >= 1.0:
                return _quartic((1.0 - t) / h, h, [slope, *range(made, made + _STAGES)])
            t, slope = t + h, made + _STAGES - 1
        h = _optimal(h, ratio)


def _image(control: Control, journal: Journal) -> Image:
    image = Image(control, journal)
    image.scale = (ATOL_PER_RTOL * control.tolerance, control.tolerance)
    return image


def _first_step(image: Image, t: float, noise: Floats) -> Generator[Evaluation, Feedback, float]:
    """Hairer, Nørsett & Wanner I, II.4, from two evaluations; the first is the slope at the start."""
    atol, rtol = image.scale
    sign = -1.0 if image.control.backwards else 1.0
    start = image.made
    told = yield from image.ask([Evaluation("predictor", t, {BASE: 1.0}, error={NEW: 1.0}, block="dopri5")])
    if image.control.first_step is not None:
        return image.control.first_step
    d0, d1 = rms(noise / (atol + rtol * abs(noise))), told.error
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    probe = Evaluation(
        "predictor", t + sign * h0, {BASE: 1.0, start: sign * h0}, error={start: -1.0, NEW: 1.0}, block="dopri5"
    )
    d2 = (yield from image.ask([probe])).error / h0
    h1: float = max(1e-6, h0 * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / _ORDER)
    return min(100 * h0, h1)


def _stages(first: int, slope: int, t: float, h: float) -> list[Evaluation]:
    """The six new evaluations of a step whose first slope is known; the last is at its end and serves the next step."""
    names = [slope, *range(first, first + _STAGES)]
    evaluations = []
    for stage in range(1, _STAGES + 1):
        point: Combination = {BASE: 1.0, **_weighted(TABLE.a[stage], names, h)}
        last = stage == _STAGES
        error = {**_weighted(TABLE.errors[:-1], names, h), NEW: h * float(TABLE.errors[-1])} if last else None
        time = t + h if TABLE.c[stage] == 1 else t + float(TABLE.c[stage]) * h
        evaluations.append(Evaluation("predictor", time, point, point if last else None, error, block="dopri5"))
    return evaluations


def _weighted(weights: Sequence[Fraction], names: Sequence[int], h: float) -> dict[Key, float]:
    return {name: h * float(w) for name, w in zip(names, weights, strict=False) if w}


def _quartic(x: float, h: float, names: list[int]) -> Combination:
    """The polynomial through both ends, their slopes and the midpoint, at the share x of the step."""
    y0: Combination = {BASE: 1.0}
    y1: Combination = {BASE: 1.0, **_weighted(TABLE.a[_STAGES], names, h)}
    middle: Combination = {BASE: 1.0, **_weighted(MID, names, h)}
    f0: Combination = {names[0]: h}
    f1: Combination = {names[_STAGES]: h}
    parts: list[tuple[float, Combination]] = [
        (1.0, y0),
        (x, f0),
        (x**2, _sum((-4, f0), (1, f1), (-11, y0), (-5, y1), (16, middle))),
        (x**3, _sum((5, f0), (-3, f1), (18, y0), (14, y1), (-32, middle))),
        (x**4, _sum((-2, f0), (2, f1), (-8, y0), (-8, y1), (16, middle))),
    ]
    return _sum(*parts)


def _sum(*parts: tuple[float, Combination]) -> Combination:
    total: dict[Key, float] = {}
    for factor, combination in parts:
        for key, value in combination.items():
            total[key] = total.get(key, 0.0) + factor * value
    return total


def _optimal(h: float, ratio: float) -> float:
    """torchdiffeq's elementary controller: at most ten times longer, no shorter than a fifth."""
    if ratio == 0:
        return h * _GROWTH
    factor: float = min(_GROWTH, max(_SAFETY / ratio ** (1 / _ORDER), 1.0 if ratio < 1 else _SHRINK))
    return h * factor
