"""flowturbo-eval from the command line: features, image sets, engines, and the table of samplers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from metric_data import KNOWN, PROBS, REFERENCE, SAMPLES, pictures, write_mean_colour
from PIL import Image

from flowturbo import demo
from flowturbo.cli.evaluate import main
from flowturbo.evaluation.quality.engine_images import EngineImages
from flowturbo.evaluation.quality.sampled_latents import SampledLatents, make_balanced_draw
from flowturbo.evaluation.table.entries import BASELINE_NAME, FINEST_NAME, SAMPLER_ENTRIES, select_entries
from flowturbo.evaluation.table.pareto_plot import find_pareto_front
from runtime.pipeline import Pipeline
from runtime.sampling.sampler import SamplerChoice, resolve_sampler
from runtime.sampling.solvers import SOLVERS
from runtime.system.errors import RequestError

ROOT = Path(__file__).parents[4]


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.stdout if code == 0 else result.output


def run_json(*words: object) -> Any:
    return json.loads(run(*words, "--json"))


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def test_metrics_of_ready_features(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.npy", SAMPLES), save(tmp_path / "b.npy", REFERENCE)
    probs = save(tmp_path / "p.npy", PROBS)
    found = run_json("metrics", "--sample-features", a, "--reference-features", b, "--probs", probs)
    assert found["fid"] == pytest.approx(float(KNOWN["fid"]), rel=1e-6)
    assert found["inception_score"] == pytest.approx(float(KNOWN["inception_score_10_splits"]), rel=1e-6)
    assert found["kid"] == pytest.approx(float(KNOWN["kid_unbiased_full"]), rel=1e-6)
    assert (found["precision"], found["recall"]) == (float(KNOWN["precision_k3"]), float(KNOWN["recall_k3"]))
    assert set(run_json("metrics", "--sample-features", a, "--probs", probs)) == {
        "samples",
        "reference",
        "inception_score",
    }
    assert "kid" in run("metrics", "--sample-features", a, "--reference-features", b, "--metrics", "kid")


def test_mistakes_are_one_message(tiny_engines: Path, tmp_path: Path) -> None:
    a = save(tmp_path / "a.npy", SAMPLES)
    narrow, probs = save(tmp_path / "narrow.npy", REFERENCE[:, :5]), save(tmp_path / "p.npy", PROBS * 2)
    (tmp_path / "text.npy").write_text("no array")
    npz = tmp_path / "images.npz"
    np.savez(npz, arr_0=pictures(5))
    metrics = ("metrics", "--sample-features")
    cases = [
        ((*metrics, a, "--reference-features", narrow), "features of one extractor"),
        ((*metrics, a, "--probs", probs), "rows that add up to 1"),
        ((*metrics, tmp_path / "none.npy"), "a .npy file"),
        ((*metrics, tmp_path / "text.npy"), "a .npy file"),
        ((*metrics, a, "--metrics", "fd"), "fid, sfid"),
        ((*metrics, a), "cannot be computed of what is given"),
        ((*metrics, a, "--reference-features", a, "--metrics", "fid,sfid"), "sfid cannot be computed"),
        ((*metrics, a, "--metrics", "inception_score"), "--probs"),
        (("score", tmp_path, "--reference", tmp_path / "none"), "nothing at"),
        (("score", npz, "--reference", tmp_path / "text.npy", "--features", "demo"), "cannot be read as .npz"),
        (("score", npz, "--reference", "demo", "--seed", 1), "and --seed is given"),
        (("score", npz, "--reference", "demo", "--out", tmp_path), "a file of its own"),
        (("reference", "--data", npz, "--features", "demo", "--out", tmp_path), "a file of its own"),
        (("score", tmp_path / "none", "--reference", "demo"), "no folder"),
        (("score", tmp_path, "--reference", tmp_path), "no extractor named"),
        (("reference", "--data", tmp_path, "--out", tmp_path / "p.npz"), "no extractor named"),
        (("table", tmp_path, "--reference", "demo", "--out", tmp_path / "t"), "manifest.json"),
        (("table", tiny_engines, "--reference", "demo", "--out", tmp_path / "t", "--rows", "heum"), "heun-25"),
        (("inception", "--weights", tmp_path / "none.pth"), "no checkpoint"),
        (("compare", a), "no result"),
    ]
    for words, expected in cases:
        message = run(*words, code=1)
        # One message, and nothing made before it: what can be known beforehand is said before the work.
        assert message.startswith("error: ") and expected in message and "Traceback" not in message, (words, message)
    assert "I/N" in run("score", tmp_path, "--reference", "demo", "--shard", "2/2", code=2)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mean-colour extractor for the tests' 32-pixel engines."""
    return write_mean_colour(tmp_path_factory.mktemp("features") / "mean.onnx", side=32)


