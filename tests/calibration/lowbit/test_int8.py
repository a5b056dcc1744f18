"""Calibration for int8: streaming statistics, clips, equalisers, resumed runs, the search, and the gate of a build."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from golden import HEADS
from hypothesis import given
from hypothesis import strategies as st
from recorded_progress import RecordedProgress

from calibration.cli.calibrate import main
from calibration.guidance_choice import Guidance
from calibration.lowbit import sensitivity
from calibration.lowbit.fake_quantise import make_int8_layers, replace_clips
from calibration.lowbit.histogram import BINS, Histogram, find_clip, merge_histograms
from calibration.lowbit.measure_ranges import CalibrationSettings, calibrate_int8, compute_equaliser, find_time_bin
from calibration.lowbit.quality_meter import MAX_DB, Quality, QualityMeter, QualityTarget
from calibration.lowbit.sensitivity import make_choice, search_fp16, search_int8
from calibration.lowbit.trajectories import Deployment, load_deployment, sample_deployment
from calibration.model import ModelSpec
from export.build import build
from export.build_request import resolve_request
from export.cli.export import main as export_main
from export.directory_source import open_directory
from export.lowbit.choice import read_choice, write_choice
from export.lowbit.ranges import CLIP_METHODS, TIME_BINS, Ranges, read_ranges
from export.proof import gate
from export.proof.gate import GateComparison, GateLimits, compare_images, find_failures, format_gate, recheck_gate
from export.proof.reference_build import ReferenceBuild, build_reference, read_reference, remove_references
from export.stage import open_stage
from runtime.backends import BackendChoice
from runtime.backends.base import BackendOptions
from runtime.directory.manifest import MANIFEST_SCHEMA, read_manifest, write_manifest
from runtime.directory.records import GateRecord, Manifest
from runtime.pipeline import Pipeline
from runtime.sampling.sampler import SamplerChoice
from runtime.system.errors import EngineError, NonFiniteError, ProofError, RequestError
from runtime.system.hardware import Cpu
from runtime.system.progress import SILENT

pytestmark = pytest.mark.filterwarnings("ignore:refiner steps")
SAID = lambda text: None  # noqa: E731 - nobody listens
SETTINGS = CalibrationSettings(samples=6, batch=2)


@pytest.fixture(scope="module")
def deployment(checkpoints: Path) -> Deployment:
    """golden_s with its refiner, three predictor and two refiner evaluations, guided."""
    wanted = ModelSpec(
        checkpoints / "golden_s-predictor.pt",
        checkpoints / "golden_s-refiner.pt",
        HEADS["golden_s"],
        None,
        Guidance(2.0),
    )
    return load_deployment(wanted, SamplerChoice("H1P1R1"))


@pytest.fixture(scope="module")
def ranges(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Ranges:
    return calibrate_int8(deployment, SETTINGS, tmp_path_factory.mktemp("ranges") / "r.npz", SILENT)


def command(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


# Histograms


def histogram(values: Any) -> Histogram:
    made = Histogram()
    made.add(torch.as_tensor(values, dtype=torch.float32))
    return made


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.randoms())
def test_counts_depend_on_the_values_alone(values: list[float], random: Any) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)
    one, other = Histogram(), Histogram()
    one.add(torch.tensor(values))
    for value in shuffled:
        other.add(torch.tensor([value]))
    assert one.largest == other.largest == max(map(abs, torch.tensor(values).tolist()))
    assert one.exponent == other.exponent
    np.testing.assert_array_equal(one.counts, other.counts)
    assert one.counts.sum() == len(values)


@given(st.floats(-30, 12))
def test_a_value_lies_in_its_bin(power: float) -> None:
    value = float(np.float32(2.0**power))
    made = histogram([value])
    (place,) = np.flatnonzero(made.counts)
    assert place * made.width <= value < (place + 1) * made.width
    assert made.counts.shape == (BINS,)


def test_merged_histograms_are_that_of_all_values() -> None:
    parts = [torch.randn(100) * scale for scale in (0.01, 1.0, 50.0)]
    both = merge_histograms([histogram(part) for part in parts])
    np.testing.assert_array_equal(both.counts, histogram(torch.cat(parts)).counts)


def test_values_that_are_not_finite_are_refused() -> None:
    for broken in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            histogram([1.0, broken])


# Clips


def squared_error(values: torch.Tensor, at: float) -> float:
    step = at / 127
    return float((values - (values / step).round().clamp(-128, 127) * step).square().mean())


def test_clips_of_a_bell_with_outliers() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(200_000), torch.tensor([40.0, -35.0])])
    found = {method: find_clip(histogram(values), method) for method in CLIP_METHODS}
    assert found["minmax"] == 40.0
    assert 3.5 < found["percentile"] < 4.5
    assert 2.0 < found["entropy"] < 10.0
    errors = {method: squared_error(values, at) for method, at in found.items()}
    assert errors["mse"] == min(errors.values())
    assert squared_error(values, found["mse"]) <= 1.02 * min(
        squared_error(values, at) for at in np.linspace(2, 40, 200)
    )


def test_clips_of_nothing_and_of_one_value() -> None:
    for method in CLIP_METHODS:
        assert find_clip(Histogram(), method) == 0.0
        assert 0 < find_clip(histogram([0.5, -0.5]), method) <= 0.5


# Equalisers


def test_an_equaliser_helps_where_channels_differ() -> None:
    torch.manual_seed(1)
    rows = torch.randn(128, 32) * torch.logspace(-1.5, 1.5, 32)
    weight = torch.randn(16, 32) / torch.logspace(-1, 1, 32)
    s = compute_equaliser(rows, weight, rows.abs().amax(dim=0), 0.99)
    assert float(s.log().mean().abs()) < 1e-5
    assert float(s[-1] / s[0]) > 10
    even = torch.randn(128, 32)
    assert torch.equal(compute_equaliser(even, torch.randn(16, 32), even.abs().amax(dim=0), 0.5), torch.ones(32))


# Trajectories


def test_trajectories_are_the_engines_own(deployment: Deployment, tiny_engines: Path) -> None:
    seeds, labels = (3, 4), (1, 2)
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        request = pipeline.request(list(labels), seeds=seeds, schedule="H1P1R1", guidance=2.0)
        expected = pipeline.run(replace(request, vae=None)).latents
    np.testing.assert_allclose(sample_deployment(deployment, labels, seeds), expected, atol=2e-4)


def test_every_layer_time_and_branch_is_looked_at(deployment: Deployment) -> None:
    seen: dict[str, list[tuple[float, int]]] = {}
    sample_deployment(deployment, [1, 2], [0, 1], lambda name, t, x: seen.setdefault(name, []).append((t, len(x))))
    assert sorted(seen) == sorted(deployment.layers)
    times = deployment.list_times()
    for name, calls in seen.items():
        role = name.partition("/")[0]
        assert {t for t, _ in calls} == set(times[role])
        assert {rows for _, rows in calls} == {4}  # two images, both branches


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"schedule": "H1P1R1"}, "without a refiner"),
        ({"solver": "dopri5"}, "chooses its own steps"),
        ({"solver": "sde-euler"}, "draws noise"),
    ],
)
def test_samplers_that_cannot_be_calibrated(checkpoints: Path, sampler: dict[str, Any], message: str) -> None:
    wanted = ModelSpec(checkpoints / "golden_nosigma-predictor.pt", None, HEADS["golden_nosigma"], None, Guidance())
    with pytest.raises(RequestError, match=message):
        load_deployment(wanted, SamplerChoice(**sampler))


# The measurement


def test_ranges_hold_what_was_read(deployment: Deployment, ranges: Ranges) -> None:
    assert set(ranges.layers) == set(deployment.layers)
    assert ranges.record.model == deployment.model
    occupied = {role: {find_time_bin(t) for t in times} for role, times in deployment.list_times().items()}
    for name, one in ranges.layers.items():
        filled = set(np.flatnonzero(np.any(one.high > 0, axis=1)).tolist())
        assert filled == occupied[name.partition("/")[0]]
        largest = max(one.high.max(), -one.low.min())
        assert one.plain[-1, CLIP_METHODS.index("minmax")] == pytest.approx(largest)
        assert one.plain[:-1].max() == pytest.approx(largest)
        scaled = np.maximum(one.high.max(axis=0), -one.low.min(axis=0)) / one.equaliser
        assert one.equalised[-1, CLIP_METHODS.index("minmax")] == pytest.approx(scaled.max(), rel=1e-5)
        assert np.all(one.plain[-1] > 0) and np.all(one.plain[-1] <= largest * 1.0001)
        assert 0 < one.plain_error.min() < 0.01
    assert len(one.plain) == TIME_BINS + 1


def interrupted_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next calibration dies in the middle of a batch."""
    calls = []

    def dying(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return sample_deployment(*arguments)

    monkeypatch.setattr("calibration.lowbit.measure_ranges.sample_deployment", dying)


@pytest.mark.parametrize("batches", [1, 3, 4])
def test_a_resumed_run_gives_the_identical_file(
    deployment: Deployment, ranges: Ranges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    whole, out = tmp_path / "whole.npz", tmp_path / "out.npz"
    calibrate_int8(deployment, SETTINGS, whole, SILENT)
    interrupted_after(batches, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        calibrate_int8(deployment, SETTINGS, out, SILENT, save_every_s=0)
    monkeypatch.undo()
    assert not out.exists()
    told = RecordedProgress()
    again = calibrate_int8(deployment, SETTINGS, out, told)
    assert told.lines[0] == f"going on after {batches} of 6 batches"
    assert out.read_bytes() == whole.read_bytes()
    assert again.sha256 == ranges.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "whole.npz"]


def test_a_killed_process_goes_on(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.npz"
    words = ["int8", "--predictor", checkpoints / "golden_nosigma-predictor.pt", "--heads", HEADS["golden_nosigma"],
             "--solver", "euler", "--steps", 3, "--samples", 40, "--batch", 2, "--out", out]  # fmt: skip
    text = [str(word) for word in words]
    code = f"import calibration.lowbit.measure_ranges as job; job.calibrate_int8.__kwdefaults__['save_every_s'] = 0\nfrom calibration.cli.calibrate import main; main({text})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    partial, deadline = out.with_suffix(".partial.npz"), time.monotonic() + 120
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.exists() and not out.exists(), "killed too early or too late"
    resumed = command(*words)
    assert resumed.exit_code == 0, resumed.output
    assert "going on after" in resumed.output
    killed = out.read_bytes()
    fresh = command(*words, "--restart")
    assert "going on" not in fresh.output
    assert out.read_bytes() == killed


def test_a_state_of_other_settings_is_not_gone_on_with(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.npz"
    interrupted_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        calibrate_int8(deployment, SETTINGS, out, SILENT, save_every_s=0)
    monkeypatch.undo()
    told = RecordedProgress()
    calibrate_int8(deployment, replace(SETTINGS, seed=5), out, told)
    assert not any("going on" in line for line in told.lines)
    assert "of another model, version or settings: beginning anew" in told.lines[0]
    assert read_ranges(out).record.settings["seed"] == 5


def test_layers_that_read_nan_are_named(deployment: Deployment, tmp_path: Path) -> None:
    layer = deployment.networks.predictor.get_submodule("blocks.0.mlp.fc1")
    kept = layer.bias.clone()  # type: ignore[operator, union-attr]
    layer.bias.fill_(float("nan"))  # type: ignore[operator, union-attr]
    try:
        with pytest.raises(
            NonFiniteError, match=r"predictor/blocks\.0\.mlp\.fc2 reads a value that is not finite at t = 0"
        ):
            calibrate_int8(deployment, SETTINGS, tmp_path / "r.npz", SILENT)
    finally:
        layer.bias.copy_(kept)  # type: ignore[operator, union-attr]


def test_layers_that_read_nothing_are_named(deployment: Deployment, tmp_path: Path) -> None:
    """A clip of zero would divide by zero; they have no range."""
    layer = deployment.networks.predictor.get_submodule("blocks.1.mlp.fc1")
    kept = layer.weight.clone(), layer.bias.clone()  # type: ignore[operator, union-attr]
    layer.weight.zero_(), layer.bias.zero_()  # type: ignore[operator, union-attr]
    try:
        with pytest.raises(RequestError, match=r"predictor/blocks\.1\.mlp\.fc2 read nothing but zeros") as caught:
            calibrate_int8(deployment, SETTINGS, tmp_path / "r.npz", SILENT)
    finally:
        layer.weight.copy_(kept[0]), layer.bias.copy_(kept[1])  # type: ignore[operator, union-attr]
    assert "int8-weights" in caught.value.remedy


def test_a_schedule_that_leaves_the_refiner_out_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    result = command("int8", "--predictor", checkpoints / "golden_s-predictor.pt", "--refiner",
                     checkpoints / "golden_s-refiner.pt", "--heads", 6, "--schedule", "H1P1", "--out", tmp_path / "r.npz")  # fmt: skip
    assert result.exit_code == 1
    assert "never evaluates the refiner" in result.output and "Do:" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--samples", 0), "0 samples"),
        (("--seed", -1), "seed -1"),
        (("--out", "ranges.json"), "ends in .npz"),
        (("--predictor", "missing.pt"), "no predictor checkpoint"),
    ],
)
def test_bad_requests_of_a_calibration(tmp_path: Path, words: tuple[Any, ...], message: str) -> None:
    given_out = () if "--out" in words else ("--out", tmp_path / "r.npz")
    result = command("int8", *words, *given_out)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


# The search


@pytest.fixture(scope="module")
def judge(deployment: Deployment) -> QualityMeter:
    return QualityMeter(deployment, 4, 4, None, None, "tests", SILENT)


def test_a_search_keeps_what_hurts_most(judge: QualityMeter, ranges: Ranges, tmp_path: Path) -> None:
    every = search_int8(judge, ranges, QualityTarget(latent_rms=100.0), ("mse",), SILENT)
    assert every.wide == () and every.is_reached
    assert set(every.methods) == {"mse, plain", "mse, equalised"}
    wanted = 0.6 * every.all_low.latent_rms
    found = search_int8(judge, ranges, QualityTarget(latent_rms=wanted), ("mse",), SILENT)
    assert found.is_reached and found.chosen.latent_rms <= wanted
    assert 0 < len(found.wide) < len(ranges.layers)
    assert set(found.blocks) == {name.rsplit(".", 2)[0] for name in ranges.layers}
    one_less = [judge.measure(f"int8 mse, x {n}", {}) for n in found.wide]
    assert all(quality.latent_rms == 0 for quality in one_less)  # nothing replaced is the exact model


def fewest(errors: dict[str, float], costs: dict[str, int], limit: float) -> tuple[str, ...]:
    """The search over parts whose squared errors add up."""

    def holds(wide: Collection[str]) -> bool:
        return sum(error**2 for name, error in errors.items() if name not in wide) <= limit

    alone = {name: Quality(error) for name, error in errors.items()}
    return sensitivity._find_fewest_wide(errors, alone, costs, holds, SILENT)


def test_the_search_finds_the_cheapest_set_of_independent_parts() -> None:
    errors = {"a": 3.0, "b": 1.0, "c": 0.1, "d": 2.0}
    assert fewest(errors, dict.fromkeys(errors, 1), 100) == ()
    assert fewest(errors, dict.fromkeys(errors, 1), 6) == ("a",)
    assert fewest(errors, {"a": 100, "b": 1, "c": 1, "d": 1}, 9.2) == ("b", "d")  # a is too dear
    assert fewest(errors, dict.fromkeys(errors, 1), 0) == ("a", "b", "c", "d")
    assert fewest({"a": float("inf"), "b": 0.1}, {"a": 9, "b": 1}, 1) == ("a",)  # overflowing parts stay wide


def test_fp16_keeps_what_overflows(deployment: Deployment, tmp_path: Path) -> None:
    layer = deployment.networks.predictor.get_submodule("blocks.0.mlp.fc1")
    other = deployment.networks.predictor.get_submodule("blocks.0.mlp.fc2")
    layer.weight.mul_(1e5), layer.bias.mul_(1e5)  # type: ignore[operator, union-attr]
    kept = other.weight.clone()  # type: ignore[operator, union-attr]
    other.weight.mul_(1e-5)  # type: ignore[operator, union-attr]
    try:
        here = QualityMeter(deployment, 2, 2, None, None, "overflow", SILENT)
        found = search_fp16(here, QualityTarget(latent_rms=0.05), SILENT)
    finally:
        layer.weight.div_(1e5), layer.bias.div_(1e5)  # type: ignore[operator, union-attr]
        other.weight.copy_(kept)  # type: ignore[operator, union-attr]
    assert "predictor/blocks.0.mlp.fc1" in found.wide
    assert len(found.wide) < 4
    assert not np.isfinite(found.all_low.latent_rms)
    assert any(name.endswith("softmax") for name in found.alone)
    choice = make_choice(found, "fp16", deployment, None, QualityTarget(latent_rms=0.05), "test")
    write_choice(tmp_path / "choice.json", choice)
    assert read_choice(tmp_path / "choice.json").measured["all"] == {
        "latent_rms": None, "psnr_db": None, "fid_ratio": None
    }  # fmt: skip


def test_a_calibration_with_a_refiner_serves_a_model_without_one(deployment: Deployment, ranges: Ranges) -> None:
    foreign = replace(ranges, layers=ranges.layers | {"refiner/blocks.0.mlp.fc1": next(iter(ranges.layers.values()))})
    networks = {"predictor": deployment.networks.predictor}
    alone = {name for name in ranges.layers if name.startswith("predictor/")}
    assert make_int8_layers(networks, foreign, "mse", equalised=True).keys() == alone


def test_other_clips_share_the_weights(deployment: Deployment, ranges: Ranges) -> None:
    made = make_int8_layers(deployment.networks.by_role, ranges, "mse", equalised=True)
    other = replace_clips(made, ranges, "minmax", equalised=True)
    fresh = make_int8_layers(deployment.networks.by_role, ranges, "minmax", equalised=True)
    for name, layer in other.items():
        assert layer.weight is made[name].weight
        assert layer.clip == fresh[name].clip
        assert torch.equal(layer.weight, fresh[name].weight)  # type: ignore[arg-type]


def test_measurements_are_kept(
    deployment: Deployment, ranges: Ranges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.npz"
    first = search_int8(
        QualityMeter(deployment, 2, 2, None, path, "k", SILENT), ranges, QualityTarget(latent_rms=9), ("mse",), SILENT
    )
    again = QualityMeter(deployment, 2, 2, None, path, "k", SILENT)
    monkeypatch.setattr(again, "_sample", lambda: pytest.fail("measured twice"))
    assert search_int8(again, ranges, QualityTarget(latent_rms=9), ("mse",), SILENT) == first
    other = QualityMeter(deployment, 2, 2, None, path, "another key", SILENT)
    assert other._qualities == {}


def test_the_command_writes_a_choice_that_a_build_takes(checkpoints: Path, tmp_path: Path) -> None:
    model = (
        "--predictor",
        checkpoints / "golden_nosigma-predictor.pt",
        "--heads",
        4,
        "--solver",
        "euler",
        "--steps",
        2,
    )
    out, calibration = tmp_path / "c.json", tmp_path / "r.npz"
    assert command("int8", *model, "--samples", 4, "--out", calibration).exit_code == 0
    result = command("sensitivity", *model, "--calibration", calibration, "--images", 2, "--method", "mse",
                     "--target-rms", 0.5, "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    choice = read_choice(out)
    assert (choice.precision, choice.calibration) == ("int8", read_ranges(calibration).sha256)
    assert choice.target == {"latent_rms": 0.5}
    assert out.with_suffix(".png").stat().st_size > 1000
    request = resolve_request(predictor=checkpoints / "golden_nosigma-predictor.pt", vaes=["none"], heads=4,
                              targets=["cpu"], precision="int8", calibration=calibration, choice=out)  # fmt: skip
    assert request.recipe.choice == choice
    assert {"calibration", "choice"} <= request.inputs.keys()
    impossible = command("sensitivity", *model, "--calibration", calibration, "--images", 2, "--method", "mse",
                         "--target-psnr", 30, "--vae", "none", "--out", tmp_path / "d.json")  # fmt: skip
    assert impossible.exit_code == 1 and "without a decoder" in impossible.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target-psnr", 40, "--target-rms", 0.1), "several targets"),
        (("--target-fid", 1.03), "at least"),
        (("--precision", "fp16", "--calibration", "r.npz"), "--calibration with --precision fp16"),
        ((), "int8 without a calibration"),
        (("--calibration", "r.npz"), "no calibration at r.npz"),
    ],
)
def test_bad_requests_of_a_search(tmp_path: Path, words: tuple[Any, ...], message: str) -> None:
    result = command("sensitivity", *words, "--out", tmp_path / "c.json")
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output


def test_fid_is_a_target_as_well(deployment: Deployment, vae: Path) -> None:
    from flowturbo.models.vae import load_vae

    seeing = replace(deployment, vaes={"small": load_vae(str(vae))})
    here = QualityMeter(seeing, 2, 2, "small", None, "fid", SILENT, fid=lambda pictures: float(pictures.mean()))
    quality = here.measure("nothing", {})
    assert quality == Quality(0.0, MAX_DB, 1.0)
    assert QualityTarget(fid_ratio=1.03).is_met_by(quality) and not QualityTarget(fid_ratio=0.9).is_met_by(quality)
    assert not QualityTarget(fid_ratio=1.03).is_met_by(Quality(0.0, 50.0))


# The gate


def record(**changes: Any) -> GateRecord:
    good = GateRecord(
        64,
        "cpu",
        "int8",
        "fp32",
        "onnxruntime cpu",
        "some CPU",
        64,
        10.0,
        20.0,
        30,
        100,
        25,
        90,
        0.02,
        40.0,
        35.0,
        30.0,
    )
    return replace(good, **changes)


def test_what_the_gate_refuses() -> None:
    limits = GateLimits()
    assert find_failures(record(), limits) == ()
    assert "2.00 × as fast" in format_gate(record())
    assert "weight bytes" not in format_gate(record())  # a directory from before they were counted
    counted = record(trunk_weights={"quantised": 800, "scales": 50, "wide": 0, "rest": 150})
    assert counted.quantised_share == 0.8
    assert "80.0 % of their weight bytes are int8, 5.0 % scales, 15.0 % first and last layer" in format_gate(counted)
    assert "are int4" in format_gate(replace(counted, precision="int4-weights"))
    assert find_failures(record(evaluation_ms=None, twin_ms=None), limits) == ()  # not executed here: said, not refused
    assert "not measured" in format_gate(record(evaluation_ms=None, twin_ms=None))
    (slow,) = find_failures(record(evaluation_ms=20.0), limits)
    assert "not faster than fp32" in slow and "some CPU" in slow
    assert find_failures(record(precision="int8-weights", evaluation_ms=30.0), limits) == ()  # a memory option
    (large,) = find_failures(record(bytes=100), limits)
    assert "not smaller" in large
    (poor,) = find_failures(record(psnr_db=29.9), limits)
    assert "29.9 dB" in poor
    (far,) = find_failures(record(psnr_db=None, latent_rms=0.2), limits)
    assert "0.200 apart" in far
    assert len(find_failures(record(psnr_db=float("nan")), limits)) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_build_that_is_not_worth_it_leaves_the_earlier_one(
    checkpoints: Path, nosigma_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then --force builds it from what the first try has left, and the manifest says what was measured."""
    predictor, calibration = checkpoints / "golden_nosigma-predictor.pt", tmp_path / "r.npz"
    made = command("int8", "--predictor", predictor, "--heads", 4, "--samples", 8, "--out", calibration)
    assert made.exit_code == 0, made.output
    out = tmp_path / "engines"
    shutil.copytree(nosigma_engines, out)
    earlier = read_manifest(out)
    request = resolve_request(
        predictor=predictor,
        vaes=["none"],
        heads=4,
        targets=["cpu"],
        max_batch=32,
        precision="int8",
        calibration=calibration,
    )
    with pytest.raises(ProofError, match=r"latents are .* apart") as caught:
        build(request, out, gate=GateLimits(latent_rms=1e-6))
    stage = tmp_path / ".engines.building"
    assert "--force" in caught.value.remedy and str(stage) in caught.value.remedy
    assert read_manifest(out).key == earlier.key
    assert sorted(path.name for path in tmp_path.iterdir()) == [stage.name, "engines", "r.npz"]
    progress = RecordedProgress()
    sampled: list[int] = []
    run = Pipeline.run
    monkeypatch.setattr(Pipeline, "run", lambda self, r, **o: (sampled.append(len(r.labels)), run(self, r, **o))[1])
    forced = build(request, out, gate=GateLimits(latent_rms=1e-6), force=True, progress=progress).manifest
    assert not [line for line in progress.lines if "exporting" in line]  # neither the build's files nor its twin's
    assert sampled and max(sampled) <= 2  # the proof's; the gate's images were kept
    (judged,) = read_manifest(out).gates
    assert judged == forced.gates[0]
    assert judged.images == 64 and 0 < judged.latent_rms < 0.3
    assert judged.evaluation_ms is not None and judged.evaluation_ms > 0
    assert judged.trunk_bytes < 0.6 * judged.twin_trunk_bytes
    held = forced.find_graph("predictor", 64, "int8")
    assert held is not None and judged.trunk_weights == held.weights
    assert 0.5 < judged.quantised_share < 1 and held.weights["wide"] == 0
    assert any("apart" in note for note in forced.notes)
    assert forced.inputs["calibration"] == read_ranges(calibration).sha256
    assert {e.graph: e.precision for e in forced.engines} == {"conditioning": "fp16", "predictor": "int8"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engines", "r.npz"]
    with Pipeline.load(out, threads=1) as pipeline:
        assert pipeline.precision == "int8"
        assert np.isfinite(pipeline.run(pipeline.request([1], solver="euler", steps=2)).latents).all()
    assert json.loads((out / "manifest.json").read_text())["schema"] == MANIFEST_SCHEMA
    assert not list(out.rglob("reference"))
    # What --force kept is no worse judged the next time, and a milder limit is told from what was measured.
    with pytest.raises(ProofError, match=r"latents are .* apart"):
        build(request, out, gate=GateLimits(latent_rms=1e-6))
    assert not build(request, out, gate=GateLimits(latent_rms=1e-6), force=True).is_rebuilt
    assert recheck_gate(forced, GateLimits(images=65, latent_rms=1.0)) == "compared on fewer than 65 images"
    fast = replace(forced, gates=(replace(judged, evaluation_ms=1.0, twin_ms=2.0),))
    assert recheck_gate(fast, GateLimits(latent_rms=1.0)) == ""
    assert recheck_gate(replace(fast, gates=()), GateLimits()) == "not compared with a wider build: cpu"


@pytest.fixture(scope="module")
def memory_engines(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """golden_nosigma with int8 weights for CPU, which need not be faster, and so pass their gate."""
    out = tmp_path_factory.mktemp("memory") / "engines"
    predictor = checkpoints / "golden_nosigma-predictor.pt"
    request = resolve_request(
        predictor=predictor, vaes=["none"], heads=4, targets=["cpu"], max_batch=32, precision="int8-weights"
    )
    build(request, out)
    return out


def exported(*words: object) -> Result:
    return CliRunner().invoke(export_main, [str(word) for word in words], catch_exceptions=False)


def test_engines_from_onnx_files_are_judged_beside_another_directory(
    memory_engines: Path, nosigma_engines: Path, tmp_path: Path
) -> None:
    """What a Jetson does, which has no checkpoints to make a twin from."""
    out = tmp_path / "engines"
    words = ("build-engines", "--from", memory_engines, "--target", "cpu", "--precision", "int8-weights", "--out", out)
    assert exported(*words, "--rebuild").exit_code == 0
    plain = read_manifest(out)
    assert [note for note in plain.notes if "--against DIR" in note]
    against = ("--against", nosigma_engines)
    missed = exported(*words, "--rebuild", *against, "--gate-psnr", 40, "--gate-images", 64)
    assert missed.exit_code == 0, missed.output  # no decoder, so no pictures that could miss it
    assert "of their weight bytes are int8" in missed.output
    judged = read_manifest(out)
    (gate,) = judged.gates
    assert (gate.against, gate.images) == ("fp32", 64) and 0 < gate.latent_rms < 0.15
    assert gate.twin_bytes > gate.bytes and gate.evaluation_ms is not None
    assert not [note for note in judged.notes if "--against DIR" in note]  # it was, now
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engines"]
    assert not list(out.rglob("reference"))
    assert "up to date" in exported(*words, *against).output


def test_a_missed_gate_of_a_build_from_onnx_files_leaves_the_earlier_directory(
    memory_engines: Path, nosigma_engines: Path, tmp_path: Path
) -> None:
    out = tmp_path / "engines"
    with pytest.raises(ProofError, match="apart"):
        build(
            open_directory(memory_engines, {"cpu": "int8-weights"}, against=nosigma_engines),
            out,
            gate=GateLimits(latent_rms=1e-9),
        )
    assert not out.exists()


def test_what_engines_cannot_be_judged_beside(
    memory_engines: Path, nosigma_engines: Path, tiny_engines: Path, tmp_path: Path
) -> None:
    words = ("build-engines", "--from", memory_engines, "--target", "cpu", "--out", tmp_path / "x")
    quantised = (*words, "--precision", "int8-weights")
    for command_line, message in (
        ((*quantised, "--against", tiny_engines), "built from another predictor"),
        ((*quantised, "--against", memory_engines), "which has int8-weights engines for cpu at 64 px"),
        ((*quantised, "--against", tmp_path / "none"), "no engine directory at"),
        ((*quantised, "--gate-psnr", 30), "--against (with --gate-images"),
        (("build-engines", "--against", nosigma_engines, "--out", tmp_path / "x"), "--against without --from"),
    ):
        result = exported(*command_line)
        assert result.exit_code == 1, result.output
        assert message in result.output and "Do:" in result.output
    with pytest.raises(RequestError, match=r"--against .* with precision fp32"):
        open_directory(nosigma_engines, {"cpu": "fp32"}, against=nosigma_engines)
    assert not (tmp_path / "x").exists()


def test_a_directory_that_engines_are_judged_beside_makes_the_same_pictures(
    memory_engines: Path, nosigma_engines: Path, tmp_path: Path
) -> None:
    """By the sampler of the engines that are judged, whatever its own is; and never with another fixed batch."""
    mine, other = read_manifest(memory_engines), read_manifest(nosigma_engines)
    write_manifest(tmp_path, replace(other, defaults=replace(other.defaults, steps=4, guidance=9.0)))
    twin = read_reference(tmp_path, mine, "cpu")
    assert (twin.manifest.defaults, twin.precision) == (mine.defaults, "fp32")
    write_manifest(tmp_path, replace(other, static_batch=True))
    with pytest.raises(RequestError, match="take exactly 2 images") as caught:
        read_reference(tmp_path, mine, "cpu")
    assert "any number" in caught.value.allowed


def test_a_twin_that_float16_cannot_hold_is_made_in_float32(
    checkpoints: Path, nosigma_engines: Path, tmp_path: Path
) -> None:
    """An equalised build may fit where the plain network does not: it is judged all the same, and that is said."""
    state = torch.load(checkpoints / "golden_nosigma-predictor.pt", weights_only=True)
    state["blocks.0.mlp.fc2.weight"][3, 0] = 1e5
    torch.save(state, tmp_path / "huge.pt")
    request = resolve_request(
        predictor=tmp_path / "huge.pt", vaes=["none"], heads=4, targets=["cuda"], precision="fp16"
    )
    with open_stage(tmp_path / "engines", request.key) as stage:
        compiled = lambda m, precisions, at: replace(m, notes=(str(precisions),))  # noqa: E731
        twin = build_reference(request, read_manifest(nosigma_engines), "cuda", "int8", stage, compiled)
        assert twin.precision == "fp32" and {graph.precision for graph in twin.manifest.graphs} == {"fp32"}
        assert twin.manifest.notes == ("{'cuda': 'fp32'}",)
        (note,) = twin.notes
        assert "compared with fp32" in note and "blocks.0.mlp.fc2.weight (1e+05)" in note
        assert all((twin.folder / graph.path).is_file() for graph in twin.manifest.graphs)
        remove_references(stage)
        assert not twin.folder.exists() and stage.folder.exists()


def test_pictures_are_compared_and_what_was_sampled_is_kept(
    tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "engines"
    shutil.copytree(tiny_engines, folder)
    manifest = read_manifest(folder)
    pair = GateComparison(folder, manifest, ReferenceBuild(tiny_engines, manifest, "fp32"), "cpu", "fp32", 32)
    progress = RecordedProgress()
    rms, decibels = compare_images(pair, 4, progress)
    assert rms.tolist() == [0.0] * 4 and np.isinf(decibels).all()
    assert ("gate at 32 px: 4 images in fp32", 4, 4) in progress.updates
    monkeypatch.setattr(Pipeline, "run", lambda *a, **o: pytest.fail("sampled twice"))
    assert compare_images(pair, 4)[0].tolist() == [0.0] * 4
    (about,) = folder.rglob("about.json")  # both sides are one directory here
    assert about.parent.parent == folder / "reference" / "latents"


AMX = Cpu("an Intel CPU", "x86_64", 2, 2, ("avx2", "amx_bf16"))


def elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch, machine: Cpu, *, installed: bool = True) -> list[str]:
    """What the gate says of OpenVINO on a machine, with the fake backend in OpenVINO's place; times are measured."""
    manifest = read_manifest(folder)
    pair = GateComparison(folder, manifest, ReferenceBuild(folder, manifest, "fp32"), "cpu", "int8", 64)
    monkeypatch.setattr(gate, "detect_cpu", lambda: machine)
    monkeypatch.setattr(gate, "find_openvino_problem", lambda: "")
    monkeypatch.setattr(gate, "is_provider_installed", lambda provider: installed)

    def runner(of: Manifest, target: str, options: BackendOptions) -> tuple[Manifest, BackendChoice, str]:
        own = replace(of, engines=tuple(e for e in of.engines if e.target == target))
        if target == "openvino":
            assert {e.precision for e in own.engines} == {"bf16"}
            return own, BackendChoice("fake", target, options, ""), "fake"
        return own, BackendChoice("onnxruntime", "cpu", BackendOptions(provider="cpu", threads=1), ""), "cpu"

    monkeypatch.setattr(gate, "choose_runner", runner)
    return gate.note_faster_backend(pair, record())


def test_openvino_in_bf16_is_recommended_where_it_is_faster(
    nosigma_engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[list[float]] = []
    evaluation_ms = gate.measure_evaluation_ms

    def both(sides: Any, resolution: int) -> list[float]:
        measured.append(evaluation_ms(sides, resolution))
        return [20.0, 10.0]

    monkeypatch.setattr(gate, "measure_evaluation_ms", both)
    (note,) = elsewhere(nosigma_engines, monkeypatch, AMX)
    assert len(measured) == 1 and len(measured[0]) == 2 and min(measured[0]) > 0  # both sides, in one run
    assert "OpenVINO in bf16 is faster than int8 here (10.0 ms an evaluation against 20.0" in note
    assert "--target openvino --precision bf16" in note
    monkeypatch.setattr(gate, "measure_evaluation_ms", lambda sides, resolution: [10.0, 10.0])
    assert elsewhere(nosigma_engines, monkeypatch, AMX) == []
    monkeypatch.setattr(gate, "measure_evaluation_ms", lambda sides, resolution: pytest.fail("nothing to measure"))
    (note,) = elsewhere(nosigma_engines, monkeypatch, AMX, installed=False)
    assert "was not tried" in note and "flowturbo[openvino]" in note
    assert elsewhere(nosigma_engines, monkeypatch, replace(AMX, features=("avx2", "avx512_vnni"))) == []


def test_openvino_that_fails_ends_no_build(nosigma_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(sides: Any, resolution: int) -> list[float]:
        raise EngineError("it cannot load the file")

    monkeypatch.setattr(gate, "measure_evaluation_ms", fails)
    assert elsewhere(nosigma_engines, monkeypatch, AMX) == ["OpenVINO in bf16 was not tried: it cannot load the file"]


def test_openvino_is_timed_where_it_runs(openvino_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real plug-in, on machines that it serves."""
    manifest = read_manifest(openvino_engines)
    pair = GateComparison(
        openvino_engines, manifest, ReferenceBuild(openvino_engines, manifest, "fp32"), "cpu", "int8", 64
    )
    monkeypatch.setattr(gate, "detect_cpu", lambda: AMX)
    seen: list[list[float]] = []
    evaluation_ms = gate.measure_evaluation_ms
    monkeypatch.setattr(gate, "measure_evaluation_ms", lambda *a: (seen.append(evaluation_ms(*a)), seen[-1])[1])
    gate.note_faster_backend(pair, record())
    assert len(seen) == 1 and min(seen[0]) > 0
