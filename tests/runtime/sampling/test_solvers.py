"""Solvers: order of convergence against a closed form, evaluations by counting, tables by their sums and moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problem import START, slope, solve_forwards

from runtime.sampling.blocks import parse_schedule, plan_flowturbo
from runtime.sampling.grids import Grid, build_shifted_grid, build_uniform_grid, build_warped_grid
from runtime.sampling.history import assign_slots
from runtime.sampling.plan import HISTORY, NEW, Evaluation, combine, count_evaluations, integrate
from runtime.sampling.sampler import Sampler, SamplerChoice, resolve_sampler
from runtime.sampling.solvers import SOLVERS, build_searched_grid
from runtime.sampling.tableaus import RUNGE_KUTTA, SEARCHED_TABLES
from runtime.system.errors import RequestError

ORDERED = [name for name, solver in SOLVERS.items() if solver.order > 0]
WINDOW = 0.15
Method = Callable[[Grid], Sequence[Evaluation]]
GRIDS: dict[str, Callable[[int], Grid]] = {
    "uniform": build_uniform_grid,
    "shifted": lambda n: build_shifted_grid(n, 1.8),
    "warped": lambda n: build_warped_grid(n, 1.4),
}


def sampler(schedule: str | None = None, solver: str | None = None, steps: int | None = None, **more: Any) -> Sampler:
    return resolve_sampler(SamplerChoice(schedule=schedule, solver=solver, steps=steps, **more))


def error_of(plan: Sequence[Evaluation]) -> float:
    assign_slots(plan)
    end = integrate(plan, START, slope)
    return float(np.abs(end - solve_forwards(START, 1.0)).max())


def order_of(method: Method, grid: Callable[[int], Grid], finest: int = 256) -> float:
    """Order over the finest pair of grids, the finer with half the steps of the coarser."""
    coarse, fine = error_of(method(grid(finest // 2))), error_of(method(grid(finest)))
    return float(np.log2(coarse / fine))


def blocks(text: str) -> Method:
    """A schedule of one kind of block on any grid."""
    return lambda grid: plan_flowturbo(parse_schedule(f"{text}{len(grid) - 1}"), grid)


def test_solution_solves_the_problem() -> None:
    h = 1e-5
    for t in (0.1, 0.5, 0.9):
        numerical = (solve_forwards(START, t + h) - solve_forwards(START, t - h)) / (2 * h)
        np.testing.assert_allclose(numerical, slope(solve_forwards(START, t), t), rtol=1e-8)


@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("name", ORDERED)
def test_order_of_convergence(name: str, grid: str) -> None:
    solver = SOLVERS[name]
    if solver.has_own_grid and grid != "uniform":
        pytest.skip("has a grid of its own")
    order = order_of(solver.plan, solver.grid if solver.has_own_grid else GRIDS[grid])
    assert order == pytest.approx(solver.order, abs=WINDOW)


@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("block", ["H", "P"])
def test_blocks_are_of_order_two(block: str, grid: str) -> None:
    assert order_of(blocks(block), GRIDS[grid]) == pytest.approx(2, abs=WINDOW)


@pytest.mark.parametrize("grid", list(GRIDS))
def test_mixed_blocks_are_of_order_two(grid: str) -> None:
    def half(points: Grid) -> Sequence[Evaluation]:
        steps = len(points) - 1
        return plan_flowturbo(parse_schedule(f"H{steps // 4}P{steps - steps // 4}"), points)

    assert order_of(half, GRIDS[grid]) == pytest.approx(2, abs=WINDOW)


@pytest.mark.filterwarnings("ignore:refiner steps")
@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("consistent", [False, True])
def test_refiner_blocks_with_an_exact_refiner_are_of_order_two(grid: str, consistent: bool) -> None:
    """A refiner that gives the very slope at (x, t) makes R a Heun step; the released one reads the slope before."""

    def error(steps: int) -> float:
        plan = plan_flowturbo(parse_schedule(f"H1R{steps - 1}", consistent=consistent), GRIDS[grid](steps))
        assign_slots(plan)
        end = integrate(plan, START, slope, lambda x, t, v, add: (slope(x, t) - v) + v + 0 * add)
        return float(np.abs(end - solve_forwards(START, 1.0)).max())

    assert np.log2(error(128) / error(256)) == pytest.approx(2, abs=WINDOW)


@pytest.mark.parametrize("order", sorted(RUNGE_KUTTA))
def test_runge_kutta_starts_keep_their_order_conditions(order: int) -> None:
    table = RUNGE_KUTTA[order]
    assert [sum(row) for row in table.a] == list(table.c)
    for power in range(order):  # Σ b·c^p = 1 / (p + 1)
        assert sum(b * c**power for b, c in zip(table.b, table.c, strict=True)) == pytest.approx(1 / (power + 1), abs=0)


def evaluations_of(name: str, steps: int) -> dict[str, int]:
    """Counted by a velocity that counts."""
    calls = {"predictor": 0}

    def counting(x: Any, t: float) -> Any:
        calls["predictor"] += 1
        return slope(x, t)

    plan = sampler(None, name, steps).plan
    integrate(plan, START, counting)
    assert count_evaluations(plan, "predictor") == calls["predictor"] and count_evaluations(plan, "refiner") == 0
    return calls


@pytest.mark.parametrize(
    ("name", "steps", "nfe"),
    [
        ("euler", 10, 10),
        ("heun", 10, 20),
        ("ab2", 10, 11),
        ("ab3", 10, 14),
        ("ab4", 10, 19),
        ("searched", 8, 8),
        ("euler", 1, 1),
        ("ab4", 1, 4),
    ],
)
def test_evaluations_by_counting(name: str, steps: int, nfe: int) -> None:
    assert evaluations_of(name, steps)["predictor"] == nfe


@pytest.mark.parametrize("name", list(SOLVERS))
def test_every_solver_takes_the_evaluations_that_it_counts(name: str) -> None:
    for steps in (5, 8) if SOLVERS[name].has_own_grid else (1, 4, 9):
        assert evaluations_of(name, steps)["predictor"] >= steps


@pytest.mark.filterwarnings("ignore:refiner steps")
@pytest.mark.parametrize(
    ("schedule", "predictor", "refiner"),
    [
        ("H1P5R3", 7, 6),
        ("H2P8R2", 12, 4),
        ("H8P9R5", 25, 10),
        ("P3", 4, 0),
        ("H0P4R2", 5, 4),
        ("H2R3", 4, 6),
        ("H1", 2, 0),
    ],
)
def test_evaluations_of_schedules(schedule: str, predictor: int, refiner: int) -> None:
    calls = {"predictor": 0, "refiner": 0}

    def predict(x: Any, t: float) -> Any:
        calls["predictor"] += 1
        return slope(x, t)

    def refine(x: Any, t: float, v: Any, add: Any) -> Any:
        calls["refiner"] += 1
        return slope(x, t)

    plan = sampler(schedule).plan
    integrate(plan, START, predict, refine)
    assert calls == {"predictor": predictor, "refiner": refiner}
    assert (count_evaluations(plan, "predictor"), count_evaluations(plan, "refiner")) == (predictor, refiner)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_steps_are_steps_and_the_history_holds_them(name: str) -> None:
    solver = SOLVERS[name]
    for steps in (5, 8, 10) if solver.has_own_grid else (1, 2, 3, 17, 40):
        plan = sampler(None, name, steps).plan
        assign_slots(plan)
        assert sum(evaluation.update is not None for evaluation in plan) == steps
        assert len([1 for e in plan if e.update is not None and not {NEW} & set(e.update)]) == 0
        assert sampler(None, name, steps).name == f"{name}-{steps}"


@pytest.mark.parametrize("name", list(SOLVERS))
def test_constant_slopes_are_integrated_exactly(name: str) -> None:
    """Every step's coefficients sum to its length, so a constant velocity lands exactly on data."""
    plan = sampler(None, name, SOLVERS[name].default_steps).plan
    end = integrate(plan, START, lambda x, t: np.full_like(x, 0.75))
    np.testing.assert_allclose(end, START + 0.75, rtol=1e-13)