@pytest.fixture(scope="module")
def pack(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    np.savez(folder / "images.npz", arr_0=np.repeat(np.repeat(pictures(40, seed=1), 2, axis=1), 2, axis=2))
    out = folder / "pack.npz"
    made = run_json("reference", "--data", folder / "images.npz", "--features", features, "--out", out)
    assert (made["count"], made["kept"]) == (40, 40)
    return out


def test_a_folder_is_scored_and_results_compared(features: Path, pack: Path, tmp_path: Path) -> None:
    for name, count in (("one", 12), ("two", 12), ("three", 10)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(pictures(count, seed=len(name))):
            Image.fromarray(image).resize((32, 32)).save(tmp_path / name / f"{i}.png")
        words = ("--features", features, "--reference", pack, "--cache", tmp_path / "cache")
        found = run_json("score", tmp_path / name, *words, "--out", tmp_path / f"{name}.json")
        assert found["count"] == count and set(found["metrics"]) == {"fid", "precision", "recall", "kid"}
    side = run_json("compare", tmp_path / "one.json", tmp_path / "two.json")
    assert [result["samples"] for result in side] == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert "FID" in run("compare", tmp_path / "one.json", tmp_path / "two.json")
    assert "sample counts" in run("compare", tmp_path / "one.json", tmp_path / "three.json", code=1)


def test_few_pictures_are_scored_with_a_note_or_refused(features: Path, pack: Path, tmp_path: Path) -> None:
    images = np.repeat(np.repeat(pictures(4), 2, axis=1), 2, axis=2)
    one, three, four = (save(tmp_path / f"{n}.npy", images[:n]) for n in (1, 3, 4))
    words = ("--features", features, "--reference", pack, "--cache", tmp_path / "cache")
    said = run("score", one, *words, code=1)
    assert "fid, sfid, inception_score, precision, recall, kid of 1 image" in said
    assert "at least 2 images as samples" in said
    assert not list((tmp_path / "cache").rglob("*.npz"))  # before the work
    said = run("score", three, *words, "--metrics", "fid,recall", code=1)
    assert "recall of 3 images" in said and "at least 4 images" in said and "--metrics fid,sfid" in said
    found = run_json("score", three, *words)
    assert set(found["metrics"]) == {"fid", "precision", "kid"}
    assert [note for note in found["notes"] if note.startswith("recall –")]
    lines = run("score", four, *words).splitlines()
    assert lines[-1].startswith("note: FID of 4 images and a reference of 40: mostly noise below 2000")
    assert "notes" not in run_json("score", four, *words, "--metrics", "kid")
    assert "fid of 1 image" in run("score", one, *words, "--metrics", "fid", code=1)


def test_a_set_against_itself_has_distance_0(features: Path, tmp_path: Path) -> None:
    images = save(tmp_path / "a.npy", np.repeat(np.repeat(pictures(9), 2, axis=1), 2, axis=2))
    found = run_json("score", images, "--features", features, "--reference", images, "--cache", tmp_path / "cache")
    assert 0 <= found["metrics"]["fid"] < 1e-6


def test_engines_are_scored_in_shards(tiny_engines: Path, features: Path, pack: Path, tmp_path: Path) -> None:
    words = ["score", tiny_engines, "--features", features, "--reference", pack, "--num", 8, "--schedule", "H1P2"]
    words += ["--threads", 1, "--cache"]
    assert run(*words, tmp_path / "shards", "--shard", "1/2") == ""
    assert len(list((tmp_path / "shards" / "latents").rglob("*.npz"))) == 1  # the second of three chunks
    assert run_json(*words, tmp_path / "shards") == run_json(*words, tmp_path / "whole")
    assert "--num 2000" in run("score", tiny_engines, "--features", features, "--reference", pack, code=1)


def test_a_killed_run_goes_on(tiny_engines: Path, features: Path, pack: Path, tmp_path: Path) -> None:
    words = ["score", tiny_engines, "--features", features, "--reference", pack, "--num", 15, "--solver", "heun"]
    words += ["--steps", 15, "--threads", 1, "--json", "--cache"]
    command = [sys.executable, "-m", "flowturbo.cli.evaluate", *map(str, words), str(tmp_path / "killed")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(tmp_path.rglob("latents/*/0000003.npz")):
            time.sleep(0.01)
        process.kill()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("latents/*/*.npz")}
    assert 2 <= len(kept) < 5
    found = json.loads(run(*words, tmp_path / "killed"))
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("latents/*/*.npz")}.items()
    assert found == json.loads(run(*words, tmp_path / "whole"))


@pytest.fixture(scope="module")
def table_words(tiny_engines: Path, features: Path, pack: Path) -> list[object]:
    words = ["table", tiny_engines, "--features", features, "--reference", pack, "--num", 5, "--threads", 1]
    return [*words, "--fine-steps", 40, "--timing-rounds", 2, "--rows", "heun-25,H1P5R3,searched-5"]


def test_the_table(table_words: list[object], tmp_path: Path) -> None:
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    words = [*table_words, "--repeats", 2, "--eager", demo.PREDICTOR, "--title", "Tiny"]
    found = run_json(*words, "--out", tmp_path / "t", "--page", page)
    assert [row["name"] for row in found["rows"]] == ["heun-25", "H1P5R3", "searched-5"]
    base, turbo, _ = found["rows"]
    assert base["acceleration"] == 0
    assert base["nfe"] == {"predictor": 50, "refiner": 0} and turbo["nfe"] == {"predictor": 7, "refiner": 6}
    assert turbo["acceleration"] == 1 - turbo["latency"]["median_ms"] / base["latency"]["median_ms"]
    for row in found["rows"]:
        assert {"precision", "recall", "kid", "psnr_db", "ssim", "latent_rms"} == set(row["values"])  # too few for FID
        assert row["values"]["latent_rms"]["std"] >= 0
    assert base["values"]["latent_rms"]["mean"] < turbo["values"]["latent_rms"]["mean"]
    assert json.loads((tmp_path / "t" / "table.json").read_text())["rows"] == found["rows"]
    with open(tmp_path / "t" / "table.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["heun-25", "H1P5R3", "searched-5"]
    text = page.read_text()
    assert (
        text.startswith("# Tiny\n")
        and "| FlowTurbo H1P5R3 | 7 + 6 R |" in text
        and "| vs. eager |" in text
        and "FID and sFID are left out" in text
    )
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in lines}) == 1  # a row has the cells that its head promises
    eager = found["eager"][base["vae"]]["median_ms"]
    assert f"| {1 - base['latency']['median_ms'] / eager:+.1%} |" in text
    assert (page.parent / "images" / "results-pareto.svg").stat().st_size > 1000
    assert (page.parent / "images" / "results-pareto.png").stat().st_size > 1000


