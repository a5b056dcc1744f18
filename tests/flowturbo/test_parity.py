"""Parity with the public reference implementations: every array of tests/data to 1e-5 relative in PyTorch float32."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from golden import GOLDEN_NAMES, Golden, load_golden_arrays, measure_relative_difference

from flowturbo.flow import flow_loss, refine_velocity, refiner_loss
from runtime.sampling.blocks import parse_schedule, plan_flowturbo
from runtime.sampling.grids import build_uniform_grid
from runtime.sampling.plan import Plan, count_evaluations, integrate
from runtime.sampling.solvers import plan_euler, plan_heun

BOUND = 1e-5
TRAJECTORIES = [
    (name, key.removeprefix("traj/"))
    for name in GOLDEN_NAMES
    for key in load_golden_arrays(name)
    if key.startswith("traj/")
]


def points_of(golden: Golden, plan: Plan) -> list[np.ndarray[Any, Any]]:
    """The start and every point that a step reaches, guided as the reference guides."""
    points = [golden.arrays["x"]]

    def keep(event: dict[str, Any]) -> None:
        if plan[event["index"]].update is not None:
            points.append(event["x"].numpy())

    with torch.inference_mode():
        integrate(
            plan,
            golden.read_tensor("x"),
            lambda x, t: golden.predict_guided(x, float(t)),
            lambda x, t, v, add: golden.predict_guided(x, float(t), v) + add,
            keep,
        )
    return points


def test_predictor_evaluation(golden: Golden) -> None:
    found = golden.predictor(golden.read_tensor("x"), golden.read_tensor("t"), golden.read_tensor("y"))
    assert measure_relative_difference(found, golden.arrays["predictor_out"]) < BOUND


def test_refiner_evaluation(golden: Golden) -> None:
    x, v = golden.read_tensor("x"), golden.read_tensor("v")
    found = golden.refiner(torch.cat([x, v], dim=1), golden.read_tensor("t"), golden.read_tensor("y"))
    assert measure_relative_difference(found, golden.arrays["refiner_out"]) < BOUND


def test_refine_adds_the_velocity(golden: Golden) -> None:
    x, v, t, y = (golden.read_tensor(name) for name in ("x", "v", "t", "y"))
    assert (
        measure_relative_difference(
            refine_velocity(golden.refiner, x, t, v, y), golden.arrays["refiner_out"] + golden.arrays["v"]
        )
        < BOUND
    )


def test_guided_predictor_evaluation_has_all_rows(golden: Golden) -> None:
    assert (
        measure_relative_difference(
            golden.predict_guided(golden.read_tensor("x"), golden.read_tensor("t")), golden.arrays["predictor_cfg_out"]
        )
        < BOUND
    )


def test_guided_refiner_evaluation_has_all_rows(golden: Golden) -> None:
    v = golden.read_tensor("v").repeat(2, 1, 1, 1)
    assert (
        measure_relative_difference(
            golden.predict_guided(golden.read_tensor("x"), golden.read_tensor("t"), v), golden.arrays["refiner_cfg_out"]
        )
        < BOUND
    )


@pytest.mark.filterwarnings("ignore:refiner steps")  # the reference took some that are longer than 0.12
@pytest.mark.parametrize(("name", "schedule"), TRAJECTORIES)
def test_every_point_of_a_schedule(name: str, schedule: str, request: pytest.FixtureRequest) -> None:
    golden: Golden = request.getfixturevalue(name)
    plan = plan_flowturbo(parse_schedule(schedule))
    expected = golden.arrays[f"traj/{schedule}"]
    points = points_of(golden, plan)
    assert len(points) == len(expected)
    for step, (found, wanted) in enumerate(zip(points, expected, strict=True)):
        assert measure_relative_difference(found, wanted) < BOUND, f"after step {step}"


@pytest.mark.parametrize(("solver", "key"), [(plan_euler, "ode/euler/11"), (plan_heun, "ode/heun2/11")])
def test_ode_sampler_and_its_nfe(golden: Golden, solver: Any, key: str) -> None:
    plan = solver(build_uniform_grid(10))  # eleven output times are ten steps
    assert measure_relative_difference(points_of(golden, plan)[-1], golden.arrays[key]) < BOUND
    assert count_evaluations(plan, "predictor") == golden.arrays[f"{key}/nfe"]


def test_flow_loss(golden: Golden) -> None:
    data, noise, t, y = (golden.read_tensor(name) for name in ("x1", "x0", "t", "y"))
    assert (
        measure_relative_difference(flow_loss(golden.predictor, data, noise, t, y), golden.arrays["flow_loss"]) < BOUND
    )


@pytest.mark.parametrize("as_tensor", [False, True])
def test_refiner_loss(golden: Golden, as_tensor: bool) -> None:
    data, noise, t, y, dt = (golden.read_tensor(name) for name in ("x1", "x0", "t", "y", "dt"))
    step = dt.repeat(len(data)) if as_tensor else float(dt)
    loss = refiner_loss(golden.refiner, golden.predictor, data, noise, t, step, y)
    assert measure_relative_difference(loss, golden.arrays["refiner_loss"]) < BOUND


def test_dropped_labels_are_the_students_and_the_second_teacher_calls(golden: Golden) -> None:
    """As in the released code: the teacher's first call keeps the true label, the other two calls share the dropped one."""
    data, noise, t, y, dt = (golden.read_tensor(name) for name in ("x1", "x0", "t", "y", "dt"))
    dropped, h = torch.stack([y[0], torch.tensor(golden.null_label)]), float(dt)
    with torch.inference_mode():
        x = (1 - t.view(-1, 1, 1, 1)) * noise + t.view(-1, 1, 1, 1) * data
        v = golden.predictor(x, t, y)
        x_next = x + h * v
        target = golden.predictor(x_next, t + h, dropped)
        found = golden.refiner(torch.cat([x_next, v], dim=1), t + h, dropped) + v
        expected = (found - target).square().mean(dim=(1, 2, 3))
        loss = refiner_loss(golden.refiner, golden.predictor, data, noise, t, h, y, dropped)
    assert measure_relative_difference(loss, expected) < BOUND


def test_refiner_loss_teaches_the_refiner_alone(golden: Golden) -> None:
    data, noise, t, y, dt = (golden.read_tensor(name) for name in ("x1", "x0", "t", "y", "dt"))
    teacher, refiner = (copy.deepcopy(network).requires_grad_(True) for network in (golden.predictor, golden.refiner))
    refiner_loss(refiner, teacher, data, noise, t, float(dt), y).sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in refiner.parameters())