@pytest.mark.parametrize("steps", sorted(SEARCHED_TABLES))
def test_searched_tables(steps: int) -> None:
    """Shape, sums (Δt sum to 1 to their four decimals; each row's weights sum to 1) and first moments."""
    table, grid = SEARCHED_TABLES[steps], build_searched_grid(steps)
    assert len(table.step_sizes) == len(table.coefficients) == steps
    assert [len(row) for row in table.coefficients] == list(range(steps))
    assert sum(table.step_sizes) == pytest.approx(1, abs=2e-3)
    assert grid[0] == 0.0 and grid[-1] == 1.0
    np.testing.assert_allclose(np.diff(grid), np.array(table.step_sizes) / sum(table.step_sizes), rtol=1e-12)
    plan = SOLVERS["searched"].plan(grid)
    for index, evaluation in enumerate(plan):
        assert evaluation.update is not None
        h = grid[index + 1] - grid[index]
        weights = {key: value for key, value in evaluation.update.items() if key != "base"}
        assert sum(weights.values()) == pytest.approx(h, rel=1e-12)
    # A linear velocity v(t) = t is integrated to 1/2 by every published table, to what its rounding allows.
    assert float(integrate(plan, np.float64(0.0), lambda x, t: np.float64(t))) == pytest.approx(0.5, abs=0.02)


