"""Choices resolved: what names what, what goes together, and samplers that were saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problem import START, refine_exactly, slope

from runtime.sampling.calibrated import (
    SAMPLER_SCHEMA,
    CalibratedSampler,
    check_calibrated_for,
    check_calibrated_sampler,
    describe_sampler,
    read_calibrated_sampler,
    write_calibrated_sampler,
)
from runtime.sampling.guidance import GuidanceInterval
from runtime.sampling.plan import count_evaluations, integrate
from runtime.sampling.sampler import SOLVER_NAMES, SamplerChoice, resolve_sampler
from runtime.sampling.sde import Diffusion
from runtime.sampling.solvers import ADAPTIVE_RULES, ADAPTIVE_SOLVERS, STOCHASTIC_SOLVERS, plan_multistep
from runtime.sampling.tableaus import SEARCHED_TABLES, MultistepTable
from runtime.system.errors import RequestError
from runtime.system.json_codec import to_json

pytestmark = pytest.mark.filterwarnings("ignore:refiner steps")
TABLE = CalibratedSampler(
    SAMPLER_SCHEMA, "mine", "table", {"predictor": "a" * 64}, grid=(0.0, 0.2, 0.5, 1.0), rows=((), (-0.5,), (0.1, -0.6))
)
FROZEN = CalibratedSampler(
    SAMPLER_SCHEMA, "frozen", "schedule", {"predictor": "a" * 64}, grid=(0.0, 0.3, 1.0), schedule="H1P1"
)
RULED = CalibratedSampler(SAMPLER_SCHEMA, "ruled", "adaptive", {"predictor": "a" * 64}, rule="lte", setting=0.03)


@pytest.mark.parametrize("name", [n for n in SOLVER_NAMES if n != "flowturbo"])
def test_every_solver_resolves_by_name_alone(name: str) -> None:
    sampler = resolve_sampler(SamplerChoice(solver=name))
    assert sampler.name.startswith(name)
    assert (sampler.adaptive_solver is not None) == (name in ADAPTIVE_SOLVERS)
    assert bool(sampler.num_draws) == (name in STOCHASTIC_SOLVERS)


@pytest.mark.parametrize("name", list(ADAPTIVE_RULES))
def test_every_rule_resolves_by_name_alone(name: str) -> None:
    sampler = resolve_sampler(SamplerChoice(adaptive=name))
    assert sampler.adaptive_solver is ADAPTIVE_RULES[name]
    assert getattr(sampler.control, ADAPTIVE_RULES[name].parameter) == ADAPTIVE_RULES[name].default
    assert sampler.with_refiner(has_refiner=True).control.refiner is ADAPTIVE_RULES[name].tries_refiner
    assert not sampler.with_refiner(has_refiner=False).control.refiner


@pytest.mark.parametrize(
    ("grid", "times"),
    [
        ("uniform", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("shift:2", (0.0, 1 / 7, 1 / 3, 0.6, 1.0)),
        ("warp:2", (0.0, 0.0625, 0.25, 0.5625, 1.0)),
        ("0,0.1,0.2,0.5,1", (0.0, 0.1, 0.2, 0.5, 1.0)),
        ((0.0, 0.1, 0.2, 0.5, 1.0), (0.0, 0.1, 0.2, 0.5, 1.0)),
    ],
)
def test_grids(grid: Any, times: tuple[float, ...]) -> None:
    steps = None if not isinstance(grid, str) or "," in grid else 4
    plan = resolve_sampler(SamplerChoice(solver="euler", steps=steps, grid=grid)).plan
    np.testing.assert_allclose([evaluation.t for evaluation in plan], times[:-1], rtol=1e-12)
    blocks = resolve_sampler(SamplerChoice(schedule="H1P3", grid=grid)).plan
    np.testing.assert_allclose([evaluation.t for evaluation in blocks], [0.0, *times[1:]], rtol=1e-12)


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({}, "no sampler"),
        ({"schedule": "H1P5", "adaptive": "lte"}, "not both"),
        ({"solver": "euler", "adaptive": "lte"}, "not both"),
        ({"adaptive": "guess"}, "norm"),
        ({"solver": "dopri5", "steps": 4}, "--steps"),
        ({"adaptive": "lte", "constant": 0.1}, "--constant"),
        ({"adaptive": "norm", "tolerance": 0.1}, "--tolerance"),
        ({"adaptive": "lte", "grid": "uniform"}, "--grid"),
        ({"solver": "euler", "tolerance": 0.1}, "--tolerance"),
        ({"schedule": "H1P5", "max_nfe": 4}, "--max-nfe"),
        ({"schedule": "H1P5", "diffusion": Diffusion()}, "--diffusion"),
        ({"solver": "heun", "consistent": True}, "--consistent"),
        ({"solver": "searched", "grid": "uniform"}, "its own"),
        ({"solver": "searched", "backwards": True}, "its own"),
        ({"schedule": "H1P5R3", "backwards": True}, "towards data"),
        ({"solver": "sde-euler", "backwards": True}, "taken back"),
        ({"solver": "dopri5-reference", "interval": GuidanceInterval(0.3, 1.0)}, "dopri5"),
        ({"solver": "dopri5-reference", "max_nfe": 100}, "--max-nfe"),
        ({"solver": "euler", "grid": "shift:-1"}, "positive"),
        ({"solver": "euler", "grid": "zigzag"}, "shift:S"),
        ({"solver": "euler", "grid": "0,0.5,0.4,1"}, "increasing"),
        ({"solver": "euler", "grid": "0,0.5,1", "steps": 5}, "6 points"),
        ({"schedule": "H1P5", "grid": "0,0.5,1"}, "7 points"),
        ({"saved": TABLE, "steps": 3}, "--steps"),
        ({"saved": TABLE, "consistent": True}, "--consistent"),
        ({"adaptive": "lte", "max_nfe": 1}, "at most 1"),
        ({"solver": "dopri5", "max_nfe": 7}, "at most 7"),
        ({"saved": TABLE, "backwards": True}, "towards data"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(choice: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_sampler(SamplerChoice(**choice))
    assert says in str(caught.value)
    assert caught.value.allowed or caught.value.remedy


def test_guidance_intervals_of_fixed_samplers() -> None:
    choice = SamplerChoice(solver="euler", steps=10, interval=GuidanceInterval(0.3, 0.7))
    acted = [evaluation.t for evaluation in resolve_sampler(choice).plan if evaluation.guided]
    np.testing.assert_allclose(acted, [0.3, 0.4, 0.5, 0.6])
    at_the_end = resolve_sampler(SamplerChoice(solver="heun", steps=2, interval=GuidanceInterval(0.6, 1.0))).plan
    assert [evaluation.guided for evaluation in at_the_end] == [False, False, False, True]


def test_a_refiner_never_reads_a_velocity_of_the_other_kind() -> None:
    """Where guidance ends between a slope and the R block that reads it, the predictor is asked once more."""
    for interval in (
        GuidanceInterval(0.0, 0.5),
        GuidanceInterval(0.55, 1.0),
        GuidanceInterval(0.3, 0.8),
        GuidanceInterval(),
    ):
        plan = resolve_sampler(SamplerChoice(schedule="H1P4R5", interval=interval)).plan
        for evaluation in plan:
            for read in (evaluation.condition, evaluation.add):
                assert read is None or plan[read].guided == evaluation.guided
        edges = sum(0.0 < edge < 1.0 for edge in (interval.start, interval.end))
        assert 6 <= count_evaluations(plan, "predictor") <= 6 + edges
        integrate(plan, START, slope, refine_exactly)


def test_a_searched_table_with_a_refiner() -> None:
    table = MultistepTable((0.3, 0.3, 0.2, 0.2), ((), (-0.5,), (0.1, -0.6), (0.0, 0.1, -0.4)), num_refiner_steps=2)
    plan = plan_multistep(table)
    assert [evaluation.network for evaluation in plan] == ["predictor", "predictor", "refiner", "refiner"]
    assert [(e.condition, e.add) for e in plan[2:]] == [(1, 1), (2, 2)]
    plain = plan_multistep(replace(table, num_refiner_steps=0))
    np.testing.assert_allclose(
        integrate(plan, START, slope, refine_exactly), integrate(plain, START, slope), rtol=1e-12
    )  # a perfect refiner is the predictor
    cut = plan_multistep(table, GuidanceInterval(0.0, 0.7))
    assert [evaluation.network for evaluation in cut] == ["predictor", "predictor", "refiner", "predictor"]


def test_a_saved_table_is_the_published_one_if_its_numbers_are() -> None:
    published = SEARCHED_TABLES[6]
    grid = tuple(
        np.concatenate([[0.0], np.cumsum(published.step_sizes)[:-1] / sum(published.step_sizes), [1.0]]).tolist()
    )
    saved = replace(TABLE, grid=grid, rows=published.coefficients)
    ours, theirs = (
        resolve_sampler(SamplerChoice(saved=saved)),
        resolve_sampler(SamplerChoice(solver="searched", steps=6)),
    )
    assert ours.name == "mine"
    np.testing.assert_allclose(integrate(ours.plan, START, slope), integrate(theirs.plan, START, slope), rtol=1e-12)


def test_saved_schedules_and_rules() -> None:
    frozen = resolve_sampler(SamplerChoice(saved=FROZEN))
    assert (frozen.name, [evaluation.t for evaluation in frozen.plan]) == ("frozen", [0.0, 0.3, 1.0])
    ruled = resolve_sampler(SamplerChoice(saved=RULED))
    assert (ruled.name, ruled.adaptive_solver, ruled.control.tolerance) == ("ruled", ADAPTIVE_RULES["lte"], 0.03)
    budgeted = resolve_sampler(SamplerChoice(saved=RULED, max_nfe=9))
    assert budgeted.control.max_nfe == 9
    assert [describe_sampler(saved) for saved in (TABLE, FROZEN, RULED)] == [
        "mine (table of 3)", "frozen (H1P1)", "ruled (lte 0.03)",
    ]  # fmt: skip


def test_a_file_comes_back_as_it_went(tmp_path: Path) -> None:
    for saved in (TABLE, FROZEN, RULED):
        write_calibrated_sampler(tmp_path / "s.json", saved)
        assert read_calibrated_sampler(tmp_path / "s.json") == saved
        assert read_calibrated_sampler(tmp_path / "s.json").sha256 == saved.sha256
    assert replace(TABLE, rows=((), (-0.5,), (0.1, -0.7))).sha256 != TABLE.sha256


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": SAMPLER_SCHEMA + 1}, "newer flowturbo"),
        ({"kind": "spell"}, "kind"),
        ({"name": "../up"}, "name"),
        ({"name": "H2P6"}, "reads as blocks"),
        ({"grid": [0.0, 0.5, 0.4, 1.0]}, "rises"),
        ({"grid": [0.0, 0.5, 0.9]}, "rises"),
        ({"grid": None}, "time grid"),
        ({"rows": [[], [-0.5]]}, "rows"),
        ({"rows": [[], [-0.5], [0.1]]}, "rows"),
        ({"rows": "none"}, "rows"),
        ({"rows": [[], [1e20], [0.1, -0.6]]}, "coefficient"),
        ({"refiner": 3}, "refiner"),
        ({"unknown": 1}, "unknown"),
        ({"kind": "adaptive"}, "rule"),
        ({"kind": "schedule"}, "blocks"),
        ({"grid": [i / 20 for i in range(21)], "rows": [[0.0] * i for i in range(20)]}, "more than 16"),
    ],
)
def test_records_that_do_not_fit_together_are_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text(json.dumps({**to_json(TABLE), **change}))
    with pytest.raises(RequestError) as caught:
        read_calibrated_sampler(tmp_path / "it.json")
    assert says in str(caught.value)
    assert caught.value.remedy


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("H1P5")
    (tmp_path / "list.json").write_text(json.dumps([1, 2]))
    for name in ("text.json", "list.json", "missing.json"):
        with pytest.raises(RequestError, match=name):
            read_calibrated_sampler(tmp_path / name)


def test_a_sampler_is_for_the_model_it_was_measured_on() -> None:
    check_calibrated_sampler(TABLE, "it")
    check_calibrated_for(TABLE, {"predictor": "a" * 64, "refiner": "b"})
    with pytest.raises(RequestError, match="another predictor") as caught:
        check_calibrated_for(TABLE, {"predictor": "b" * 64})
    assert "--force" in caught.value.remedy


def test_settings_tell_samplers_of_one_name_apart() -> None:
    one, other = (resolve_sampler(SamplerChoice(solver="sde-euler", diffusion=Diffusion(norm=n))) for n in (1.0, 5.0))
    assert one.name == other.name
    assert to_json(one.settings) != to_json(other.settings)
    assert resolve_sampler(SamplerChoice(saved=TABLE)).settings["saved"]["sha256"] == TABLE.sha256
