"""Controllers in plain arithmetic: how the error follows the tolerance, where steps end, what a budget holds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import START, refine_exactly, slope, solve_backwards, solve_forwards

from runtime.sampling.blocks import MAX_REFINER_STEP
from runtime.sampling.controllers import MAX_NFE, Journal, StepControl, StepSession, choose_step_end
from runtime.sampling.dopri5 import step_dopri5_reference
from runtime.sampling.guidance import GuidanceInterval
from runtime.sampling.plan import BASE, NEW, Evaluation, Feedback, integrate
from runtime.sampling.solvers import ADAPTIVE_RULES, ADAPTIVE_SOLVERS
from runtime.system.errors import RequestError

EVERY = {**ADAPTIVE_RULES, **ADAPTIVE_SOLVERS}
OWN = [name for name, rule in EVERY.items() if not rule.is_joint]
"""Controllers that land on the end of time; the reference's mode steps beyond."""
SETTINGS = {"tolerance": (1e-6, 1.0), "constant": (0.02, 2.0)}


def steered(name: str, **options: Any) -> tuple[float, Journal, list[Evaluation]]:
    """Largest error at the end, what happened, and every evaluation."""
    rule, journal, seen = EVERY[name], Journal(), []
    control = StepControl(**{"refiner": rule.tries_refiner, **options})

    def watched() -> Any:
        steps = rule.steps(control, journal, START)
        evaluation = next(steps)
        while True:
            seen.append(evaluation)
            told = yield evaluation
            try:
                evaluation = steps.send(told)
            except StopIteration as stop:
                return stop.value

    end = integrate(watched(), START if not control.backwards else solve_forwards(START, 1.0), slope, refine_exactly)
    expected = solve_forwards(START, 1.0) if not control.backwards else START
    return float(np.abs(end - expected).max()), journal, seen


def finest(name: str, constant: float = 0.02) -> float:
    """A setting that is fine enough for an error below 5e-3; Adams–Bashforth cannot correct its unequal steps."""
    return {"norm": constant, "norm-ab2": constant / 4}.get(name, 1e-5)


def setting(name: str, value: float) -> dict[str, float]:
    return {EVERY[name].parameter: value}


@pytest.mark.parametrize("name", OWN)
def test_it_solves_the_problem_better_the_finer_it_is(name: str) -> None:
    coarse, fine = 0.3 if EVERY[name].parameter == "constant" else 1e-2, finest(name)
    assert steered(name, **setting(name, fine))[0] < 0.1 * steered(name, **setting(name, coarse))[0]
    assert steered(name, **setting(name, fine))[0] < 5e-3


@pytest.mark.parametrize(("name", "exponent"), [("lte", 1.0), ("lte-heun", 1.0), ("lte-ab2", 2 / 3)])
def test_the_error_of_lte_goes_with_the_tolerance(name: str, exponent: float) -> None:
    """All are of global order 2; the estimate goes with h² (error ∝ tolerance), that of Adams–Bashforth with h³."""
    tolerances = np.array([1e-2, 1e-3, 1e-4, 1e-5])
    errors = np.array([steered(name, tolerance=tau)[0] for tau in tolerances])
    fitted = float(np.polyfit(np.log(tolerances), np.log(errors), 1)[0])
    assert fitted == pytest.approx(exponent, abs=0.2)


@pytest.mark.parametrize("name", ["lte", "lte-heun", "lte-ab2"])
def test_few_steps_of_lte_are_given_up(name: str) -> None:
    for tau in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        journal = steered(name, tolerance=tau)[1]
        assert journal.rejected <= 0.1 * len(journal.steps) + 1


@settings(max_examples=60)
@given(
    name=st.sampled_from(OWN),
    share=st.floats(0.0, 1.0),
    max_nfe=st.integers(30, 200) | st.just(MAX_NFE),
    start=st.sampled_from([0.0, 0.3, 0.495]),
    end=st.sampled_from([1.0, 0.746]),
    first_step=st.none() | st.floats(1e-3, 1.0),
)
def test_whatever_it_is_asked_it_lands_on_the_end_within_its_budget(
    name: str, share: float, max_nfe: int, start: float, end: float, first_step: float | None
) -> None:
    low, high = SETTINGS[EVERY[name].parameter]
    value = low * (high / low) ** share
    interval = GuidanceInterval(start, end)
    _, journal, seen = steered(name, **setting(name, value), max_nfe=max_nfe, interval=interval, first_step=first_step)
    assert journal.total_nfe == len(seen) <= max_nfe
    kept = journal.accepted
    assert kept[0].t == 0.0 and kept[-1].t + kept[-1].dt == pytest.approx(1.0, abs=1e-12)
    assert sum(step.dt for step in kept) == pytest.approx(1.0, abs=1e-9)
    assert all(a.t + a.dt == pytest.approx(b.t, abs=1e-12) for a, b in itertools.pairwise(kept))
    ends = {step.t for step in kept} | {1.0}
    assert {start, end} <= ends, "a step ends on every edge of the guidance interval"
    assert all(step.dt > 0 for step in journal.steps)


