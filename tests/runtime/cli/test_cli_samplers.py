"""Every sampler over real ONNX Runtime engines, through the command and the pipeline: parity, paths, guidance, batches."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from golden import GOLDEN_NAMES, HEADS, Golden, load_golden_arrays, measure_relative_difference
from numpy.typing import NDArray
from PIL import Image

from export.cli.export import main as export_main
from runtime.batching import sample_part
from runtime.cli.run import main as run_main
from runtime.directory.manifest import read_manifest, write_manifest
from runtime.execution.fixed_loop import Usage
from runtime.pipeline import Pipeline
from runtime.sampling.calibrated import CalibratedSampler, write_calibrated_sampler
from runtime.sampling.plan import integrate
from runtime.sampling.sampler import SOLVER_NAMES, SamplerChoice, resolve_sampler
from runtime.sampling.sde import Diffusion
from runtime.sampling.solvers import ADAPTIVE_RULES
from runtime.system.errors import RequestError

pytestmark = pytest.mark.filterwarnings("ignore:refiner steps")
SDE = [
    (name, key)
    for name in GOLDEN_NAMES
    for key in load_golden_arrays(name)
    if key.startswith("sde/") and not key.endswith("noise")
]
PARITY_DOPRI5 = 2e-4
"""SiT's own run is only that exact: its second step follows from an error estimate below float32 rounding."""


