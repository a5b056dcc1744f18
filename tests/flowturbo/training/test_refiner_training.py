"""The refiner's objective and its variants: guided teacher, consistent second call, steps of a sampler."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden import Golden
from safetensors.torch import load_file
from training_data import make_cache, write_photographs

from flowturbo.checkpoints import load_network, save_network
from flowturbo.cli.train import main
from flowturbo.data.latents import CachedLatents
from flowturbo.flow import RefinerLossOptions, guide_velocities, interpolate_path, refiner_loss
from flowturbo.models.sit import SiT, SiTConfig, build_refiner_config
from flowturbo.training.preview import sample_flowturbo
from flowturbo.training.random_draws import Microbatch
from flowturbo.training.refiner_task import RefinerConfig, RefinerTask, read_steps
from flowturbo.training.run_log import read_metrics
from runtime.cli.run import main as flowturbo_run
from runtime.sampling import guidance
from runtime.sampling.blocks import parse_schedule, plan_flowturbo, plan_refiner_block
from runtime.sampling.calibrated import CalibratedSampler, write_calibrated_sampler
from runtime.sampling.plan import BASE, NEW, Evaluation, integrate
from runtime.system.errors import DataError, TrainingError

W, DT = 3.0, 0.1
PREDICTOR = SiTConfig(depth=1, width=16, heads=2, patch=2, latent_size=4, classes=2)


def shaken(config: SiTConfig, seed: int) -> SiT:
    """A network whose zero-initialised parts are random, so that everything counts."""
    torch.manual_seed(seed)
    model = SiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def networks() -> tuple[SiT, SiT]:
    return shaken(PREDICTOR, 0).eval(), shaken(build_refiner_config(PREDICTOR), 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    make_cache(write_photographs(folder / "data", ("a", "b"), count=8), folder / "latents")
    return folder / "latents"


@pytest.fixture(scope="module")
def predictor(networks: tuple[SiT, SiT], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("predictor") / "predictor.safetensors"
    save_network(file, networks[0], role="predictor")
    return file


def samples(count: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    data, noise = torch.randn(2, count, 4, 4, 4, generator=g)
    return {"data": data, "noise": noise, "t": torch.rand(count, generator=g) * 0.8, "y": torch.arange(count) % 2}


def test_guided_rows_are_the_deployed_ones() -> None:
    """The same numbers as the engines' `mix`, a scale per image."""
    rows, scales = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0)), [1.0, 2.5, 4.0]
    mix = guidance.build_class_branches([0, 1, 1], scales, 2, 4, double=True).mix
    deployed = torch.einsum("cnm,mchw->nchw", torch.from_numpy(mix), rows)
    torch.testing.assert_close(guide_velocities(rows, torch.tensor(scales)), deployed)


def test_the_guided_loss_is_the_deployed_refiner_call_against_the_guided_teacher(networks: tuple[SiT, SiT]) -> None:
    """Written out for one image at a time, in the runtime's terms."""
    teacher, refiner = networks
    s = samples()
    how = RefinerLossOptions(torch.full((3,), W), null_label=2)
    with torch.no_grad():
        found = refiner_loss(refiner, teacher, **s, dt=DT, options=how)
        for i, loss in enumerate(found):
            rows = guidance.build_class_branches([int(s["y"][i])], [W], 2, 4)
            mix, labels = torch.from_numpy(rows.mix), torch.from_numpy(rows.labels).long()

            def guided(network: SiT, x: torch.Tensor, t: float, v: torch.Tensor | None = None) -> torch.Tensor:
                points = torch.cat([x, x]) if v is None else torch.cat([torch.cat([x, x]), v], dim=1)
                out = network(points, torch.full((2,), t), labels)  # noqa: B023 - called at once
                return torch.einsum("cnm,mchw->nchw", mix, out)  # noqa: B023

            x, t = interpolate_path(s["data"][i : i + 1], s["noise"][i : i + 1], s["t"][i : i + 1]), float(s["t"][i])
            v = guided(teacher, x, t)
            x = x + DT * v[:1]
            error = guided(refiner, x, t + DT, v) + v - guided(teacher, x, t + DT)
            assert float(loss) == pytest.approx(float(error.square().mean()), rel=1e-4)