def test_a_table_goes_on_where_it_was_and_processes_share_it(table_words: list[object], tmp_path: Path) -> None:
    first = run_json(*table_words, "--processes", 2, "--out", tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npz")}
    assert len(kept) == 4 * 2 + 2 + 3 * 2  # latents and the fine pictures in two chunks, and features
    again = run_json(*table_words, "--out", tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npz")} == kept
    assert [row["values"] for row in first["rows"]] == [row["values"] for row in again["rows"]]


def test_few_images_tell_the_same_seed_error(tiny_engines: Path) -> None:
    """Five of seven are compared, in chunks of three: the second chunk in part, the third not at all."""
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        draw = make_balanced_draw([0, 1], 7)
        coarse, fine = ({"solver": "heun", "steps": steps} for steps in (2, 6))
        exact, first = (SampledLatents(pipeline, part, fine, None) for part in (draw, draw.select(slice(5))))
        every, some = (
            EngineImages(
                pipeline,
                SampledLatents(pipeline, draw, coarse, None),
                "small",
                fine=EngineImages(pipeline, against, "small"),
            )
            for against in (exact, first)
        )
        pictures = every.read(3)
        whole, part = every.compute_scores(3, pictures), some.compute_scores(3, pictures)
        assert {len(values) for values in whole.values()} == {3} and {len(values) for values in part.values()} == {2}
        for name, values in part.items():
            np.testing.assert_allclose(values, whole[name][:2], rtol=1e-3)
        assert some.compute_scores(6, every.read(6)) == {}
        assert every.key != some.key


def test_what_the_engines_cannot_run_is_said(nosigma_engines: Path, table_words: list[object], tmp_path: Path) -> None:
    words = [nosigma_engines if word is table_words[1] else word for word in table_words]
    assert "no decoder" in run(*words, "--out", tmp_path, code=1)
    assert "no row of this table" in run(*table_words[:-1], "euler", "--out", tmp_path / "t", code=1)


@pytest.mark.filterwarnings("ignore:refiner steps")  # of H2P4R2, a published schedule
def test_the_rows_are_samplers_that_exist() -> None:
    assert (
        len({row.name for row in SAMPLER_ENTRIES})
        == len({row.label for row in SAMPLER_ENTRIES})
        == len(SAMPLER_ENTRIES)
    )
    assert {BASELINE_NAME, FINEST_NAME, "H1P5R3", "H2P4R2", "H2P8R2", "H5P7R3", "H8P9R5"} <= {
        row.name for row in SAMPLER_ENTRIES
    }
    for row in SAMPLER_ENTRIES:
        if set(row.sampler) <= {"schedule", "solver", "steps"}:
            resolve_sampler(SamplerChoice(**row.sampler))
    solvers = {row.sampler.get("solver") for row in SAMPLER_ENTRIES}
    assert set(SOLVERS) <= solvers
    assert [row.name for row in select_entries(["heun-2*"])] == ["heun-25", "heun-250"]
    with pytest.raises(RequestError, match="H1P5R3"):
        select_entries(["nothing"])


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(1.0, 5.0), (2.0, 6.0), (3.0, 1.0), (3.0, 2.0), (4.0, 1.0)]
    assert find_pareto_front(points) == [0, 2]
