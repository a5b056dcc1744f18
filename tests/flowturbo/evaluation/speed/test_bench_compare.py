"""Comparing reports: a planted regression is found, noise is not, and the two are told apart many times over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bench_reports import CONDITION, ENVIRONMENT, make_report, simulate_times

from flowturbo.evaluation.speed.report_diff import Verdict, compare_reports, decide_verdict
from flowturbo.evaluation.speed.statistics import Ratio
from runtime.system.errors import RequestError


def verdict(before: Any, after: Any, **options: Any) -> Verdict:
    return (
        compare_reports(make_report((CONDITION, before)), make_report((CONDITION, after)), **options).changes[0].verdict
    )


def test_a_tenth_slower_is_found_and_noise_is_not() -> None:
    """100 pairs of runs of a noisy machine: with the same speed, and with a tenth more planted in the second."""
    silent = [verdict(simulate_times(2 * seed), simulate_times(2 * seed + 1)) for seed in range(100)]
    planted = [verdict(simulate_times(2 * seed), 1.1 * simulate_times(2 * seed + 1)) for seed in range(100)]
    assert silent.count("slower") + silent.count("faster") <= 1
    assert planted.count("slower") >= 98
    assert "faster" not in planted


def test_a_tenth_faster_is_found_too() -> None:
    assert [verdict(1.1 * simulate_times(seed), simulate_times(seed + 100)) for seed in range(20)].count("faster") >= 19


def test_few_or_wild_samples_give_no_verdict() -> None:
    assert verdict([20.0] * 5, [30.0] * 50) == "too few samples"
    assert verdict(simulate_times(0, 8, noise=0.4), simulate_times(1, 8, noise=0.4)) == "unclear"
    assert verdict([20.0] * 20, [20.0] * 20) == "same"


@pytest.mark.parametrize(
    ("ratio", "machine", "expected"),
    [
        ((1.10, 1.07, 1.13), 1.0, "slower"),
        ((1.04, 1.02, 1.06), 1.0, "unclear"),  # certain, and too small for a verdict
        ((1.10, 1.07, 1.13), 1.09, "unclear"),  # the machine itself was as much slower
        ((1.20, 1.17, 1.23), 1.09, "slower"),
        ((0.90, 0.88, 0.92), 1.0, "faster"),
        ((0.90, 0.88, 0.92), 0.9, "unclear"),
        ((1.01, 0.98, 1.03), 1.0, "same"),
        ((1.00, 0.99, 1.01), 0.8, "unclear"),  # equal times on a machine that became faster
        ((1.10, 0.95, 1.30), 1.0, "unclear"),
    ],
)
def test_verdicts(ratio: tuple[float, float, float], machine: float, expected: str) -> None:
    assert decide_verdict(Ratio(*ratio, 0.99), machine, 0.05) == expected


def test_a_machine_that_was_slower_itself_is_named_and_not_blamed_on_the_engines() -> None:
    fixed = np.full(40, 2.0)
    before, after = (
        make_report((CONDITION, simulate_times(0)), yardstick=fixed),
        make_report((CONDITION, 1.1 * simulate_times(1)), yardstick=1.1 * fixed),
    )
    compared = compare_reports(before, after)
    assert compared.regressions == []
    assert any("the machine itself was 10% slower" in warning for warning in compared.warnings)


def test_the_stage_that_moved_is_named() -> None:
    before = make_report((CONDITION, [20.0] * 10))
    compared = compare_reports(before, make_report((CONDITION, [30.0] * 10)))
    assert compared.changes[0].stages["predictor"] == pytest.approx(1.5, rel=1e-4)
    assert compared.changes[0].stages["refiner"] is None


def test_many_conditions_may_not_add_up_to_a_false_alarm() -> None:
    alarms = 0
    for run in range(3):
        conditions = [(replace(CONDITION, batch=batch), batch) for batch in range(1, 21)]
        before, after = (
            make_report(*((c, simulate_times(1000 * run + 2 * b + which, 30)) for c, b in conditions))
            for which in (0, 1)
        )
        alarms += len(compare_reports(before, after).regressions)
    assert alarms == 0


def test_conditions_are_matched_and_the_rest_is_named() -> None:
    other, third = replace(CONDITION, batch=4), replace(CONDITION, sampler="H5")
    compared = compare_reports(
        make_report((CONDITION, simulate_times(0)), (other, simulate_times(1))),
        make_report((CONDITION, simulate_times(2)), (third, simulate_times(3))),
    )
    assert [change.name for change in compared.changes] == [CONDITION.name]
    assert (compared.only_before, compared.only_after) == ((other.name,), (third.name,))
    with pytest.raises(RequestError, match="no condition in common") as raised:
        compare_reports(make_report((other, simulate_times(0))), make_report((third, simulate_times(1))))
    assert "flowturbo-bench engines" in raised.value.remedy


def test_one_directory_each_is_compared_whatever_its_name() -> None:
    renamed = replace(CONDITION, engine="engines-int8", precision="int8")
    after = make_report((renamed, simulate_times(1)), engines={"engines-int8": {"hash": "def"}})
    compared = compare_reports(make_report((CONDITION, simulate_times(0))), after)
    assert len(compared.changes) == 1
    assert "engine hashes: abc before, def after" in compared.warnings
    assert "precision: fp32 before, int8 after" in compared.warnings


def test_another_machine_is_warned_of() -> None:
    there = {**ENVIRONMENT, "cpu": {**ENVIRONMENT["cpu"], "model": "another"}, "versions": {"numpy": "3"}}  # type: ignore[dict-item]
    warned = compare_reports(
        make_report((CONDITION, simulate_times(0))), make_report((CONDITION, simulate_times(1)), environment=there)
    ).warnings
    assert warned == ("CPU model: a CPU before, another after", "numpy: 2 before, 3 after")


def test_a_least_effect_must_be_one() -> None:
    with pytest.raises(RequestError, match="least effect 5"):
        verdict([1.0], [1.0], min_effect=5)