def test_guidance_of_one_is_the_unguided_loss_of_the_conditional_branch(networks: tuple[SiT, SiT]) -> None:
    teacher, refiner = networks
    s = samples()
    with torch.no_grad():
        plain = refiner_loss(refiner, teacher, **s, dt=DT)
        ones = refiner_loss(refiner, teacher, **s, dt=DT, options=RefinerLossOptions(torch.ones(3), null_label=2))
    # The doubled rows also ask the unconditional branch for its own fourth channel: near, and not the same.
    assert ones.tolist() == pytest.approx(plain.tolist(), rel=0.5)


def test_the_consistent_loss_is_of_both_calls_of_the_deployed_block(networks: tuple[SiT, SiT]) -> None:
    """The runtime's own block after an Euler step of the teacher; both its slopes against the teacher's there."""
    teacher, refiner = networks
    s = samples(1)
    t, events = float(s["t"][0]), []

    def predict(x: torch.Tensor, t: float) -> torch.Tensor:
        found: torch.Tensor = teacher(x, torch.full((1,), t), s["y"])
        return found

    def refine(x: torch.Tensor, t: float, v: torch.Tensor, add: torch.Tensor) -> torch.Tensor:
        return predict_change(refiner, x, t, v, s["y"]) + add

    block, _ = plan_refiner_block(1, t + DT, t + 2 * DT, slope=0, consistent=True)
    plan = [Evaluation("predictor", t, {BASE: 1.0}, {BASE: 1.0, NEW: DT}), *block]
    with torch.no_grad():
        found = refiner_loss(refiner, teacher, **s, dt=DT, options=RefinerLossOptions(second_call=True))
        integrate(plan, interpolate_path(s["data"], s["noise"], s["t"]), predict, refine, events.append)
        calls = [(e["slope"] - predict(e["point"], e["t"])).square().mean() for e in events[1:]]
    assert float(found[0]) == pytest.approx(float(sum(calls)) / 2, rel=1e-4)