def run(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(run_main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def run_for_report(*words: object) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(run(*words, "--json").stdout)
    return report


def sde(key: str) -> Any:
    """The sampler of a reference entry; SiT's 10 output times are 9 noisy steps and the last one, if there is one."""
    _, method, form, last = key.split("/")
    diffusion = Diffusion(form, 1.0, last.lower())
    steps = 9 if last == "None" else 10
    return resolve_sampler(SamplerChoice(solver=f"sde-{method.lower()}", steps=steps, diffusion=diffusion))


@pytest.mark.parametrize(("name", "key"), SDE)
def test_sde_runs_of_the_reference_given_its_noise(name: str, key: str, request: pytest.FixtureRequest) -> None:
    golden: Golden = request.getfixturevalue(name)
    noise = [torch.from_numpy(drawn[:2]) for drawn in golden.arrays[f"{key}/noise"]]
    with torch.inference_mode():
        found = integrate(
            sde(key).plan, golden.read_tensor("x"), lambda x, t: golden.predict_guided(x, float(t)), noise=noise
        )
    assert measure_relative_difference(found, golden.arrays[key]) < 1e-5


@pytest.mark.parametrize("key", [key for name, key in SDE if name == "golden_s"])
def test_sde_runs_of_the_reference_over_engines(key: str, tiny_engines: Path) -> None:
    arrays = load_golden_arrays("golden_s")
    noise = arrays[f"{key}/noise"][:, :2]
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        request = pipeline.request([int(y) for y in arrays["y"]], guidance=float(arrays["cfg_scale"]))
        request = replace(request, sampler=sde(key))
        assert request.sampler.num_draws == len(noise)
        found, journals = sample_part(
            pipeline._loop, pipeline.manifest, request, slice(0, 2), arrays["x"], lambda k: noise[k], Usage()
        )
    assert measure_relative_difference(found, arrays[key]) < 1e-5
    assert journals == []


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_dopri5_as_sit_runs_it(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """On the shared engines with room for both images' branches: their ONNX files take any batch."""
    arrays, shared = load_golden_arrays(name), {"golden_s": "tiny_engines", "golden_nosigma": "nosigma_engines"}[name]
    engines = Path(shutil.copytree(request.getfixturevalue(shared), tmp_path / "engines"))
    write_manifest(engines, replace(read_manifest(engines), max_batch=4))
    np.save(tmp_path / "noise.npy", arrays["x"])
    first, second = (int(label) for label in arrays["y"])
    report = run_for_report("--engine", engines, "--class", first, "--class", second, "--guidance", arrays["cfg_scale"],
                       "--solver", "dopri5-reference", "--noise", tmp_path / "noise.npy",
                       "--save-latents", tmp_path / "l.npy", "--out", tmp_path / "out")  # fmt: skip
    assert report["nfe"]["predictor"] == int(arrays["ode/dopri5/11/nfe"])
    assert measure_relative_difference(np.load(tmp_path / "l.npy"), arrays["ode/dopri5/11"]) < PARITY_DOPRI5


def test_dopri5_lands_where_a_tight_solution_lands(tiny_engines: Path) -> None:
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        loose = pipeline.run(pipeline.request([1, 5], solver="dopri5", tolerance=1e-3))
        tight = pipeline.run(pipeline.request([1, 5], solver="dopri5", tolerance=1e-5))
        fine = pipeline.run(pipeline.request([1, 5], solver="heun", steps=400))
    assert measure_relative_difference(tight.latents, fine.latents) < 2e-4
    assert measure_relative_difference(loose.latents, fine.latents) < 5e-3
    assert all(journal.steps[-1].t + journal.steps[-1].dt == 1.0 for journal in loose.journals)


@pytest.mark.parametrize("sampler", [{"solver": name} for name in SOLVER_NAMES if name != "flowturbo"]
                         + [{"adaptive": name} for name in ADAPTIVE_RULES] + [{"schedule": "H1P3R2"}], ids=str)  # fmt: skip
def test_every_sampler_runs_by_name_and_an_image_does_not_know_of_its_neighbours(
    sampler: dict[str, str], nosigma_engines: Path, tiny_engines: Path
) -> None:
    """On CPU in float32 an image is the same to the last bit alone and inside a batch, of others or of its like."""
    if sampler.get("solver") == "dopri5-reference":
        pytest.skip("one norm steers its batch: images do know of one another, as in the reference")
    short = {"steps": 6} if sampler.get("solver", "").startswith("sde") else {}
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        alone = pipeline.run(pipeline.request([5], seeds=[11], guidance=3.0, **sampler, **short))
        batch = pipeline.run(
            pipeline.request([1, 5, 5], seeds=[7, 11, 8], guidance=[1.0, 3.0, 3.0], **sampler, **short)
        )
    np.testing.assert_array_equal(batch.latents[1], alone.latents[0])
    assert np.isfinite(batch.latents).all()


@pytest.mark.parametrize("rule", list(ADAPTIVE_RULES))
def test_the_report_holds_the_path_of_every_image(rule: str, tiny_engines: Path, tmp_path: Path) -> None:
    report = run_for_report("--engine", tiny_engines, "--class", 1, "--class", 7, "--num", 2, "--adaptive", rule,
                       "--out", tmp_path)  # fmt: skip
    for image in report["images"]:
        kept = [step for step in image["path"] if step["accepted"]]
        assert sum(step["dt"] for step in kept) == pytest.approx(1.0, abs=1e-9)
        assert image["accepted"] == len(kept)
        assert image["rejected"] == len(image["path"]) - len(kept)
        assert not image["short"]
    assert report["nfe"]["predictor"] == np.mean([image["nfe"]["predictor"] for image in report["images"]])
    times_per_call = 2 if rule == "lte-heun" else 1  # Heun evaluates the end of a step again as the start of the next
    assert times_per_call * report["engine_calls"]["conditioning"] > 0.5 * report["engine_calls"]["predictor"]


def test_images_of_a_batch_take_their_own_evaluations(tiny_engines: Path, tmp_path: Path) -> None:
    """Guidance makes some images harder; a tolerance that all share gives them different numbers of steps."""
    report = run_for_report("--engine", tiny_engines, "--class", 1, "--num", 3, "--guidance", "1,4,9", "--adaptive", "lte",
                       "--tolerance", 0.003, "--out", tmp_path)  # fmt: skip
    assert len({image["nfe"]["predictor"] for image in report["images"]}) > 1
    forced = run_for_report("--engine", tiny_engines, "--class", 1, "--adaptive", "lte", "--tolerance", 0.003,
                       "--first-step", 0.9, "--out", tmp_path)  # fmt: skip
    assert forced["images"][0]["rejected"] >= 1
    assert forced["images"][0]["path"][0]["dt"] == pytest.approx(0.9)


def test_a_budget_that_runs_short_is_told(tiny_engines: Path, tmp_path: Path) -> None:
    result = run("--engine", tiny_engines, "--class", 1, "--adaptive", "lte", "--tolerance", 1e-5, "--max-nfe", 8,
                 "--out", tmp_path)  # fmt: skip
    assert "ran short for image 0" in result.output
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["images"][0]["short"] and report["images"][0]["nfe"]["predictor"] <= 8


def test_paths_are_drawn(tiny_engines: Path, tmp_path: Path) -> None:
    run("--engine", tiny_engines, "--class", 1, "--num", 2, "--adaptive", "lte", "--plot-path", tmp_path / "p" / "a.png",
        "--out", tmp_path / "o")  # fmt: skip
    with Image.open(tmp_path / "p" / "a.png") as drawn:
        assert drawn.width > 300
    run("--engine", tiny_engines, "--class", 1, "--schedule", "H1P3", "--plot-path", tmp_path / "b.svg", "--out",
        tmp_path / "o")  # fmt: skip
    assert "<svg" in (tmp_path / "b.svg").read_text()


def test_outside_the_interval_the_unguided_branch_is_not_evaluated(tiny_engines: Path, tmp_path: Path) -> None:
    words = ("--engine", tiny_engines, "--class", 1, "--guidance", 4, "--out", tmp_path)
    inside = run_for_report(*words, "--solver", "euler", "--steps", 10, "--guidance-interval", "0.3,0.7")
    assert inside["nfe"] == {"predictor": 10, "refiner": 0, "unguided": 6}
    assert inside["guidance_interval"] == [0.3, 0.7]
    with Pipeline.load(tiny_engines, threads=1) as pipeline:

        def latents(**options: Any) -> NDArray[np.float32]:
            return pipeline.run(pipeline.request([1], solver="euler", steps=10, **options)).latents

        cut = latents(guidance=4.0, guidance_interval=(0.3, 0.7))
        assert measure_relative_difference(cut, latents(guidance=4.0)) > 1e-3
        assert measure_relative_difference(cut, latents(guidance=1.0)) > 1e-3
        np.testing.assert_array_equal(latents(guidance=1.0, guidance_interval=(0.3, 0.7)), latents(guidance=1.0))
        np.testing.assert_array_equal(latents(guidance=4.0, guidance_interval=(0.0, 1.0)), latents(guidance=4.0))


def test_adaptive_samplers_count_what_is_unguided(tiny_engines: Path, tmp_path: Path) -> None:
    words = ("--engine", tiny_engines, "--class", 1, "--class", 5, "--adaptive", "lte", "--out", tmp_path)
    report = run_for_report(*words, "--guidance", "4,1", "--guidance-interval", "0.3,0.7")
    guided, free = report["images"]
    assert 0 < guided["nfe"]["unguided"] < guided["nfe"]["predictor"]
    assert {step["t"] for step in guided["path"]} >= {0.3, 0.7}
    assert not {step["t"] for step in free["path"]} & {0.3, 0.7}, "an unguided image does not stop at the edges"


def test_what_a_noise_file_and_a_seed_make_is_told_apart(tiny_engines: Path, tmp_path: Path) -> None:
    """A stochastic sampler draws from the seed what the noise file does not hold."""
    np.save(tmp_path / "n.npy", load_golden_arrays("golden_s")["x"][:1])
    words = ("--engine", tiny_engines, "--class", 1, "--noise", tmp_path / "n.npy", "--solver", "sde-euler", "--steps", 3,
             "--out", tmp_path / "o")  # fmt: skip
    reports = [run_for_report(*words, "--seed", seed) for seed in (0, 7)]
    assert [report["images"][0]["seed"] for report in reports] == [0, 7]
    assert {path.name for path in (tmp_path / "o").glob("*.png")} == {
        "class1-noise0-seed0.png",
        "class1-noise0-seed7.png",
    }
    assert reports[0]["settings"]["solver"] == "sde-euler"


def test_a_sampler_under_other_guidance_than_it_was_calibrated_for_warns(tiny_engines: Path, tmp_path: Path) -> None:
    sources = read_manifest(tiny_engines).model.sources
    saved = CalibratedSampler(1, "mine", "schedule", {"predictor": sources["predictor"]}, (0.0, 0.5, 1.0), "H1P1",
                         guidance={"scale": 2.0, "channels": 3, "interval": [0.0, 1.0]})  # fmt: skip
    write_calibrated_sampler(tmp_path / "mine.json", saved)
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        pipeline.request([1], schedule=str(tmp_path / "mine.json"), guidance=2.0)
        with pytest.warns(UserWarning, match="mine was calibrated for guidance scale 2"):
            pipeline.request([1], schedule=str(tmp_path / "mine.json"), guidance=4.0)


def test_mixtures_and_negative_classes_are_the_velocities_they_say(golden_s: Golden, tiny_engines: Path) -> None:
    """One Euler step is the velocity itself: compared with PyTorch's, mixed by hand."""
    x = golden_s.read_tensor("x")[:1]

    def velocity(label: int) -> torch.Tensor:
        with torch.inference_mode():
            return golden_s.predictor(x, torch.zeros(1), torch.tensor([label]))

    first, second, other = velocity(5), velocity(2), velocity(7)
    mixed = 0.75 * first + 0.25 * second
    expected = x + torch.cat([(3.0 * mixed + (1 - 3.0) * other)[:, :3], mixed[:, 3:]], dim=1)
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        request = pipeline.request("5:3,2:1", solver="euler", steps=1, guidance=3.0, negative=7)
        found = pipeline.run(request, noise=golden_s.arrays["x"][:1]).latents
    assert request.conditions[0].weighted_labels == ((5, 0.75), (2, 0.25))
    assert measure_relative_difference(found, expected) < 1e-4


def test_a_mixture_of_one_class_with_itself_is_no_mixture(tiny_engines: Path, tmp_path: Path) -> None:
    assert "twice" in run("--engine", tiny_engines, "--class", "5:0.5,5:0.5", "--out", tmp_path, code=1).output
    run("--engine", tiny_engines, "--class", "5:0.5,2:0.5", "--num", 2, "--out", tmp_path)
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["images"][0]["mixture"] == {"5": 0.5, "2": 0.5}
    assert (tmp_path / "class5+2-seed0.png").is_file()


def test_more_rows_than_the_engines_take_are_split_or_refused(nosigma_engines: Path, tiny_engines: Path) -> None:
    """Engines of at most 3 images and 6 rows: a mixture of five classes with guidance is 6 rows, of six is too many."""
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        five = "1:1,2:1,3:1,4:1,5:1"
        found = pipeline.run(pipeline.request([five] * 2, solver="euler", steps=1, guidance=2.0))
        assert found.usage.calls["predictor"] == 2
        with pytest.raises(RequestError, match="7 rows"):
            pipeline.request([f"{five},6:1"], guidance=2.0)
        pipeline.request([f"{five},6:1"], guidance=1.0)


@pytest.mark.parametrize("sampler", [{"adaptive": name} for name in ADAPTIVE_RULES] + [{"solver": "dopri5"}, {"schedule": "H1P3R2"},
                                     {"solver": "sde-heun", "steps": 4}, {"adaptive": "lte", "guidance_interval": (0.3, 0.8)}],
                         ids=str)  # fmt: skip
def test_a_fixed_batch_is_filled_up_whatever_leaves_it(sampler: dict[str, Any], tiny_engines: Path) -> None:
    """On the fake device, which takes any size: only the one size, guided and not, is ever asked for."""
    with Pipeline.load(tiny_engines, backend="fake") as pipeline:
        expected = pipeline.run(pipeline.request([5, 1, 7], guidance=[4.0, 1.0, 2.0], **sampler)).latents
    with Pipeline.load(tiny_engines, backend="fake") as pipeline:
        pipeline.manifest = replace(pipeline.manifest, static_batch=True, max_batch=4)
        found = pipeline.run(pipeline.request([5, 1, 7], guidance=[4.0, 1.0, 2.0], **sampler)).latents
        assert pipeline._loop.workspaces.list_sizes() <= {(4, 4), (4, 8)}
        for impossible in ({"classes": "5:1,1:1"}, {"classes": [5], "solver": "dopri5-reference"}):
            with pytest.raises(RequestError, match="fixed batch"):
                pipeline.request(**impossible)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("sampler", [{"solver": "heun", "steps": 40}, {"solver": "dopri5", "tolerance": 1e-4},
                                     {"schedule": "H1P40"}, {"adaptive": "lte", "tolerance": 1e-4}], ids=str)  # fmt: skip
def test_there_and_back(sampler: dict[str, Any], tiny_engines: Path) -> None:
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        request = pipeline.request([1, 5], guidance=1.0, **sampler)
        there = pipeline.run(request)
        back = pipeline.reverse(there.latents, [1, 5], **sampler)
        again = pipeline.run(request, noise=back)
    assert measure_relative_difference(again.latents, there.latents) < 2e-2


def test_reverse_from_latents_and_from_a_picture(checkpoints: Path, vae: Path, tmp_path: Path) -> None:
    engines = tmp_path / "engines"
    words = ["build-engines", "--predictor", checkpoints / "golden_nosigma-predictor.pt", "--vae", vae, "--heads",
             HEADS["golden_nosigma"], "--target", "cpu", "--encoder", "--max-batch", 2, "--out", engines]  # fmt: skip
    assert CliRunner().invoke(export_main, [str(word) for word in words]).exit_code == 0
    own = ("--engine", engines, "--class", 1, "--solver", "heun", "--steps", 30)
    run(*own, "--guidance", 1, "--save-latents", tmp_path / "l.npy", "--out", tmp_path / "o")
    run(*own, "--reverse", tmp_path / "l.npy", "--save-latents", tmp_path / "n.npy", "--out", tmp_path / "r")
    run(
        *own,
        "--guidance",
        1,
        "--noise",
        tmp_path / "n.npy",
        "--save-latents",
        tmp_path / "m.npy",
        "--out",
        tmp_path / "p",
    )
    assert measure_relative_difference(np.load(tmp_path / "m.npy"), np.load(tmp_path / "l.npy")) < 2e-2
    picture = next((tmp_path / "o").glob("class*.png"))
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(picture) as image:
        image.rotate(180).save(tmp_path / "turned.png", exif=exif)
    for name, file in (("u", tmp_path / "turned.png"), ("q", picture)):  # --reverse sees pictures as people do
        result = run(*own, "--reverse", file, "--save-latents", tmp_path / f"{name}.npy", "--out", tmp_path / "r")
    assert np.array_equal(np.load(tmp_path / "u.npy"), np.load(tmp_path / "q.npy"))
    assert np.load(tmp_path / "q.npy").shape == (1, 4, 8, 8)
    assert "-backwards" in result.output
    assert "from data to noise" in result.output and "no decoder" not in result.output


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("H2P1", {"schedule": "H2P1"}),
        ("heun", {"solver": "heun"}),
        ("dopri5", {"solver": "dopri5"}),
        ("lte", {"adaptive": "lte"}),
        ("{tmp}/kept.json", {"schedule": "{tmp}/kept.json"}),
    ],
)
def test_one_name_for_every_kind_of_sampler(
    name: str, options: dict[str, Any], tiny_engines: Path, tmp_path: Path
) -> None:
    sources = read_manifest(tiny_engines).model.sources
    saved = CalibratedSampler(1, "kept", "schedule", {"predictor": sources["predictor"]}, (0.0, 0.2, 0.5, 1.0), "H1P2")
    write_calibrated_sampler(tmp_path / "kept.json", saved)
    name, options = name.format(tmp=tmp_path), {key: value.format(tmp=tmp_path) for key, value in options.items()}
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        expected = pipeline.request([1], **options).sampler
        assert pipeline.request([1], sampler=name).sampler == expected
        assert pipeline.request([1], sampler=SamplerChoice(sampler=name)).sampler == expected
        assert pipeline.request([1], sampler=SamplerChoice(**options)).sampler == expected
    assert "sampler" not in expected.settings  # reports say what the name means
    report = run_for_report("--engine", tiny_engines, "--class", 1, "--sampler", name, "--out", tmp_path / "out")
    assert report["sampler"] == expected.name


def test_a_sampler_object_takes_further_keywords(tiny_engines: Path) -> None:
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        request = pipeline.request([1], sampler=SamplerChoice(sampler="heun", grid="shift:2"), steps=3)
        assert request.sampler == pipeline.request([1], solver="heun", grid="shift:2", steps=3).sampler
        with pytest.raises(RequestError, match="a name"):
            pipeline.request([1], sampler=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--adaptive", "lte", "--schedule", "H1P5"], "not both"),
        (["--adaptive", "lte", "--tolerance", "nan"], "tolerance"),
        (["--adaptive", "lte", "--max-nfe", "1"], "evaluations"),
        (["--solver", "dopri5", "--steps", "5"], "--steps"),
        (["--solver", "sde-euler", "--steps", "1"], "1 step"),
        (["--solver", "sde-heun", "--diffusion", "constant", "--last-step", "none"], "infinite"),
        (["--solver", "euler", "--diffusion", "sigma"], "--diffusion"),
        (["--solver", "euler", "--grid", "spiral"], "shift:S"),
        (["--guidance-interval", "0.7,0.3"], "interval"),
        (["--guidance-interval", "0.3"], "2 numbers"),
        (["--guidance", "1,2,3"], "3 guidance scales"),
        (["--negative-class", "poodle"], "poodle"),
        (["--negative-class", "5", "--guidance", "1"], "without guidance"),
        (["--schedule", "fast6"], "it has none"),
        (["--sampler", "fast6"], "it has none"),
        (["--sampler", "heun2"], "a solver: "),
        (["--sampler", "heun", "--schedule", "H2"], "one of them"),
        (["--sampler", "H1P2", "--steps", "5"], "3 steps"),
        (["--schedule", "nowhere.json"], "nowhere.json"),
        (["--plot-path", "steps.gif"], ".svg"),
        (["--plot-path", "{tmp}/o/class1-seed0.png"], "among the pictures"),
        (["--reverse", "x.npy"], "--save-latents"),
        (["--reverse", "x.npy", "--save-latents", "{tmp}/n.npy"], "x.npy"),
        (["--reverse", "{tmp}/text.png", "--save-latents", "{tmp}/n.npy"], "a picture"),
        (["--reverse", "{tmp}/script.png", "--save-latents", "{tmp}/n.npy"], "none of these formats"),
        (["--reverse", "{tmp}/grey.png", "--save-latents", "{tmp}/n.npy"], "--encoder"),
        (["--reverse", "{tmp}/l.npy", "--save-latents", "{tmp}/n.npy", "--schedule", "H1P5R3"], "towards data"),
        (["--reverse", "{tmp}/l.npy", "--save-latents", "{tmp}/n.npy", "--solver", "sde-euler"], "taken back"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message(words: list[str], says: str, tiny_engines: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    Image.new("L", (32, 32)).save(tmp_path / "grey.png")
    np.save(tmp_path / "l.npy", np.zeros((1, 4, 16, 16), np.float32))
    result = run("--engine", tiny_engines, "--class", 1, "--out", tmp_path / "o",
                 *(word.format(tmp=tmp_path) for word in words), code=1)  # fmt: skip
    assert result.output.startswith("error: ")
    assert says in result.output
    assert "Traceback" not in result.output
