"""Stochastic samplers: what a last step and a form are, orders fitted over many paths, evaluations counted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from fakes import NULL, integrate_reference, make_loop, make_noise
from numpy.typing import NDArray

from runtime.execution.fixed_loop import Usage
from runtime.sampling.grids import build_uniform_grid
from runtime.sampling.guidance import build_class_branches
from runtime.sampling.noise import NoiseStream
from runtime.sampling.plan import BASE, NEW, NoiseDraw, count_draws, count_evaluations, integrate
from runtime.sampling.sampler import SamplerChoice, resolve_sampler
from runtime.sampling.sde import DIFFUSION_FORMS, LAST_STEPS, SBDM_START, Diffusion
from runtime.sampling.solvers import STOCHASTIC_SOLVERS
from runtime.system.errors import RequestError

WINDOW = 0.3


@pytest.mark.parametrize(
    ("form", "t", "expected"),
    [
        ("constant", 0.4, 1.5),
        ("SBDM", 0.4, 1.5 * 0.6 / 0.4),
        ("sigma", 0.4, 1.5 * 0.6),
        ("linear", 0.4, 1.5 * 0.6),
        ("decreasing", 0.4, 0.25 * (1.5 * math.cos(0.4 * math.pi) + 1) ** 2),
        ("increasing-decreasing", 0.4, 1.5 * math.sin(0.4 * math.pi) ** 2),
    ],
)
def test_forms_are_sits(form: str, t: float, expected: float) -> None:
    assert DIFFUSION_FORMS[form].diffusion(t, 1.5) == pytest.approx(expected, rel=1e-12)
    assert DIFFUSION_FORMS[form].ratio(t, 1.5) == pytest.approx(expected / (1 - t), rel=1e-12)


@pytest.mark.parametrize("form", list(DIFFUSION_FORMS))
def test_ratios_go_to_their_limit(form: str) -> None:
    limit = DIFFUSION_FORMS[form].ratio(1.0, 1.0)
    near = DIFFUSION_FORMS[form].ratio(1.0 - 1e-6, 1.0)
    assert math.isinf(limit) and near > 1e5 if math.isinf(limit) else near == pytest.approx(limit, abs=1e-3)


@pytest.mark.parametrize("last", LAST_STEPS)
@pytest.mark.parametrize("name", list(STOCHASTIC_SOLVERS))
def test_evaluations_and_draws_by_counting(name: str, last: str) -> None:
    steps = 12
    plan = resolve_sampler(SamplerChoice(solver=name, steps=steps, diffusion=Diffusion(last_step=last))).plan
    noisy = steps if last == "none" else steps - 1
    each = 1 if name == "sde-euler" else 2
    assert count_evaluations(plan, "predictor") == noisy * each + (last != "none")
    assert count_draws(plan) == noisy
    assert sum(evaluation.update is not None for evaluation in plan) == steps, "steps count the last one"
    calls = []
    integrate(plan, np.zeros((1, 1, 1, 1)), lambda x, t: calls.append(t) or x, noise=[np.zeros(1)] * noisy)
    assert len(calls) == len(plan)


def test_last_steps() -> None:
    def last(kind: str) -> Any:
        return resolve_sampler(
            SamplerChoice(solver="sde-euler", steps=5, diffusion=Diffusion("sigma", 1.0, kind, 0.1))
        ).plan[-1]

    assert last("euler").t == pytest.approx(0.9)
    assert last("euler").update == {BASE: 1.0, NEW: 0.1}
    assert last("tweedie").update == pytest.approx({BASE: 1.0, NEW: 0.1})
    assert last("mean").update == pytest.approx({BASE: 1 - 0.1 * 1.0, NEW: 0.1 * (1 + 0.9)})  # ratio of sigma: 1
    assert last("none").t == pytest.approx(0.8)


def test_sbdm_starts_where_it_is_finite() -> None:
    plan = resolve_sampler(SamplerChoice(solver="sde-euler", steps=5, diffusion=Diffusion("SBDM"))).plan
    assert plan[0].t == SBDM_START
    assert all(math.isfinite(value) for e in plan for value in (e.update or {}).values())


def test_without_noise_it_is_the_flow() -> None:
    still = Diffusion(norm=0.0, last_step="none")
    plan = resolve_sampler(SamplerChoice(solver="sde-euler", steps=8, diffusion=still)).plan
    flow = resolve_sampler(SamplerChoice(solver="euler", steps=8)).plan
    x, drawn = np.array([[[[0.3]]]]), [np.ones((1, 1, 1, 1))] * 8
    found = integrate(plan, x, lambda x, t: np.sin(3 * x + t), noise=drawn)
    np.testing.assert_allclose(found, integrate(flow, x, lambda x, t: np.sin(3 * x + t)), rtol=1e-12)


SPREAD, MEAN = 0.6, 0.4


def gaussian(x: Any, t: float) -> Any:
    """Velocity from N(0, 1) to N(MEAN, SPREAD²): every form of the diffusion keeps these marginals."""
    variance = (1 - t) ** 2 + (t * SPREAD) ** 2
    return MEAN + (t * SPREAD**2 - (1 - t)) / variance * (x - t * MEAN)


@pytest.mark.parametrize("name", list(STOCHASTIC_SOLVERS))
@pytest.mark.parametrize("form", list(DIFFUSION_FORMS))
def test_marginals_are_the_datas(name: str, form: str) -> None:
    paths, random = 40_000, np.random.Generator(np.random.Philox(3))
    plan = resolve_sampler(SamplerChoice(solver=name, steps=100, diffusion=Diffusion(form, last_step="euler"))).plan
    drawn = [random.standard_normal(paths) for _ in range(count_draws(plan))]
    end = integrate(plan, random.standard_normal(paths), gaussian, noise=drawn)
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(end.std()) == pytest.approx(SPREAD, abs=0.05)  # the last, noiseless step narrows it a little


def strong_error(name: str, steps: int, finest: NDArray[np.float64], fine_end: NDArray[np.float64]) -> float:
    """Against the same Brownian path on a fine grid: its increments are summed over each coarse step."""
    ratio = len(finest) // steps
    coarse = finest.reshape(steps, ratio, -1).sum(axis=1) / math.sqrt(ratio)
    plan = STOCHASTIC_SOLVERS[name].plan(build_uniform_grid(steps), Diffusion("increasing-decreasing", 1.0, "none"))
    end = integrate(plan, np.full(finest.shape[1], 0.2), gaussian, noise=list(coarse))
    return float(np.mean(np.abs(end - fine_end)))


@pytest.mark.parametrize("name", list(STOCHASTIC_SOLVERS))
def test_strong_order(name: str) -> None:
    random = np.random.Generator(np.random.Philox(11))
    finest = random.standard_normal((1000, 2000))
    plan = STOCHASTIC_SOLVERS[name].plan(build_uniform_grid(1000), Diffusion("increasing-decreasing", 1.0, "none"))
    fine = integrate(plan, np.full(2000, 0.2), gaussian, noise=list(finest))
    steps = np.array([10, 20, 40, 100])
    errors = [strong_error(name, n, finest, fine) for n in steps]
    fitted = -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])
    assert fitted == pytest.approx(STOCHASTIC_SOLVERS[name].order, abs=WINDOW)


@pytest.mark.parametrize("name", list(STOCHASTIC_SOLVERS))
@pytest.mark.parametrize("last", ["mean", "none"])
def test_engines_are_given_the_draws(name: str, last: str) -> None:
    plan = resolve_sampler(
        SamplerChoice(solver=name, steps=24, diffusion=Diffusion("increasing-decreasing", 1.0, last))
    ).plan
    rows, stream = build_class_branches([1, 2], [3.0, 1.0], NULL, 4), NoiseStream([5, 6], (4, 4, 4))
    found = make_loop().run(plan, stream.initial, rows, Usage(), None, stream.draw)
    again = NoiseStream([5, 6], (4, 4, 4))
    exact = integrate_reference(
        plan, again.initial, rows, [again.draw(k).astype(np.float64) for k in range(count_draws(plan))]
    )
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)


def test_a_picture_depends_on_its_seed_alone() -> None:
    plan = resolve_sampler(SamplerChoice(solver="sde-euler", steps=9)).plan

    def run(*seeds: int) -> Any:
        stream = NoiseStream(seeds, (4, 4, 4))
        rows = build_class_branches([1] * len(seeds), [1.0] * len(seeds), NULL, 4)
        return make_loop().run(plan, stream.initial, rows, Usage(), None, stream.draw)

    np.testing.assert_array_equal(run(3, 4, 5)[1], run(4)[0])
    assert not np.array_equal(run(3), run(4))
    np.testing.assert_array_equal(NoiseStream([4], (4, 4, 4)).initial, make_noise(4))


def test_draws_are_taken_in_order() -> None:
    stream = NoiseStream([1], (1, 2, 2))
    stream.draw(0)
    with pytest.raises(AssertionError, match="draw 2"):
        stream.draw(2)


def test_draws_lie_in_the_history_as_slopes_do() -> None:
    plan = resolve_sampler(SamplerChoice(solver="sde-heun", steps=4)).plan
    assert plan[0].list_dependencies() == {NoiseDraw(0)}
    assert plan[1].list_dependencies() == {NoiseDraw(0), 0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"form": "increasing"}, {"norm": -1.0}, {"norm": 1e9}, {"last_step": "first"}, {"last_step_size": 0.0},
        {"last_step_size": 1.0},
    ],
)  # fmt: skip
def test_diffusions_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        Diffusion(**wrong)
    assert caught.value.allowed


def test_an_infinite_drift_is_refused_with_the_way_out() -> None:
    with pytest.raises(RequestError, match="infinite") as caught:
        resolve_sampler(SamplerChoice(solver="sde-heun", steps=5, diffusion=Diffusion("constant", last_step="none")))
    assert "--last-step" in caught.value.remedy
    with pytest.raises(RequestError, match="1 step"):
        resolve_sampler(SamplerChoice(solver="sde-euler", steps=1))