@pytest.mark.parametrize("name", OWN)
def test_guidance_acts_inside_its_interval_only(name: str) -> None:
    _, journal, seen = steered(name, **setting(name, 0.1), interval=GuidanceInterval(0.3, 0.7))
    for evaluation in seen:
        inside = 0.3 - 1e-9 <= evaluation.t <= 0.7 + 1e-9
        assert inside or not evaluation.guided
    assert {evaluation.guided for evaluation in seen} == {True, False}
    middle = [step for step in journal.accepted if 0.3 <= step.t < 0.7]
    assert middle and all(step.t + step.dt <= 0.7 + 1e-12 for step in middle)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("max_nfe", [9, 14, 20])
def test_a_budget_that_runs_short_is_said_and_kept(name: str, max_nfe: int) -> None:
    fine = 0.01 if EVERY[name].parameter == "constant" else 1e-6
    error, journal, _ = steered(name, **setting(name, fine), max_nfe=max_nfe)
    assert journal.is_budget_limited
    assert journal.total_nfe <= max_nfe
    assert np.isfinite(error)  # crude, but there


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "interval", [GuidanceInterval(), GuidanceInterval(0.3, 1.0), GuidanceInterval(0.3, 0.7)], ids=str
)
def test_the_least_budget_is_enough_and_less_is_refused(name: str, interval: GuidanceInterval) -> None:
    first, each = EVERY[name].min_nfe
    least = first + each * (len(interval.split_segments()) - 1)
    fine = 0.01 if EVERY[name].parameter == "constant" else 1e-6
    for max_nfe in range(least, least + 12):
        for refiner in (True, False):
            _, journal, _ = steered(name, **setting(name, fine), max_nfe=max_nfe, interval=interval, refiner=refiner)
            assert journal.total_nfe <= max_nfe
            assert sum(step.dt for step in journal.accepted) == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(RequestError, match=f"at most {least - 1}"):
        EVERY[name].check_budget(StepControl(max_nfe=least - 1, interval=interval))


def test_without_a_need_no_budget_is_short() -> None:
    assert not any(steered(name, **setting(name, 0.1))[1].is_budget_limited for name in OWN)


def test_a_first_step_that_is_too_long_is_given_up() -> None:
    for name in OWN:
        _, journal, _ = steered(name, first_step=0.9)
        assert journal.steps[0].dt == pytest.approx(0.9), "taken at its word"
    for name in ("lte", "lte-heun", "lte-ab2", "blocks"):
        _, journal, seen = steered(name, tolerance=1e-3, first_step=0.9)
        assert not journal.steps[0].accepted
        assert journal.steps[0].dt == pytest.approx(0.9)
        assert journal.steps[0].error is not None and journal.steps[0].error > 1
        assert any(evaluation.undo for evaluation in seen)
        assert journal.accepted[0].t == 0.0


def test_steps_of_the_norm_rule_are_c_over_the_size_of_the_slope() -> None:
    journal, sizes = Journal(), []
    control = StepControl(constant=0.1)
    steps = ADAPTIVE_RULES["norm"].steps(control, journal, START)
    evaluation = next(steps)
    with pytest.raises(StopIteration):
        while True:
            sizes.append(1.0 + 0.5 * evaluation.t)
            evaluation = steps.send(Feedback(0.0, sizes[-1]))
    lengths = [step.dt for step in journal.steps]
    np.testing.assert_allclose(lengths[:-2], 0.1 / np.array(sizes[: len(lengths) - 2]), rtol=1e-12)
    assert journal.rejected == 0


def test_blocks_are_tried_from_the_cheapest_and_every_try_is_counted() -> None:
    _, journal, seen = steered("blocks", tolerance=1e-3, first_step=0.3)
    tried = "".join(step.block if step.accepted else step.block.lower() for step in journal.steps)
    assert tried[0] == "h"  # nothing was handed on yet, and the step was too long
    assert set(tried.upper()) == {"H", "P", "R"}
    assert "rp" in tried or "rP" in tried, "P comes after an R that was given up"
    assert journal.nfe == {
        network: sum(evaluation.network == network for evaluation in seen) for network in ("predictor", "refiner")
    }
    of_refiner = [step for step in journal.steps if step.block == "R"]
    assert of_refiner and max(step.dt for step in of_refiner) <= MAX_REFINER_STEP + 1e-9


def test_without_a_refiner_none_is_tried() -> None:
    assert steered("blocks", tolerance=3e-3, refiner=False)[1].nfe["refiner"] == 0