def predict_change(refiner: SiT, x: torch.Tensor, t: float, v: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    change: torch.Tensor = refiner(torch.cat([x, v], dim=1), torch.full((1,), t), y)
    return change


def test_the_second_call_stops_at_the_end_unless_the_released_code_would_not(networks: tuple[SiT, SiT]) -> None:
    teacher, refiner = networks
    s, seen = samples(), []

    def watched(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(float(t.max()))
        found: torch.Tensor = teacher(x, t, y)
        return found

    for past_the_end, last in ((False, 1.0), (True, 1.1)):
        s["t"] = torch.full((3,), 0.9)
        refiner_loss(
            refiner, watched, **s, dt=DT, options=RefinerLossOptions(second_call=True, past_the_end=past_the_end)
        )
        assert seen[-1] == pytest.approx(last, abs=1e-6)


def test_no_gradient_flows_from_the_second_call_into_the_first(networks: tuple[SiT, SiT]) -> None:
    """The gradient of the whole is the mean of the two calls' own, the second with its inputs as plain numbers."""
    teacher, refiner = networks
    s = samples()
    x, t = interpolate_path(s["data"], s["noise"], s["t"]), s["t"] + DT
    with torch.no_grad():
        v = teacher(x, s["t"], s["y"])
        x = x + DT * v
    d = refiner(torch.cat([x, v], 1), t, s["y"]) + v
    first = (d - teacher(x, t, s["y"])).square().mean()
    d = d.detach()
    x, t = x + DT * d, t + DT
    second = (refiner(torch.cat([x, d], 1), t, s["y"]) + d - teacher(x, t, s["y"])).square().mean()
    expected = torch.autograd.grad((first + second) / 2, list(refiner.parameters()))
    loss = refiner_loss(refiner, teacher, **s, dt=DT, options=RefinerLossOptions(second_call=True)).mean()
    for a, b in zip(torch.autograd.grad(loss, list(refiner.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def task(cache: Path, networks: tuple[SiT, SiT], steps: Any = None, **options: Any) -> RefinerTask:
    return RefinerTask(networks[1], networks[0], CachedLatents(cache), RefinerConfig(**options), seed=0, steps=steps)


def test_uniform_steps_are_shared_and_stay_inside(cache: Path, networks: tuple[SiT, SiT]) -> None:
    found = task(cache, networks, min_dt=0.3, max_dt=0.5)
    halves = [found.load_batch(Microbatch(range(i, i + 32), 0)) for i in (0, 32)]
    assert len({float(dt) for half in halves for dt in half.dt}) == 1
    assert 0.3 <= float(halves[0].dt[0]) <= 0.5
    assert max(float((half.t + half.dt).max()) for half in halves) <= 1 + 1e-6
    beyond = task(cache, networks, min_dt=0.3, max_dt=0.5, reference_behaviour=True).load_batch(
        Microbatch(range(32), 0)
    )
    assert float((beyond.t + beyond.dt).max()) > 1


def test_steps_of_a_sampler_are_drawn_per_sample(cache: Path, networks: tuple[SiT, SiT]) -> None:
    steps = np.asarray([(0.0, 0.5), (0.5, 0.2), (0.7, 0.3)])
    found = task(cache, networks, steps, steps_from="x").load_batch(Microbatch(range(64), 0))
    pairs = [(round(float(t), 6), round(float(dt), 6)) for t, dt in zip(found.t, found.dt, strict=True)]
    assert set(pairs) == {(0.0, 0.5), (0.5, 0.2), (0.7, 0.3)}
    parts = [
        task(cache, networks, steps, steps_from="x").load_batch(Microbatch(range(i, i + 32), 0)).t for i in (0, 32)
    ]
    assert torch.equal(found.t, torch.cat(parts))


def test_steps_are_read_from_a_grid_and_from_images(tmp_path: Path) -> None:
    saved = CalibratedSampler(1, "calibrated", "schedule", {"predictor": "0" * 64}, (0.0, 0.25, 1.0), "H1P1")
    write_calibrated_sampler(tmp_path / "sampler.json", saved)
    assert read_steps(tmp_path / "sampler.json").tolist() == [[0, 0.25], [0.25, 0.75]]
    taken = [
        {"t": 0.0, "dt": 0.5, "block": "P", "error": 2.0, "accepted": False},
        {"t": 0.0, "dt": 0.3, "block": "P", "error": 0.4, "accepted": True},
        {"t": 0.3, "dt": 0.9, "block": "R", "error": None, "accepted": True},
    ]
    images = [{"file": "a.png", "path": taken}, {"file": "b.png", "path": None}, {"file": "c.png"}]
    (tmp_path / "run.json").write_text(json.dumps({"images": images}))
    assert read_steps(tmp_path / "run.json").tolist() == [
        [0, 0.3],
        [0.3, 0.7],
    ]  # a step beyond the end is cut off there


def test_steps_of_a_real_adaptive_run(tiny_engines: Path, tmp_path: Path) -> None:
    words = ["--engine", str(tiny_engines), "--class", "1", "--num", "2", "--adaptive", "lte", "--out", str(tmp_path)]
    done = CliRunner().invoke(flowturbo_run, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    steps = read_steps(tmp_path / "run.json")
    assert steps[:, 1].sum() == pytest.approx(2)  # two images from 0 to 1
    assert (steps[:, 0] == 0).sum() == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[1, 2]", "no JSON object"),
        ('{"grid": [0, 0.5]}', "time grid 0, 0.5"),
        ('{"grid": ["a"]}', "is damaged"),
        ('{"images": [{"path": [{"t": 0}]}]}', "is damaged"),
        ('{"images": []}', "no accepted step"),
        ('{"images": [{"path": [{"t": 0.9, "dt": 0, "accepted": true}]}]}', "a step outside"),
        ('{"grid": null, "kind": "adaptive"}', "no accepted step"),
    ],
)
def test_bad_step_files_are_said(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "steps.json").write_text(content)
    with pytest.raises(DataError, match=said) as caught:
        read_steps(tmp_path / "steps.json")
    assert caught.value.allowed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_dt": 0.2}, "--min-dt is 0.2, --max-dt 0.12"),
        ({"max_dt": 0.0}, "--max-dt 0.0"),
        ({"teacher_guidance": 0.0}, "--teacher-guidance is 0.0"),
        ({"steps_from": "x", "reference_behaviour": True}, "--steps-from with --reference-behaviour"),
    ],
)
def test_impossible_refiners_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingError, match=said) as caught:
        RefinerConfig(**options)
    assert caught.value.allowed and caught.value.remedy


def test_a_refiner_of_another_predictor_is_refused(cache: Path, networks: tuple[SiT, SiT]) -> None:
    other = SiT(replace(build_refiner_config(PREDICTOR), classes=5))
    with pytest.raises(TrainingError, match="the refiner has 5 classes, its predictor 2"):
        RefinerTask(other, networks[0], CachedLatents(cache), RefinerConfig(), 0)


VARIANTS = {
    "released": ["--reference-behaviour"],
    "guided": ["--teacher-guidance", "3"],
    "consistent": ["--second-call", "consistent", "--teacher-guidance", "2"],
    "calibrated": ["--steps-from", "{grid}"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns(cache: Path, predictor: Path, tmp_path: Path, variant: str) -> None:
    """Also that label dropout, guidance and the second call work together, and what the run records."""
    (tmp_path / "grid.json").write_text('{"grid": [0, 0.5, 0.8, 1]}')
    words = [word.format(grid=tmp_path / "grid.json") for word in VARIANTS[variant]]
    loop = ["--max-steps", "60", "--batch-size", "16", "--lr", "3e-3", "--ema", "0.9", "--min-dt", "0.1"]
    start = ["refiner", "--data", str(cache), "--predictor", str(predictor), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(main, [*start, *loop, *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert np.mean(losses[-25:]) < 0.9 * np.mean(losses[:25])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["files"]["predictor"]["path"] == str(predictor)
    network = load_network(tmp_path / "run" / "final.safetensors", "refiner")
    assert network.metadata["refiner"] == config["refiner"]
    assert load_file(tmp_path / "run" / "final.safetensors").keys() == network.model.state_dict().keys()


@pytest.mark.filterwarnings("ignore:refiner steps")
def test_previews_are_the_deployed_sampler(golden_s: Golden) -> None:
    """Of the reference networks, guided: the same latents as the runtime's plan over the golden's own rows."""
    noise, y = golden_s.read_tensor("x"), golden_s.read_tensor("y").long()
    schedule = parse_schedule("H1P1R2", force=True)
    labels = torch.cat([y, torch.full_like(y, golden_s.predictor.config.classes)])
    rows = guidance.build_class_branches(y.tolist(), [W] * len(y), int(labels[-1]), noise.shape[1])
    mix = torch.from_numpy(rows.mix)

    def evaluate(network: SiT, points: torch.Tensor, t: float) -> torch.Tensor:
        return torch.einsum("cnm,mchw->nchw", mix, network(points, torch.full((len(points),), t), labels))

    with torch.no_grad():
        found = sample_flowturbo(golden_s.predictor, golden_s.refiner, noise, y, schedule, W)
        expected = integrate(
            plan_flowturbo(schedule),
            noise,
            lambda x, t: evaluate(golden_s.predictor, torch.cat([x, x]), t),
            lambda x, t, v, add: evaluate(golden_s.refiner, torch.cat([torch.cat([x, x]), v], 1), t) + add,
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
