"""Calibrations on the tests' small engines: what they find is better on seeds they never saw, is kept, and is used."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from golden import HEADS, Golden, build_tiny_command
from recorded_progress import RecordedProgress

from calibration.cli.calibrate import main
from calibration.guidance_choice import Guidance
from calibration.model import NetworkSet
from calibration.samplers.block_search import Costs, average_grid, list_layouts, measure_costs
from calibration.samplers.probe import FIT_SEED, HELD_OUT_SEED, SamplerMeter
from calibration.samplers.table_search import (
    SearchConfig,
    TableParameters,
    guide_networks,
    make_initial_table,
    measure_distance,
    sample_with_table,
    search_table,
)
from export.cli.export import main as export_main
from export.directory_samplers import read_demo_samplers
from flowturbo import demo
from flowturbo.torch_sampler import make_conditions, sample
from runtime.cli.run import main as run_main
from runtime.directory.manifest import read_manifest
from runtime.pipeline import Pipeline
from runtime.sampling.blocks import parse_schedule
from runtime.sampling.calibrated import check_calibrated_for, read_calibrated_sampler
from runtime.sampling.controllers import Journal, PathStep
from runtime.sampling.grids import build_uniform_grid
from runtime.sampling.guidance import FULL_INTERVAL, GuidanceInterval
from runtime.sampling.noise import sample_noise
from runtime.sampling.plan import count_evaluations
from runtime.sampling.solvers import ADAPTIVE_RULES, plan_multistep
from runtime.sampling.tableaus import SEARCHED_TABLES
from runtime.system.array_store import load_arrays, save_arrays
from runtime.system.errors import RequestError
from runtime.system.files import compute_sha256

pytestmark = pytest.mark.filterwarnings("ignore:refiner steps")


@pytest.fixture
def engines(tiny_engines: Path, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(tiny_engines, tmp_path / "engines"))


FAKE = ("--backend", "fake")
"""The shipped fake device: a formula in place of the networks, so that hundreds of trajectories take seconds."""


def calibrate(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def done(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


# What is measured with


def test_a_probe_knows_where_a_fine_sampler_ends(tiny_engines: Path, tmp_path: Path) -> None:
    with Pipeline.load(tiny_engines, backend="fake") as pipeline:
        probe = SamplerMeter(pipeline, 4, Guidance(2.0), cache=tmp_path)
        coarse, fine = probe.measure(solver="heun", steps=4), probe.measure(solver="heun", steps=64)
        again = probe.measure(solver="heun", steps=250)
        part = probe.take_first(2).measure(solver="heun", steps=4)
    assert coarse.error > 10 * fine.error > 0
    assert again.error < 1e-6
    assert (coarse.predictor_nfe, coarse.refiner_nfe) == (8, 0)
    np.testing.assert_allclose(part.errors, coarse.errors[:2], rtol=1e-4)
    assert probe.draw.seeds == tuple(range(HELD_OUT_SEED, HELD_OUT_SEED + 4))
    assert FIT_SEED > 10_000


# The mean schedule


def journal(times: list[float]) -> Journal:
    steps = [PathStep(a, b - a, "P", 0.5, True) for a, b in pairwise(times)]
    return Journal([*steps, PathStep(0.5, 0.3, "P", 2.0, False)])


def test_the_mean_schedule_of_equal_paths_is_that_path() -> None:
    times = [0.0, 0.05, 0.15, 0.4, 0.7, 1.0]
    np.testing.assert_allclose(average_grid([journal(times)] * 3, 5), times, atol=2e-3)


def test_the_mean_schedule_lies_between_paths_and_has_any_number_of_steps() -> None:
    early, late = [0.0, 0.1, 0.2, 0.4, 1.0], [0.0, 0.6, 0.8, 0.9, 1.0]
    for steps in (2, 4, 9):
        grid = average_grid([journal(early), journal(late)], steps)
        assert len(grid) == steps + 1
        assert grid[0] == 0.0 and grid[-1] == 1.0
        assert all(a < b for a, b in pairwise(grid))
    middle = average_grid([journal(early), journal(late)], 4)
    assert early[2] < middle[2] < late[2]


def test_schedule_freezes_it_and_the_directory_uses_it(engines: Path, tmp_path: Path) -> None:
    out = tmp_path / "frozen.json"
    done(calibrate("schedule", engines, *FAKE, "--steps", 5, "--images", 8, "--name", "frozen5", "--out", out))
    saved = read_calibrated_sampler(out)
    assert (saved.kind, saved.schedule, len(saved.grid or ())) == ("schedule", "H1P4", 6)
    assert saved.measured["held_out"]["images"] == 8
    assert out.with_suffix(".png").stat().st_size > 0
    done(CliRunner().invoke(run_main, ["--engine", str(engines), "--class", "1", "--schedule", "frozen5",
                                       "--out", str(tmp_path / "a"), "--json"]))  # fmt: skip
    report = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (report["sampler"], report["nfe"]) == ("frozen5", {"predictor": 6, "refiner": 0})


def test_a_search_of_layouts_meets_a_budget(engines: Path, tmp_path: Path) -> None:
    result = done(calibrate("schedule", engines, *FAKE, "--target-error", 10, "--images", 8, "--most-nfe", 3,
                            "--out", tmp_path / "best.json", "--json"))  # fmt: skip
    saved = json.loads(result.stdout)
    assert saved["kind"] == "schedule"
    assert len(saved["measured"]["front"]) >= 1
    assert (tmp_path / "best.png").stat().st_size > 0
    impossible = calibrate(
        "schedule", engines, *FAKE, "--budget-ms", 1e-6, "--images", 8, "--most-nfe", 3, "--out", tmp_path / "b.json"
    )
    assert impossible.exit_code == 1
    assert "Allowed:" in impossible.output


def test_layouts_are_as_long_as_refiners_are_trained_for() -> None:
    found = list_layouts(8, has_refiner=True, make_frozen_grid=build_uniform_grid)
    assert all(layout.longest_refiner_step <= 0.12 + 1e-9 for layout in found)
    assert any("R" in layout.schedule for layout in found)
    for layout in found[:40]:
        plan = parse_schedule(layout.schedule)
        assert len(layout.grid) == plan.steps + 1
        assert 2 * plan.blocks.count("H") + plan.blocks.count("P") <= 8
    assert not any(
        "R" in layout.schedule for layout in list_layouts(8, has_refiner=False, make_frozen_grid=build_uniform_grid)
    )


def test_costs_are_measured_and_add_up(tiny_engines: Path) -> None:
    with Pipeline.load(tiny_engines, backend="fake") as pipeline:
        costs = measure_costs(pipeline, {}, repeats=5)
    assert costs.predictor_ms > 0
    assert Costs(1.0, 2.0, 0.5).predict_ms(3, 4) == pytest.approx(9.0)


# Settings of rules


@pytest.mark.parametrize(("rule", "nfe"), [("norm", 9), ("lte", 9), ("blocks", 10)])
def test_constant_meets_a_number_of_evaluations(rule: str, nfe: int, engines: Path, tmp_path: Path) -> None:
    result = done(calibrate("constant", engines, *FAKE, "--rule", rule, "--nfe", nfe, "--images", 8,
                            "--out", tmp_path / "c.json", "--json"))  # fmt: skip
    saved = json.loads(result.stdout)
    found = saved["measured"]["looked_at"]
    assert found["predictor_nfe"] + found["refiner_nfe"] == pytest.approx(nfe, rel=0.25)
    assert (saved["rule"], saved["kind"]) == (rule, "adaptive")
    assert (tmp_path / "c.png").stat().st_size > 0
    with Pipeline.load(engines, threads=1) as pipeline:
        request = pipeline.request([1], schedule=saved["name"])
    assert request.sampler.adaptive_solver is ADAPTIVE_RULES[rule]


# Tables by gradient


def networks(golden: Golden) -> NetworkSet:
    for network in (golden.predictor, golden.refiner):
        network.requires_grad_(False)
    return NetworkSet(golden.predictor, golden.refiner, [1, 5, 7])


SMALL = SearchConfig(4, guidance=2.0, images=6, batch=3, steps=12, fine_steps=16, lr=0.05)


@pytest.mark.parametrize("refiner_nfe", [0, 2])
def test_the_differentiable_sampler_is_the_deployed_one(golden_s: Golden, refiner_nfe: int) -> None:
    config = SearchConfig(5, refiner_nfe, guidance=3.0, interval=(0.2, 0.9))
    table = make_initial_table(5, refiner_nfe)
    noise = torch.from_numpy(sample_noise([1, 2], (4, 16, 16)))
    interval, both = GuidanceInterval(0.2, 0.9), networks(golden_s)
    with torch.no_grad():
        found = sample_with_table(TableParameters(table), guide_networks(both, [1, 5], config), interval, noise)
    plan = plan_multistep(table, interval)
    conditions = make_conditions([1, 5], [3.0, 3.0], both.predictor.config.classes)
    expected = sample(both.by_role, plan, conditions, noise)
    assert float((found - expected).abs().max()) < 1e-4
    assert count_evaluations(plan, "refiner") in (0, refiner_nfe)


def test_the_gradient_is_the_differences(golden_s: Golden) -> None:
    guided = guide_networks(networks(golden_s), [1, 5], SearchConfig(4, guidance=2.0))
    noise = torch.from_numpy(sample_noise([1, 2], (4, 16, 16)))
    parameters = TableParameters(make_initial_table(4))

    def loss() -> torch.Tensor:
        latents = sample_with_table(parameters, guided, FULL_INTERVAL, noise)
        return measure_distance(latents, torch.zeros_like(noise)).mean()

    loss().backward()
    for tensor, index in ((parameters.coefficients, 2), (parameters.logits, 1)):
        assert tensor.grad is not None
        with torch.no_grad():
            tensor[index] += 1e-2
            above = float(loss())
            tensor[index] -= 2e-2
            below = float(loss())
            tensor[index] += 1e-2
        assert float(tensor.grad[index]) == pytest.approx((above - below) / 2e-2, rel=0.05, abs=1e-4)


@pytest.mark.parametrize("nfe", [3, 6, 12])
@pytest.mark.parametrize("refiner_nfe", [0, 3])
def test_where_a_search_begins(nfe: int, refiner_nfe: int) -> None:
    table = make_initial_table(nfe, refiner_nfe)
    assert len(table.step_sizes) == nfe + refiner_nfe
    assert [len(row) for row in table.coefficients] == list(range(nfe + refiner_nfe))
    assert sum(table.step_sizes) == pytest.approx(1.0, abs=2e-3)
    assert table.num_refiner_steps == refiner_nfe
    if nfe in SEARCHED_TABLES and not refiner_nfe:
        assert table is SEARCHED_TABLES[nfe]


def test_a_search_gains_on_seeds_it_never_saw_and_goes_on_where_it_stopped(golden_s: Golden, tmp_path: Path) -> None:
    whole = search_table(networks(golden_s), SMALL, tmp_path / "whole.npz")
    assert whole.after < whole.before
    assert whole.better_table == whole.table

    class Stop(Exception):
        pass

    class UntilTen(RecordedProgress):
        def write(self, text: str) -> None:
            if any(line.startswith("step 10") for line in self.lines):
                raise Stop
            super().write(text)

    with pytest.raises(Stop):
        search_table(networks(golden_s), SMALL, tmp_path / "part.npz", UntilTen())
    told = RecordedProgress()
    resumed = search_table(networks(golden_s), SMALL, tmp_path / "part.npz", told)
    assert any("going on at step 10" in text for text in told.lines)
    assert resumed.table == whole.table
    assert resumed.after == whole.after


def test_other_settings_do_not_go_on_with_a_search(golden_s: Golden, tmp_path: Path) -> None:
    told = RecordedProgress()
    for lr in (0.05, 0.04):
        config = SearchConfig(4, guidance=2.0, images=2, batch=2, steps=10, fine_steps=4, lr=lr)
        search_table(networks(golden_s), config, tmp_path / "part.npz", told)
    search_table(networks(golden_s), config, tmp_path / "part.npz", told, model="another")
    assert not any("going on" in text for text in told.lines)
    assert sum("of another model, version or settings: beginning anew" in text for text in told.lines) == 2


def test_the_state_of_an_older_version_begins_anew(golden_s: Golden, tmp_path: Path) -> None:
    """Its settings stood under another name, as text."""
    config = SearchConfig(4, guidance=2.0, images=2, batch=2, steps=10, fine_steps=4)
    whole = search_table(networks(golden_s), config, tmp_path / "p.npz")
    arrays = load_arrays(tmp_path / "p.npz")
    assert arrays is not None
    del arrays["key"]
    save_arrays(tmp_path / "p.npz", {**arrays, "config": np.asarray(" [('batch', 2), …]")})
    told = RecordedProgress()
    assert search_table(networks(golden_s), config, tmp_path / "p.npz", told) == whole
    assert "beginning anew" in " ".join(told.lines) and "going on" not in " ".join(told.lines)


def test_a_damaged_partial_search_begins_anew(golden_s: Golden, tmp_path: Path) -> None:
    config = SearchConfig(4, guidance=2.0, images=2, batch=2, steps=10, fine_steps=4)
    search_table(networks(golden_s), config, tmp_path / "p.npz")
    whole = (tmp_path / "p.npz").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text"):
        (tmp_path / "p.npz").write_bytes(damaged)
        told = RecordedProgress()
        search_table(networks(golden_s), config, tmp_path / "p.npz", told)
        assert not any("going on" in text for text in told.lines)


def test_solver_keeps_its_table_and_flowturbo_run_uses_it(checkpoints: Path, engines: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    done(calibrate("solver", engines, "--nfe", 5, "--predictor", checkpoints / "golden_s-predictor.pt",
                   "--heads", HEADS["golden_s"], "--images", 4, "--batch", 4, "--steps", 6, "--fine-steps", 12,
                   "--name", "mine", "--out", out))  # fmt: skip
    saved = read_calibrated_sampler(out)
    assert (saved.kind, len(saved.rows or ())) == ("table", 5)
    assert not out.with_suffix(".partial.npz").exists()
    assert out.with_suffix(".png").stat().st_size > 0
    done(CliRunner().invoke(run_main, ["--engine", str(engines), "--class", "1", "--schedule", "mine",
                                       "--out", str(tmp_path / "a")]))  # fmt: skip
    assert json.loads((tmp_path / "a" / "run.json").read_text())["nfe"]["predictor"] == 5
    shown = done(CliRunner().invoke(export_main, ["inspect", str(engines)])).output
    assert "mine (table of 5)" in " ".join(shown.split())


def test_a_killed_search_leaves_what_it_needs(checkpoints: Path, tmp_path: Path) -> None:
    """kill -9 while it searches; the same command goes on."""
    words = ["solver", "--nfe", 4, "--predictor", checkpoints / "golden_s-predictor.pt", "--heads", HEADS["golden_s"],
             "--guidance", 2, "--images", 4, "--batch", 4, "--steps", 40, "--fine-steps", 8, "--name", "k",
             "--out", tmp_path / "k.json", "--no-install"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", "import torch; torch.set_num_threads(1); from calibration.cli.calibrate import main; main()",
         *map(str, words)],
        stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 10/"):
            break
    partial = tmp_path / "k.partial.npz"
    while not partial.exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (tmp_path / "k.json").exists()
    assert "going on at step" in done(calibrate(*words)).output
    assert read_calibrated_sampler(tmp_path / "k.json").name == "k"


# Bad input


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["schedule", "{engines}"], "--steps"),
        (["schedule", "{engines}", "--steps", 4, "--budget-ms", 3], "one of"),
        (["schedule", "nowhere", "--steps", 4], "no engine directory"),
        (
            ["constant", "{engines}", *FAKE, "--rule", "lte", "--nfe", 2, "--images", 8, "--no-install"],
            "evaluations",
        ),
        (["constant", "{engines}", "--rule", "lte", "--nfe", 9, "--guidance-interval", "1,0"], "interval"),
        (["constant", "{engines}", "--rule", "lte", "--nfe", 9, "--guidance-interval", "a"], "--guidance-interval"),
        (["solver", "{engines}", "--nfe", 4], "another predictor"),
        (["solver", "--nfe", 14, "--refiner-nfe", 8], "16"),
        (["solver", "--nfe", 4, "--predictor", "nowhere.pt"], "nowhere.pt"),
        (["solver", "--nfe", 4, "--refiner", "nowhere.pt"], "--predictor"),
        (["study", "nowhere"], "no engine directory"),
        (["schedule", "{engines}", "--steps", 4, "--name", "H2P6"], "reads as blocks"),
        (["solver", "--nfe", 4, "--name", "a b"], "--name"),
        (["solver", "--nfe", 4, "--lr", "nan"], "learning rate"),
    ],
)
def test_mistakes_are_one_message(words: list[object], says: str, tiny_engines: Path) -> None:
    result = calibrate(*(str(word).format(engines=tiny_engines) for word in words))
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert says in result.output
    assert "Traceback" not in result.output


def test_a_table_with_a_refiner_needs_one(checkpoints: Path) -> None:
    result = calibrate("solver", "--nfe", 4, "--refiner-nfe", 2, "--predictor", checkpoints / "golden_s-predictor.pt",
                       "--heads", HEADS["golden_s"])  # fmt: skip
    assert result.exit_code == 1
    assert "--refiner FILE" in result.output


def test_search_settings_that_mean_nothing() -> None:
    for wrong in (
        {"nfe": 1},
        {"nfe": 10, "refiner_nfe": 7},
        {"nfe": 4, "images": 2, "batch": 4},
        {"nfe": 4, "steps": 0},
    ):
        with pytest.raises(RequestError):
            SearchConfig(**wrong)


# Directories


def test_samplers_are_added_made_default_and_refused_for_another_model(
    engines: Path, nosigma_engines: Path, tmp_path: Path
) -> None:
    done(calibrate("schedule", engines, *FAKE, "--steps", 4, "--images", 8, "--name", "four", "--out", tmp_path / "four.json",
                   "--no-install"))  # fmt: skip
    assert not read_manifest(engines).samplers
    before = read_manifest(engines).engine_hash
    added = CliRunner().invoke(
        export_main, ["add-sampler", str(engines), str(tmp_path / "four.json"), "--default-schedule", "four"]
    )
    assert added.exit_code == 0, added.output
    manifest = read_manifest(engines)
    assert (manifest.defaults.schedule, manifest.engine_hash) == ("four", before)
    with Pipeline.load(engines, threads=1) as pipeline:
        assert pipeline.request([1]).sampler.name == "four"
    foreign = CliRunner().invoke(export_main, ["add-sampler", str(nosigma_engines), str(tmp_path / "four.json")])
    assert foreign.exit_code == 1
    assert "another predictor" in foreign.output
    missing = CliRunner().invoke(export_main, ["add-sampler", str(engines), "--default-schedule", "five"])
    assert missing.exit_code == 1
    assert "four" in missing.output


def test_a_sampler_that_was_tampered_with_is_refused(engines: Path, tmp_path: Path) -> None:
    done(
        calibrate(
            "schedule", engines, *FAKE, "--steps", 4, "--images", 8, "--name", "four", "--out", tmp_path / "f.json"
        )
    )
    path = engines / "manifest.json"
    path.write_text(path.read_text().replace('"schedule": "H1P3"', '"schedule": "H2P2"'))
    result = CliRunner().invoke(run_main, ["--engine", str(engines), "--class", "1", "--out", str(tmp_path / "a")])
    assert result.exit_code == 1
    assert "the sampler four is not the one that was saved" in result.output


def test_the_study_answers_with_numbers(engines: Path, tmp_path: Path) -> None:
    done(calibrate("study", engines, *FAKE, "--images", 8, "--out", tmp_path / "samplers.md"))
    page = (tmp_path / "samplers.md").read_text()
    for part in (
        "## Recommendations",
        "Does the norm rule help?",
        "Does block choice help at equal time?",
        "adaptive lte",
    ):
        assert part in page
    assert (tmp_path / "images" / "samplers.png").stat().st_size > 0
    numbers = json.loads((tmp_path / "samplers.json").read_text())
    assert len(numbers["halves"]) == 2
    assert all(sampler["error"] >= 0 for half in numbers["halves"] for sampler in half["samplers"])


def test_the_demos_samplers_were_calibrated_for_the_demo() -> None:
    samplers = read_demo_samplers()
    assert {"demo-4", "demo-6", "demo-8", "demo-12"} <= {saved.name for saved in samplers}
    for saved in samplers:
        check_calibrated_for(
            saved, {"predictor": compute_sha256(demo.PREDICTOR), "refiner": compute_sha256(demo.REFINER)}
        )
        assert saved.measured["held_out"]["error"] < saved.measured["began_with"]["error"]
        assert saved.command.startswith("flowturbo-calibrate solver")


def test_a_directory_that_is_built_again_keeps_its_samplers(
    engines: Path, checkpoints: Path, vae: Path, tmp_path: Path
) -> None:
    done(
        calibrate(
            "schedule", engines, *FAKE, "--steps", 4, "--images", 8, "--name", "four", "--out", tmp_path / "f.json"
        )
    )
    words = build_tiny_command(checkpoints, vae, engines)
    assert CliRunner().invoke(export_main, words).exit_code == 0
    assert [saved.name for saved in read_manifest(engines).samplers] == ["four"]
    other = CliRunner().invoke(export_main, [*words, "--default-schedule", "five"])
    assert other.exit_code == 1
    assert "four" in other.output
    made = CliRunner().invoke(
        export_main, [*words, "--sampler", str(tmp_path / "f.json"), "--default-schedule", "four"]
    )
    assert made.exit_code == 0, made.output
    assert read_manifest(engines).defaults.schedule == "four"


def test_the_guide_has_the_demos_numbers() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "calibration.md").read_text()
    for saved in read_demo_samplers():
        assert f"`{saved.name}`" in guide
        for part in ("began_with", "held_out"):
            assert f" {saved.measured[part]['error']:.3f} " in guide


def test_what_a_frozen_schedule_or_a_page_cannot_use_is_said_beforehand(engines: Path, tmp_path: Path) -> None:
    frozen = calibrate("schedule", engines, *FAKE, "--steps", 4, "--most-nfe", 5)
    assert frozen.exit_code == 1 and "--steps with --most-nfe" in frozen.output
    page = calibrate("study", engines, *FAKE, "--out", tmp_path)
    assert page.exit_code == 1 and f"cannot write {tmp_path}" in page.output
