"""Percentiles that samples can carry, and intervals of ratios that hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowturbo.evaluation.speed.statistics import MIN_SAMPLES, compute_median_ratio, count_required_samples, summarise

TIMES = st.lists(st.floats(0.01, 1e5), min_size=1, max_size=200)


@pytest.mark.parametrize(("percentile", "needed"), [(50, 1), (90, 10), (95, 20), (99, 100)])
def test_a_percentile_needs_a_sample_above_it(percentile: int, needed: int) -> None:
    assert count_required_samples(percentile) == needed
    name = f"p{percentile}_ms"
    assert getattr(summarise(np.arange(needed) + 1.0), name) is not None
    assert needed == 1 or getattr(summarise(np.arange(needed - 1) + 1.0), name) is None


def test_no_samples_have_no_statistics() -> None:
    empty = summarise([])
    assert empty.count == 0
    assert {getattr(empty, name) for name in ("mean_ms", "p50_ms", "min_ms", "max_ms", "sd_ms")} == {None}


@given(TIMES)
def test_statistics_are_in_order_and_keep_the_outliers(times: list[float]) -> None:
    found = summarise(times)
    known = [
        v for v in (found.min_ms, found.p50_ms, found.p90_ms, found.p95_ms, found.p99_ms, found.max_ms) if v is not None
    ]
    assert known == sorted(known)
    assert found.max_ms == pytest.approx(max(times), abs=1e-4)
    assert found.min_ms == pytest.approx(min(times), abs=1e-4)


def drifting(random: np.random.Generator, count: int, noise: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Times near 20 ms: neighbours alike (AR 0.5), and one in twenty late."""
    mood, moods = 0.0, []
    for _ in range(count):
        mood = 0.5 * mood + noise * random.standard_normal()
        moods.append(mood)
    late = np.where(random.random(count) < 0.05, random.exponential(0.3, count), 0.0)
    return 20.0 * np.exp(np.asarray(moods)) * (1 + late)


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    """95 % of 300 pairs of noisy series whose medians differ by 10 % on average; neighbours are not independent."""
    held, widths = 0, []
    for seed in range(300):
        random = np.random.Generator(np.random.Philox(seed))
        a, b = drifting(random, 60, 0.02), 1.1 * drifting(random, 60, 0.02)
        found = compute_median_ratio(a.tolist(), b.tolist(), confidence=0.95)
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.value <= found.high
        held += found.low <= 1.1 <= found.high
        widths.append(found.high - found.low)
    assert held / 300 >= 0.94
    assert np.mean(widths) < 0.1  # an interval that is wide enough for anything would say nothing


def test_what_both_share_falls_out_of_a_paired_ratio() -> None:
    random = np.random.Generator(np.random.Philox(1))
    mood = 1 + 0.5 * np.abs(np.sin(np.arange(40) / 3))  # the machine was up to half slower, for both
    a, b = 20 * mood * random.normal(1, 0.004, 40), 21 * mood * random.normal(1, 0.004, 40)
    paired, apart = (compute_median_ratio(a.tolist(), b.tolist(), paired=p) for p in (True, False))
    assert paired.low is not None
    assert paired.high is not None
    assert apart.low is not None
    assert apart.high is not None
    assert paired.low > 1.0
    assert paired.high - paired.low < 0.25 * (apart.high - apart.low)


def test_few_samples_have_a_ratio_and_no_interval() -> None:
    found = compute_median_ratio([1.0] * (MIN_SAMPLES - 1), [2.0] * 100)
    assert (found.value, found.low, found.high) == (2.0, None, None)


def test_the_same_samples_give_the_same_interval() -> None:
    times = np.random.Generator(np.random.Philox(0)).exponential(1, (2, 30)).tolist()
    assert compute_median_ratio(*times) == compute_median_ratio(*times)