@pytest.mark.parametrize("name", OWN)
def test_the_way_back(name: str) -> None:
    """From data to noise: the end of the way there is the start of the way back."""
    error, journal, _ = steered(name, **setting(name, finest(name)), backwards=True, refiner=False)
    assert error < 5e-3
    assert all(step.dt < 0 for step in journal.steps)
    np.testing.assert_allclose(solve_backwards(solve_forwards(START, 1.0)), START, rtol=1e-12)


TORCHDIFFEQ = {
    1e-3: (26, [0.4861009251482519, 0.7837772311234729, 0.8731546070377627, 0.9516064039210061]),
    1e-5: (44, [0.48597934699396195, 0.7847876179143162, 0.8743998259319775, 0.9520491946502725]),
}
"""torchdiffeq 0.2.5, odeint(slope, START, linspace(0, 1, 11), method="dopri5", rtol, atol = rtol / 1000), float64."""


@pytest.mark.parametrize("tolerance", list(TORCHDIFFEQ))
def test_the_reference_mode_is_torchdiffeqs_to_the_last_digits(tolerance: float) -> None:
    nfe, end = TORCHDIFFEQ[tolerance]
    journal = Journal()
    found = integrate(step_dopri5_reference(StepControl(tolerance=tolerance), journal, START), START, slope)
    np.testing.assert_allclose(found.ravel(), end, rtol=0, atol=1e-13)
    assert journal.nfe["predictor"] == nfe
    assert journal.steps[-1].t + journal.steps[-1].dt > 1.0, "it steps beyond the end and reads its polynomial there"


def fixed(name: str, steps: int, exponents: tuple[float, float], **options: float) -> tuple[float, Journal]:
    """Largest error of equal steps, and what they took.

    Every error that the controller reads makes it ask for the first step's length again: 0.9·E^(−a)·E_prev^b = 1.
    """
    journal, previous = Journal(), 1.0
    generator = EVERY[name].steps(StepControl(first_step=1 / steps, **options), journal, START)

    def watched() -> Any:
        nonlocal previous
        evaluation = next(generator)
        while True:
            yield evaluation
            if evaluation.update is not None:
                previous = (0.9 * previous ** exponents[1]) ** (1 / exponents[0])
            try:
                evaluation = generator.send(Feedback(previous, 1.0))
            except StopIteration:
                return None

    end = integrate(watched(), START, slope)
    assert len(journal.accepted) == len(journal.steps) == steps
    np.testing.assert_allclose([step.dt for step in journal.steps], 1 / steps)
    return float(np.abs(end - solve_forwards(START, 1.0)).max()), journal


def test_dopri5_converges_with_order_five() -> None:
    errors = [fixed("dopri5", steps, (1 / 5, 0.0), tolerance=10.0)[0] for steps in (64, 128)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(5, abs=0.15)


@pytest.mark.parametrize(
    ("name", "nfe_of_step", "nfe_of_start", "error_order"),
    [("norm", 1, 1, 2), ("norm-ab2", 1, 1, 3), ("lte", 1, 1, 2), ("lte-heun", 2, 0, 2), ("lte-ab2", 1, 1, 3)],
)
def test_equal_steps_converge_with_order_two_and_cost_what_they_say(
    name: str, nfe_of_step: int, nfe_of_start: int, error_order: int
) -> None:
    errors = []
    for steps in (64, 128):
        options = {"constant": 1 / steps} if name.startswith("norm") else {}
        error, journal = fixed(name, steps, (0.7 / error_order, 0.4 / error_order), **options)
        errors.append(error)
        assert journal.total_nfe == nfe_of_step * steps + nfe_of_start
    assert np.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tolerance": 0.0}, {"tolerance": float("nan")}, {"tolerance": 11.0}, {"constant": 0.0}, {"constant": 1e9},
        {"first_step": 0.0}, {"first_step": 1.5},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        StepControl(**wrong)
    assert caught.value.allowed


@given(st.floats(0.0, 0.99), st.floats(1e-4, 2.0))
def test_next_time_leaves_no_tiny_step(t: float, h: float) -> None:
    ends = [t]
    while ends[-1] != 1.0 and len(ends) < 20_000:
        ends.append(choose_step_end(ends[-1], h, 1.0))
    lengths = np.diff(ends)
    assert ends[-1] == 1.0
    assert lengths.max() <= max(h, 1e-12) * (1 + 1e-6)
    assert len(lengths) < 2 or lengths[-1] > 0.49 * min(h, lengths[0])


def test_an_image_counts_what_it_asks() -> None:
    journal = Journal()
    image = StepSession(StepControl(), journal)
    asked = image.evaluate([Evaluation("predictor", 0.0, {BASE: 1.0}, {BASE: 1.0, NEW: 0.1})])
    next(asked)
    with pytest.raises(StopIteration) as stop:
        asked.send(Feedback(0.5, 1.0))
    assert stop.value.value == Feedback(0.5, 1.0)
    assert (image.next_index, journal.nfe["predictor"], image.count_remaining()) == (1, 1, MAX_NFE - 1)