PUBLISHED = """
    N=5 Δt .0521 .1475 .2114 .2797 .3092; [-1.26] [1.38,-2.26] [0,0,-.92] [0,0,0,-.70]
    N=6 Δt .0391 .0924 .1650 .2015 .2511 .2511; [-1.22] [1.12,-2.00] [-.30,.90,-1.56] [0,0,0,-.74] [0,0,0,0,-.62]
    N=7 Δt .0387 .0748 .1030 .1537 .1840 .2340 .2117; [-1.11] [1.03,-1.99] [.07,.43,-1.57] [-.21,-.15,1.53,-2.29] [-.05,.07,-.23,.61,-1.33] [-.17,.31,-.41,.17,.59,-1.31]
    N=8 Δt .0071 .0613 .0780 .1163 .1421 .1880 .2077 .1996; [-2.43] [.61,-1.55] [.99,-.11,-2.07] [.05,-.49,1.33,-1.93] [.05,-.33,.23,.73,-1.71] [-.09,.25,-.29,.05,.61,-1.45] [-.23,.21,-.01,-.25,.25,.41,-1.25]
    N=9 Δt .0017 .0510 .0636 .0911 .1007 .1443 .1694 .1910 .1872; [-6.19] [-.11,-.81] [.73,-.17,-1.37] [.31,-.05,.19,-1.45] [.03,-.23,.29,.35,-1.35] [-.19,.05,.01,.21,.25,-1.23] [-.23,.21,-.13,.17,.09,.09,-1.09] [-.17,.15,.11,-.19,.03,.23,.17,-1.21]
    N=10 Δt .0016 .0538 .0347 .0853 .0853 .1198 .1351 .1650 .1788 .1406; [-7.8801] [-.40,-.74] [.48,-.18,-.86] [.26,-.04,-.04,-1.28] [0,-.06,.26,.26,-1.42] [-.10,-.06,.08,.20,.22,-1.24] [-.18,.14,-.08,.10,.08,.14,-1.06] [-.12,.16,-.10,.04,.08,.06,.08,-1.02] [-.16,.02,.14,0,-.14,.08,.14,.34,-1.38]
"""


@pytest.mark.parametrize("line", PUBLISHED.strip().splitlines(), ids=lambda line: line.split(" Δt")[0].strip())
def test_searched_tables_are_the_published_ones(line: str) -> None:
    """A second transcription of arXiv 2505.21114's tables: a slip of one would have to be made twice."""
    head, *rows = line.strip().split("; ", 1)
    name, steps = head.split(" Δt ")
    table = SEARCHED_TABLES[int(name.removeprefix("N="))]
    assert table.step_sizes == tuple(float(value) for value in steps.split())
    published = [tuple(float(value) for value in row.split(",")) for row in rows[0].strip("[]").split("] [")]
    assert list(table.coefficients) == [(), *published]


