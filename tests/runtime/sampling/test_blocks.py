"""The schedule grammar, its errors, and what blocks hand on."""

from __future__ import annotations

import contextlib
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.sampling.blocks import MAX_REFINER_STEP, BlockSchedule, parse_schedule, plan_flowturbo
from runtime.sampling.history import assign_slots
from runtime.sampling.plan import count_evaluations
from runtime.system.errors import FlowTurboError, RequestError

counts = st.integers(0, 30)


@given(h=counts, p=counts, r=counts)
def test_reads_what_it_writes(h: int, p: int, r: int) -> None:
    text = f"H{h}P{p}R{r}"
    if h + p == 0:
        with pytest.raises(RequestError):
            parse_schedule(text)
        return
    schedule = parse_schedule(text)
    assert schedule.blocks == ("H",) * h + ("P",) * p + ("R",) * r
    assert schedule.steps == h + p + r
    assert schedule.needs_refiner == (r > 0)
    assert parse_schedule(str(schedule)) == schedule
    assert "0" not in [
        block_count for block_count in str(schedule).replace("H", " ").replace("P", " ").replace("R", " ").split()
    ]


@given(h=st.integers(0, 6), p=st.integers(0, 6), r=st.integers(0, 6))
def test_evaluations_follow_from_the_blocks(h: int, p: int, r: int) -> None:
    if h + p == 0:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = plan_flowturbo(parse_schedule(f"H{h}P{p}R{r}"))
    assign_slots(plan)
    assert count_evaluations(plan, "predictor") == 2 * h + p + (
        h == 0
    )  # the first P without a slope evaluates both ends
    assert count_evaluations(plan, "refiner") == 2 * r
    assert all(evaluation.condition is not None for evaluation in plan if evaluation.network == "refiner")


@given(st.text(max_size=12))
def test_any_text_is_a_schedule_or_a_message(text: str) -> None:
    with contextlib.suppress(FlowTurboError):
        parse_schedule(text)


@pytest.mark.parametrize(
    "text", ["", "H", "1H", "H1P", "H1 P5", "H-1", "X3", "H1P5R3!", "H1.5", "heun", "H1,P5", "H99999"]
)
def test_what_is_no_schedule_shows_the_grammar(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_schedule(text)
    assert repr(text) in caught.value.given
    assert "H1P5R3" in caught.value.allowed


@pytest.mark.parametrize("text", ["R3", "R1H2", "H0R3", "P0R1"])
def test_a_refiner_needs_a_velocity(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_schedule(text, force=True)
    assert "velocity" in caught.value.given and "H1R3" in caught.value.remedy


@pytest.mark.parametrize("text", ["H1R2P3", "H1R1H1", "P2R1P1R1"])
def test_orders_that_fail_are_refused_unless_forced(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_schedule(text)
    assert "FID" in caught.value.given and "last" in caught.value.allowed and "--force" in caught.value.remedy
    assert str(parse_schedule(text, force=True)) == text


@pytest.mark.parametrize("text", ["H0", "P0H0", "H1000P1"])
def test_numbers_of_steps(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_schedule(text)
    assert "1 to 1000" in caught.value.allowed


def test_lower_case_and_spaces_around_are_read() -> None:
    assert parse_schedule(" h1p5r3\n") == parse_schedule("H1P5R3")
    assert parse_schedule("H1H1P2P3") == BlockSchedule(("H", "H", "P", "P", "P", "P", "P"))


def test_long_refiner_steps_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"0\.200 .* longer than the 0\.12"):
        plan_flowturbo(parse_schedule("H1P2R2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_flowturbo(parse_schedule("H1P5R3"))
        plan_flowturbo(parse_schedule("H2"))  # long steps of a predictor are its user's affair
    assert MAX_REFINER_STEP > 1 / 9


def test_a_refiner_block_reads_the_incoming_velocity_twice_and_hands_on_its_first_slope() -> None:
    plan = plan_flowturbo(parse_schedule("H7R2"))
    first, second, third, fourth = plan[14:]
    assert (first.condition, first.add, second.condition, second.add) == (13, 13, 13, 14)
    assert (third.condition, third.add) == (14, 14)
    assert (fourth.condition, fourth.add) == (14, 16)
    assert first.update is None and second.update is not None
    consistent = plan_flowturbo(parse_schedule("H7R2", consistent=True))[14:]
    assert [(e.condition, e.add) for e in consistent] == [(13, 13), (14, 14), (15, 15), (16, 16)]


def test_a_pseudo_corrector_asks_only_at_the_predicted_point() -> None:
    plan = plan_flowturbo(parse_schedule("H1P2"))
    assert [evaluation.t for evaluation in plan] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [evaluation.block for evaluation in plan] == ["H", "H", "P", "P"]
    assert plan[2].point == pytest.approx({"base": 1.0, 1: 1 / 3})
