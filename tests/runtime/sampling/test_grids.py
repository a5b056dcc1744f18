"""Time grids: exact ends, rising points, and no other numbers."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.sampling.grids import (
    Grid,
    build_explicit_grid,
    build_grid_from_steps,
    build_shifted_grid,
    build_uniform_grid,
    build_warped_grid,
)
from runtime.system.errors import RequestError

steps = st.integers(1, 1000)


def check(grid: Grid, count: int) -> None:
    assert len(grid) == count + 1
    assert grid[0] == 0.0 and grid[-1] == 1.0
    assert all(a < b for a, b in itertools.pairwise(grid))


@given(steps)
def test_uniform(n: int) -> None:
    grid = build_uniform_grid(n)
    check(grid, n)
    assert grid[n // 2] == (n // 2) / n  # from the index: no error adds up


@given(steps, st.floats(0.05, 20))
def test_shifted(n: int, shift: float) -> None:
    check(build_shifted_grid(n, shift), n)


def test_shift_moves_towards_the_noise() -> None:
    assert build_shifted_grid(4, 3.0)[2] == pytest.approx(0.25)
    assert build_shifted_grid(10, 1.0) == pytest.approx(build_uniform_grid(10))
    assert all(a <= b for a, b in zip(build_shifted_grid(10, 2.0), build_uniform_grid(10), strict=True))


@given(st.integers(1, 200), st.floats(0.2, 4))
def test_warped(n: int, power: float) -> None:
    check(build_warped_grid(n, power), n)


def test_warp_of_one_is_uniform() -> None:
    assert build_warped_grid(7, 1.0) == build_uniform_grid(7)
    assert build_warped_grid(2, 2.0) == (0.0, 0.25, 1.0)


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=40))
def test_steps_are_renormalised(lengths: list[float]) -> None:
    check(build_grid_from_steps(lengths), len(lengths))


@given(st.lists(st.floats(0.001, 0.999), unique=True, max_size=20))
def test_explicit(points: list[float]) -> None:
    check(build_explicit_grid([0.0, *sorted(points), 1.0]), len(points) + 1)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [0.0],
        [0.0, 0.5],
        [0.1, 1.0],
        [0.0, 0.6, 0.5, 1.0],
        [0.0, 0.5, 0.5, 1.0],
        [0.0, math.nan, 1.0],
        [1.0, 0.0],
        [0.0, 0.999999],
    ],
)
def test_what_is_no_grid(points: list[float]) -> None:
    with pytest.raises(RequestError) as caught:
        build_explicit_grid(points)
    assert "first 0" in caught.value.allowed


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_numbers_of_steps(n: int) -> None:
    for grid in (build_uniform_grid, lambda n: build_shifted_grid(n, 2.0), lambda n: build_warped_grid(n, 2.0)):
        with pytest.raises(RequestError, match=f"{n} steps"):
            grid(n)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_shift_and_power_are_positive_numbers(value: float) -> None:
    for grid in (build_shifted_grid, build_warped_grid):
        with pytest.raises(RequestError, match="positive"):
            grid(4, value)