@pytest.mark.parametrize("steps", [0, 4, 11, 100])
def test_searched_has_published_steps_only(steps: int) -> None:
    with pytest.raises(RequestError) as caught:
        sampler(None, "searched", steps)
    assert "5 to 10" in caught.value.allowed


def test_adams_bashforth_2_on_a_uniform_grid_has_the_textbook_coefficients() -> None:
    last = SOLVERS["ab2"].plan(build_uniform_grid(4))[-1]
    assert last.update is not None
    previous, new = (value for key, value in last.update.items() if key != "base")
    assert (previous, new) == pytest.approx((-0.5 / 4, 1.5 / 4), rel=1e-12)


@pytest.mark.parametrize("name", [*SOLVERS, "H2P4"])
def test_numpy_and_torch_give_the_same(name: str) -> None:
    plan = sampler(name).plan if name not in SOLVERS else sampler(None, name).plan

    def in_torch(x: torch.Tensor, t: float) -> torch.Tensor:
        return x * (1 - x) * float(3.0 * np.cos(3.0 * t) + 2.0)

    found = integrate(plan, torch.from_numpy(START), in_torch).numpy()
    np.testing.assert_allclose(found, integrate(plan, START, slope), rtol=1e-13)


def test_slots_are_given_to_what_is_still_needed() -> None:
    """A slope that is read again outlives any number of others; one that nobody reads gives its slot away."""
    first = Evaluation("predictor", 0.0, {"base": 1.0})
    others = [Evaluation("predictor", 0.0, {"base": 1.0}, {"base": 1.0, NEW: 0.1}) for _ in range(3 * HISTORY)]
    last = Evaluation("predictor", 0.0, {"base": 1.0, 0: 0.1}, {"base": 1.0, NEW: 0.1})
    placed = assign_slots([first, *others, last])
    assert placed[-1].slots[0] == placed[0].slope_slot
    assert all(slots.slope_slot != placed[0].slope_slot for slots in placed[1:])


def test_a_history_that_does_not_suffice_is_refused() -> None:
    many = [Evaluation("predictor", 0.0, {"base": 1.0}) for _ in range(HISTORY)]
    reads_all = Evaluation("predictor", 0.0, {"base": 1.0, **{i: 0.1 for i in range(HISTORY)}})
    with pytest.raises(AssertionError, match="more than the 16 slots"):
        assign_slots([*many, reads_all])
    assign_slots([*many[1:], Evaluation("predictor", 0.0, {"base": 1.0, **{i: 0.1 for i in range(HISTORY - 1)}})])
    with pytest.raises(AssertionError, match="not in the history"):
        assign_slots([Evaluation("predictor", 0.0, {"base": 1.0, 0: 0.1})])  # reads itself


@given(st.dictionaries(st.integers(0, 5), st.floats(-3, 3), min_size=1), st.floats(-2, 2))
def test_combinations_are_sums(coefficients: dict[int, float], base: float) -> None:
    slopes = {key: float(key) + 1 for key in coefficients}
    expected = base + sum(value * slopes[key] for key, value in coefficients.items())
    assert combine({"base": 1.0, **coefficients}, base, slopes) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "solver", "steps"),
    [
        (None, None, None),
        ("H1P5R3", "euler", None),
        (None, "rk9000", 4),
        ("H1P5R3", None, 8),
        (None, "flowturbo", None),
        (None, "euler", 0),
        (None, "heun", 1001),
    ],
)
def test_impossible_samplers_say_what_is_possible(schedule: str | None, solver: str | None, steps: int | None) -> None:
    with pytest.raises(RequestError) as caught:
        sampler(schedule, solver, steps)
    assert caught.value.given and (caught.value.allowed or caught.value.remedy)


def test_a_grid_of_ones_own() -> None:
    grid = build_shifted_grid(6, 2.0)
    assert [e.t for e in sampler(None, "euler", grid=grid).plan] == list(grid[:-1])
    with pytest.raises(RequestError, match="its own"):
        sampler(None, "searched", grid=grid)
    with pytest.raises(RequestError, match="7 points"):
        sampler("H6", grid=build_shifted_grid(5, 2.0))
