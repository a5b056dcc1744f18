"""The main job through the commands: a `.pt` in the official layout → engines → latents and pictures; reports that agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from golden import build_tiny_command, load_golden_arrays, measure_relative_difference
from PIL import Image

from export.cli.export import main as export_main
from runtime.cli.run import main as run_main
from runtime.directory.manifest import read_manifest
from runtime.sampling.noise import sample_noise
from runtime.sampling.solvers import SOLVERS

pytestmark = pytest.mark.filterwarnings("ignore:refiner steps")


def run(*words: object) -> Result:
    return check_exit_code(CliRunner().invoke(run_main, [str(word) for word in words], catch_exceptions=False))


def export(*words: object) -> Result:
    return check_exit_code(CliRunner().invoke(export_main, [str(word) for word in words], catch_exceptions=False))


def check_exit_code(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def save(path: Path, array: np.ndarray[Any, Any]) -> Path:
    np.save(path, array)
    return path


REFERENCE = [
    ("golden_s", "H1P5R3", "traj/H1P5R3"),
    ("golden_s", "H2P4R3", "traj/H2P4R3"),
    ("golden_s", "P3", "traj/P3"),
    ("golden_s", "heun", "ode/heun2/11"),
    ("golden_nosigma", "heun", "ode/heun2/11"),
    ("golden_nosigma", "euler", "ode/euler/11"),
]


@pytest.mark.parametrize(("name", "sampler", "key"), REFERENCE)
def test_a_checkpoint_becomes_the_reference_implementations_latents(
    name: str, sampler: str, key: str, tiny_engines: Path, nosigma_engines: Path, tmp_path: Path
) -> None:
    arrays = load_golden_arrays(name)
    noise = save(tmp_path / "noise.npy", arrays["x"])
    first, second = (int(label) for label in arrays["y"])
    options = ["--solver", sampler, "--steps", 10] if sampler in SOLVERS else ["--schedule", sampler]
    engines = tiny_engines if name == "golden_s" else nosigma_engines
    run("--engine", engines, "--class", first, "--class", second, "--guidance", arrays["cfg_scale"], *options,
        "--noise", noise, "--save-latents", tmp_path / "new" / "latents.npy", "--out", tmp_path / "out")  # fmt: skip
    found, expected = np.load(tmp_path / "new" / "latents.npy"), arrays[key]
    assert found.dtype == np.float32
    assert measure_relative_difference(found, expected[-1] if expected.ndim == 5 else expected) < 1e-4


def test_building_again_answers_with_pure_json(tiny_engines: Path, checkpoints: Path, vae: Path) -> None:
    command = build_tiny_command(checkpoints, vae, tiny_engines)
    assert json.loads(export(*command, "--json").stdout)["key"] == read_manifest(tiny_engines).key
    assert "up to date" in export(*command).stdout


def test_one_picture(tiny_engines: Path, tmp_path: Path) -> None:
    result = run("--engine", tiny_engines, "--class", 3, "--seed", 5, "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["class3-seed5.png", "run.json"]
    assert str(tmp_path / "class3-seed5.png") in result.stdout
    assert "onnxruntime CPUExecutionProvider in fp32" in result.stdout
    with Image.open(tmp_path / "class3-seed5.png") as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")
        text = {key: str(value) for key, value in image.info.items()}
    manifest = read_manifest(tiny_engines)
    assert {key: text[key] for key in ("class", "seed", "schedule", "guidance", "engine")} == {
        "class": "3", "seed": "5", "schedule": "H1P5R3", "guidance": f"{manifest.defaults.guidance:g}", "engine": manifest.engine_hash,
    }  # fmt: skip


def test_several_pictures_have_a_grid(tiny_engines: Path, tmp_path: Path) -> None:
    run(
        "--engine",
        tiny_engines,
        "--class",
        3,
        "--class",
        "class 7",
        "--num",
        2,
        "--seed",
        10,
        "--solver",
        "ab2",
        "--steps",
        3,
        "--out",
        tmp_path,
    )
    pictures = ["class3-seed10.png", "class3-seed11.png", "class7-seed12.png", "class7-seed13.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*pictures, "grid.png", "run.json"])
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (64, 64)
        sheet = np.asarray(grid)
    for name, (top, left) in zip(pictures, [(0, 0), (0, 32), (32, 0), (32, 32)], strict=True):
        with Image.open(tmp_path / name) as image:
            np.testing.assert_array_equal(sheet[top : top + 32, left : left + 32], np.asarray(image))


def test_the_report(tiny_engines: Path, tmp_path: Path) -> None:
    result = run(
        "--engine",
        tiny_engines,
        "--class",
        1,
        "--num",
        4,
        "--schedule",
        "H1P5R3",
        "--guidance",
        2,
        "--json",
        "--out",
        tmp_path,
    )
    report = json.loads(result.stdout)  # stdout holds nothing else
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == report
    assert report["nfe"] == {"predictor": 7, "refiner": 6}
    calls = report["engine_calls"]
    assert (calls["predictor"], calls["refiner"], calls["decoder"]) == (
        14,
        12,
        2,
    )  # batches of 3 and 1: one call per NFE each
    assert [(image["class"], image["name"], image["seed"], image["guidance"]) for image in report["images"]] == [
        (1, "class 1", seed, 2.0) for seed in range(4)
    ]
    assert report["ran"]["provider"] == "CPUExecutionProvider"
    assert report["ran"]["precision"] == "fp32"
    assert {"load", "conditioning", "predictor", "refiner", "decoder", "png", "total"} <= set(report["seconds"])
    stages = sum(
        report["seconds"][stage] for stage in ("load", "conditioning", "predictor", "refiner", "decoder", "png")
    )
    assert stages <= report["seconds"]["total"] * 1.01
    assert all((tmp_path / name).exists() for name in report["files"])


def test_latents_are_saved_as_sampled(tiny_engines: Path, tmp_path: Path) -> None:
    """Two ways to the same noise; latents of a run are float32 and not divided by the scaling factor."""
    noise = save(tmp_path / "noise.npy", sample_noise([4, 5], (4, 16, 16)))
    common = ["--engine", tiny_engines, "--class", 2, "--num", 2, "--schedule", "H2", "--out", tmp_path / "out"]
    run(*common, "--seed", 4, "--save-latents", tmp_path / "a.npy")
    run(*common, "--noise", noise, "--save-latents", tmp_path / "b.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    zero = save(tmp_path / "noise.npy", np.zeros((2, 4, 16, 16), np.float32))
    run(*common, "--noise", zero, "--save-latents", tmp_path / "c.npy")
    assert not np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "c.npy"))


def test_the_same_seed_is_the_same_picture(tiny_engines: Path, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        run("--engine", tiny_engines, "--class", 2, "--seed", 8, "--schedule", "H2", "--out", tmp_path / folder)
    assert (tmp_path / "one" / "class2-seed8.png").read_bytes() == (tmp_path / "two" / "class2-seed8.png").read_bytes()


def test_a_directory_without_decoder_gives_latents_and_says_so(nosigma_engines: Path, tmp_path: Path) -> None:
    result = run(
        "--engine", nosigma_engines, "--class", "zebra", "--save-latents", tmp_path / "z.npy", "--out", tmp_path / "out"
    )
    assert "--vae none" in result.stdout
    assert "latents only" in result.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]
    report = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert report["sampler"] == "searched-8"
    assert report["images"][0]["class"] == 340
    assert np.load(tmp_path / "z.npy").shape == (1, 4, 8, 8)


def test_inspect_lists_the_contract(tiny_engines: Path) -> None:
    listed = json.loads(export("inspect", "--json", tiny_engines).stdout)
    graphs = {graph["graph"]: graph for graph in listed["graphs"]}
    assert list(graphs) == ["conditioning", "predictor", "refiner_conditioning", "refiner", "decoder-small"]
    predictor = graphs["predictor"]
    assert list(predictor["inputs"]) == [
        "base",
        "slopes",
        "point_coef",
        "update_coef",
        "error_coef",
        "atol",
        "rtol",
        "mods",
        "row_image",
        "mix",
    ]
    assert list(graphs["refiner"]["inputs"])[-2:] == ["velocity", "residual"]
    assert list(predictor["outputs"]) == ["slope", "velocities", "x_next", "err", "slope_rms"]
    assert predictor["inputs"]["slopes"] == {"dtype": "float32", "shape": [16, "B", 4, 16, 16]}
    assert predictor["inputs"]["row_image"] == {"dtype": "int32", "shape": ["N"]}
    assert predictor["ops"]["LayerNormalization"] == 7
    assert predictor["weight_bytes"] / (predictor["weight_bytes"] + graphs["conditioning"]["weight_bytes"]) <= 0.70


def test_inspect_and_verify_for_readers(tiny_engines: Path) -> None:
    shown = export("inspect", tiny_engines).stdout
    for words in ("32 px", "H1P5R3", "predictor", "decoder-small", "fp32"):
        assert words in shown
    proved = export("verify", tiny_engines)
    assert "files unaltered" in proved.stdout
    assert "within tolerance" in proved.stdout
    assert {"proofs", "not_executed"} <= set(json.loads(export("verify", "--json", tiny_engines).stdout))


@pytest.mark.parametrize(
    "command", [run_main, export_main, *export_main.commands.values()], ids=lambda command: str(command.name)
)
def test_help_says_what_a_command_is_for(command: Any) -> None:
    shown = check_exit_code(CliRunner().invoke(command, ["--help"])).output
    assert len(shown.splitlines()) > 5
    assert all(option.help for option in command.params if isinstance(option, click.Option))
