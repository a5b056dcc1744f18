"""Training: losses against the reference, resuming, stopping, and what a run leaves behind."""

from __future__ import annotations

import io
import json
import math
import re
import resource
import warnings
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file
from training_data import make_cache, small_vae, write_photographs

from flowturbo.checkpoints import load_network, save_network
from flowturbo.cli.train import main
from flowturbo.data.latents import CachedLatents, build_cache
from flowturbo.data.photographs import Photographs, list_photographs
from flowturbo.flow import flow_loss, refiner_loss
from flowturbo.models.sit import SiT, SiTConfig
from flowturbo.training.config import LoopConfig
from flowturbo.training.loop import TrainingRun, train
from flowturbo.training.optimizers import Ema, orthogonalise
from flowturbo.training.random_draws import Microbatch, list_microbatches, prefetch, sample_indices
from flowturbo.training.run_log import LossGuard, MetricsFile, read_metrics
from flowturbo.training.sit_task import FlowConfig, SitTask, load_latent_batch
from runtime.system.errors import BackendError, CheckpointError, OutputError, TrainingError
from runtime.system.locks import hold_lock

GOLDEN = Path(__file__).parents[2] / "data"
TINY = ["--width", "16", "--depth", "1", "--heads", "2", "--patch", "2", "--num-classes", "2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    make_cache(write_photographs(folder / "data", ("a", "b"), count=8), folder / "latents")
    return folder / "latents"


def task(cache: Path) -> SitTask:
    torch.manual_seed(0)
    model = SiT(SiTConfig(depth=1, width=16, heads=2, patch=2, latent_size=4, classes=2))
    return SitTask(model, CachedLatents(cache), FlowConfig(), seed=0)


def loop(**changes: Any) -> LoopConfig:
    return LoopConfig(**{"max_steps": 12, "batch_size": 4, "lr": 1e-3, "checkpoint_every": 4, "ema": 0.9, **changes})


def command(*words: str) -> Any:
    return CliRunner().invoke(main, list(words), catch_exceptions=False)


@pytest.mark.parametrize("name", ["golden_s", "golden_nosigma"])
def test_losses_match_the_reference(name: str) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    depth, width, heads, side, patch, classes, sigma = (int(v) for v in golden["config"])
    networks = {}
    for role, layers, channels in (("predictor", depth, 4), ("refiner", 1, 8)):
        config = SiTConfig(layers, width, heads, patch, side, channels, 4, classes, bool(sigma))
        networks[role] = SiT(config)
        keys = [key for key in golden.files if key.startswith(role + "/")]
        networks[role].load_state_dict({key.split("/")[1]: torch.from_numpy(golden[key]) for key in keys})
    data, noise, t, y = (torch.from_numpy(golden[key]) for key in ("x1", "x0", "t", "y"))
    with torch.no_grad():
        flow = flow_loss(networks["predictor"], data, noise, t, y)
        refined = refiner_loss(networks["refiner"], networks["predictor"], data, noise, t, float(golden["dt"]), y)
    assert np.allclose(flow.numpy(), golden["flow_loss"], rtol=1e-5)
    assert np.allclose(refined.numpy(), golden["refiner_loss"], rtol=1e-5)


def test_every_epoch_shows_every_sample_once() -> None:
    first, second = (sample_indices(0, range(i * 10, i * 10 + 10), 10).tolist() for i in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_draws_belong_to_positions_not_to_batches(cache: Path) -> None:
    latents = CachedLatents(cache)
    whole = load_latent_batch(latents, FlowConfig(label_dropout=0.5), 2, 0, range(0, 8))
    halves = [load_latent_batch(latents, FlowConfig(label_dropout=0.5), 2, 0, range(i, i + 4)) for i in (0, 4)]
    for name in ("posterior_noise", "noise", "t", "labels", "labels_with_dropout"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves])), name
    for part, parts in zip(whole.raw, zip(*(half.raw for half in halves), strict=True), strict=True):
        assert torch.equal(part, torch.cat(parts))


def test_label_dropout_and_times() -> None:
    """Shares of many draws: one in ten labels dropped, t uniform or in the middle."""
    latents = _Constant()
    uniform = load_latent_batch(latents, FlowConfig(), 7, 0, range(4000))  # type: ignore[arg-type]
    middle = load_latent_batch(latents, FlowConfig(times="logit-normal"), 7, 0, range(4000))  # type: ignore[arg-type]
    assert abs(float((uniform.labels_with_dropout == 7).float().mean()) - 0.1) < 0.015
    assert abs(float(uniform.t.std()) - 12**-0.5) < 0.01
    assert abs(float(middle.t.std()) - 0.208) < 0.01


class _Constant:
    manifest = SimpleNamespace(shape=(1, 1, 1))
    labels = np.zeros(5, dtype=np.int64)

    def __len__(self) -> int:
        return 5

    def read(self, indices: Any, mirrored: Any) -> Any:
        return (), self.labels[indices]


def test_a_run_leaves_what_it_promises(cache: Path, tmp_path: Path) -> None:
    words = ["sit", "--data", str(cache), "--out", str(tmp_path), *TINY, "--max-steps", "12", "--batch-size", "4"]
    done = command(*words, "--checkpoint-every", "4", "--keep", "2", "--ema", "0.9", "--lr-schedule", "cosine")
    assert done.exit_code == 0, done.output
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(12))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-{n:08d}.safetensors" for n in (8, 12)]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["loop"]["max_steps"] == 12
    assert config["model"]["width"] == 16
    network = load_network(tmp_path / "final.safetensors", "predictor")
    averaged = load_file(tmp_path / "step-00000012.safetensors")
    assert all(torch.equal(value, averaged[f"ema.{key}"]) for key, value in network.model.state_dict().items())
    assert network.metadata["classes"] == {"0": "a", "1": "b"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_is_bit_identical(cache: Path, tmp_path: Path, optimizer: Any) -> None:
    config = loop(optimizer=optimizer, schedule="cosine", warmup=3)
    train(task(cache), TrainingRun(tmp_path / "whole", config))
    stopped = task(cache)
    stopped.load_batch = _failing_at(stopped.load_batch, 10)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(stopped, TrainingRun(tmp_path / "halves", config))
    train(task(cache), TrainingRun(tmp_path / "halves", config, resume=True))
    for name in ("final.safetensors", "step-00000012.safetensors"):
        whole, halves = (load_file(tmp_path / run / name) for run in ("whole", "halves"))
        assert all(torch.equal(whole[key], halves[key]) for key in whole), name
    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "halves")]
    assert rows[0] == rows[1]


def _failing_at(draw: Any, step: int) -> Any:
    def interrupted(share: Microbatch) -> Any:
        if share.step_start // len(share.positions) == step:
            raise KeyboardInterrupt
        return draw(share)

    return interrupted


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (float("nan"), r"step 25: the loss is nan.*step-00000024"),
        (1e3, r"step 25: the loss explodes: .* median of .* over the last 25 steps; .*step-00000024"),
    ],
)
def test_a_bad_loss_stops_with_the_last_good_checkpoint(cache: Path, tmp_path: Path, factor: float, said: str) -> None:
    bad = task(cache)
    good, step = bad.compute_losses, count()
    bad.compute_losses = lambda batch: {  # type: ignore[method-assign]
        "loss": good(batch)["loss"] * (factor if next(step) >= 25 else 1)
    }
    with pytest.raises(TrainingError, match=said) as caught:
        train(bad, TrainingRun(tmp_path, loop(max_steps=40)))
    assert "--resume" in caught.value.remedy
    assert not (tmp_path / "final.safetensors").exists()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 25


def test_what_an_explosion_is(tmp_path: Path) -> None:
    watch = LossGuard(tmp_path, 10, [1.0] * 19)
    watch.check_loss(19, 50.0, 1.0)  # too early to say
    watch.check_loss(20, 9.9, 1.0)
    with pytest.raises(TrainingError, match="there is no checkpoint yet"):
        watch.check_loss(21, 10.1, 1.0)
    LossGuard(tmp_path, 0, [1.0] * 50).check_loss(50, 1e9, 1.0)
    with pytest.raises(TrainingError, match="gradient norm inf"):
        LossGuard(tmp_path, 0).check_loss(0, 1.0, float("inf"))


def test_a_checkpoint_of_another_network_is_refused(cache: Path, tmp_path: Path) -> None:
    train(task(cache), TrainingRun(tmp_path, loop(max_steps=4)))
    other = SitTask(SiT(SiTConfig(2, 16, 2, 2, 4, classes=2)), CachedLatents(cache), FlowConfig(), 0)
    with pytest.raises(CheckpointError, match="cannot resume from"):
        train(other, TrainingRun(tmp_path, loop(), resume=True))


def test_training_lowers_the_loss(cache: Path, tmp_path: Path) -> None:
    train(task(cache), TrainingRun(tmp_path, loop(max_steps=150, batch_size=16, lr=3e-3, checkpoint_every=150)))
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])


def test_vae_sit_refiner_from_photographs(tmp_path: Path) -> None:
    """The three commands in a row, on photographs; then the frozen encoder stays as it is."""
    data = str(write_photographs(tmp_path / "data", ("n02099601", "n02086240"), count=6))
    small = ["--resolution", "16", "--batch-size", "4", "--max-steps", "3", "--sample-every", "3"]
    vae = ["vae", "--data", data, *small, "--out", str(tmp_path / "vae")]
    for words in (
        [*vae, "--channels", "16,16,16", "--crop", "16"],
        ["vae", "--data", data, *small, "--out", str(tmp_path / "mse"), "--init", str(tmp_path / "vae" / "vae"),
         "--channels", "16,16,16", "--freeze-encoder", "--loss", "mse"],
        ["sit", "--data", data, *small, "--vae", str(tmp_path / "vae" / "vae"), "--out", str(tmp_path / "sit"),
         *TINY[:-2], "--num-classes", "1000"],
        ["refiner", "--data", str(tmp_path / "sit" / "latents"), "--predictor", str(tmp_path / "sit/final.safetensors"),
         "--out", str(tmp_path / "refiner"), "--batch-size", "4", "--max-steps", "3"],
    ):  # fmt: skip
        done = command(*words)
        assert done.exit_code == 0, done.output
    first, second = (
        load_file(tmp_path / run / "vae" / "diffusion_pytorch_model.safetensors") for run in ("vae", "mse")
    )
    assert all(torch.equal(first[key], second[key]) for key in first if key.startswith(("encoder", "quant_conv")))
    assert any(not torch.equal(first[key], second[key]) for key in first if key.startswith("decoder"))
    assert (
        load_network(tmp_path / "refiner" / "final.safetensors", "refiner").metadata["classes"]["207"]
        == "golden retriever"
    )
    scaling = json.loads((tmp_path / "vae" / "vae" / "config.json").read_text())["scaling_factor"]
    assert scaling > 0
    assert scaling != 0.18215
    assert (tmp_path / "sit" / "samples" / "step-00000003.png").exists()
    assert (tmp_path / "sit" / "loss.png").exists()


def test_a_sit_goes_on_from_finished_weights(cache: Path, tmp_path: Path) -> None:
    words = ["sit", "--data", str(cache), "--batch-size", "2", "--max-steps", "1"]
    assert command(*words, *TINY, "--out", str(tmp_path / "first")).exit_code == 0
    first = tmp_path / "first" / "final.safetensors"
    done = command(*words, "--out", str(tmp_path / "second"), "--init", str(first), "--lr", "1e-30", "--ema", "0")
    assert done.exit_code == 0, done.output
    before, after = load_file(first), load_file(tmp_path / "second" / "final.safetensors")
    assert all(torch.allclose(before[key], after[key]) for key in before)


def test_shares_cover_every_position_once() -> None:
    """Whatever the processes and passes, a step has the same samples, and each is drawn once."""
    for processes, accumulate, batch in ((1, 1, 12), (2, 1, 6), (2, 3, 2), (1, 4, 3)):
        found = [s for p in range(processes) for s in list_microbatches(5, batch, accumulate, p, processes)]
        assert sorted(position for share in found for position in share.positions) == list(range(60, 72))
        assert {share.step_start for share in found} == {60}


def test_drawing_ahead_keeps_the_order_and_the_errors() -> None:
    def draw_of(share: Microbatch) -> int:
        if share.step_start == 3:
            raise ValueError("bad file")
        return share.step_start

    shares = [Microbatch(range(i, i + 1), i) for i in range(5)]
    found = prefetch(draw_of, shares)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="bad file"):
        next(found)


def test_accumulating_changes_nothing(cache: Path, tmp_path: Path) -> None:
    train(task(cache), TrainingRun(tmp_path / "whole", loop(batch_size=8)))
    train(task(cache), TrainingRun(tmp_path / "parts", loop(batch_size=2, accumulate=4)))
    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "parts")]
    for whole, parts in zip(*rows, strict=True):
        assert parts == pytest.approx(whole, rel=1e-5)


def test_bf16_trains_float32_weights(cache: Path, tmp_path: Path) -> None:
    train(task(cache), TrainingRun(tmp_path, loop(precision="bf16")))
    assert {value.dtype for value in load_file(tmp_path / "final.safetensors").values()} == {torch.float32}
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    train(task(cache), TrainingRun(tmp_path / "fp32", loop()))
    exact = [row["loss"] for row in read_metrics(tmp_path / "fp32" / "metrics.jsonl")]
    assert losses != exact
    assert losses == pytest.approx(exact, rel=2e-2)


def test_what_a_resumed_run_records(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(task(cache), TrainingRun(tmp_path, loop(max_steps=4)))
    (tmp_path / ".step-00000008.safetensors.1-2.part").write_bytes(b"half")  # as kill -9 leaves it
    train(task(cache), TrainingRun(tmp_path, loop(max_steps=8, lr=5e-4), resume=True))
    said = capsys.readouterr().err
    assert "loop.lr 0.001 → 0.0005" in said
    config = json.loads((tmp_path / "config.json").read_text())
    assert [(start["step"], start["loop"]["lr"]) for start in config["starts"]] == [(0, 1e-3), (4, 5e-4)]
    assert {"command", "torch", "flowturbo", "time"} <= set(config["starts"][0])
    assert config["data"]["items"] == 16
    assert not list(tmp_path.glob(".*"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["last"]["step"] == 7


def test_progress_says_loss_average_rate_and_time_left(cache: Path, tmp_path: Path) -> None:
    text = io.StringIO()
    train(task(cache), TrainingRun(tmp_path, loop(), console=Console(file=text, width=200)))
    assert re.search(r"step 12/12  loss [\d.]+  EMA [\d.]+  \d+ img/s  ETA 0:00:00", text.getvalue())


def test_tensorboard_gets_what_metrics_get(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(task(cache), TrainingRun(tmp_path, loop(max_steps=4)))
    train(task(cache), TrainingRun(tmp_path, loop(max_steps=6), resume=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows
    ]


def test_corrupt_photographs_while_training(tmp_path: Path) -> None:
    """Reported, skipped, counted, and no end of the run."""
    root = write_photographs(tmp_path / "data", ("a", "b"), side=64)
    (root / "a" / "1.png").write_bytes((root / "a" / "1.png").read_bytes()[:200])
    words = ["sit", "--data", str(root), "--resolution", "64", *TINY, "--batch-size", "8", "--max-steps", "2"]
    done = command(*words, "--out", str(tmp_path / "run"), "--encode", "on-the-fly")
    assert done.exit_code == 0, done.output
    assert "skipping" in done.output
    assert "skipped 1 files" in done.output
    assert list(json.loads((tmp_path / "run" / "summary.json").read_text())["skipped"]) == [str(root / "a" / "1.png")]
    assert not (tmp_path / "run" / "latents").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["encoded"] == "on the fly"
    assert config["data"]["photographs"] == 8


def test_dry_run_on_photographs_encodes_nothing(tmp_path: Path) -> None:
    root = write_photographs(tmp_path / "data", ("a",), count=1)
    done = command("sit", "--data", str(root), "--resolution", "64", "--out", str(tmp_path / "run"), *TINY, "--dry-run")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing(cache: Path, tmp_path: Path) -> None:
    done = command("sit", "--data", str(cache), "--out", str(tmp_path / "run"), *TINY, "--dry-run")
    assert done.exit_code == 0
    assert json.loads(done.output)["model"]["width"] == 16
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-steps", "0"], "--max-steps is 0"),
        (["--lr", "-1"], "--lr is -1"),
        (["--lr", "nan"], "--lr is nan"),
        (["--ema", "1"], "--ema is 1"),
        (["--heads", "3"], "width 16 is not a multiple of heads 3"),
        (["--num-classes", "1"], "label 1, the network 1 classes"),
        (["--accumulate", "0"], "--accumulate is 0"),
        (["--clip", "-1"], "--clip is -1"),
        (["--explode", "inf"], "--explode is inf"),
        (["--warmup", "-3"], "--warmup is -3"),
        (["--seed", str(2**64)], f"--seed is {2**64}"),
        (["--heads", "0"], "heads is 0, below 1"),
        (["--times-mean", "nan"], "--times-mean is nan"),
        (["--label-std", "-1"], "--label-std is -1"),
        (["--device", "cuda"], "no CUDA device"),
        (["--fraction", "2"], "--fraction is 2.0"),
        (["--classes", "zebra"], "no class zebra"),
        (["--resolution", "512"], "--resolution 512 with latents of 16 pixels"),
        (["--encode", "on-the-fly"], "--encode on-the-fly with latents"),
        (["--model", "SiT-Q/2"], "unknown model"),
        (["--data", "nowhere"], "no data folder nowhere"),
    ],
)
def test_mistakes_print_one_message(cache: Path, tmp_path: Path, options: list[str], said: str) -> None:
    done = command("sit", "--data", str(cache), "--out", str(tmp_path / "run"), *TINY, *options)
    assert done.exit_code == 1
    assert said in done.output
    assert "Traceback" not in done.output


def test_a_run_does_not_write_into_its_data(cache: Path) -> None:
    """What it writes would be classes of photographs the next time."""
    for out in (cache, cache / "run"):
        done = command("sit", "--data", str(cache), "--out", str(out), *TINY)
        assert done.exit_code == 1
        assert f"--out {out} is in --data {cache}" in done.output
    assert not (cache / "run").exists()


def test_latents_are_no_photographs(cache: Path, tmp_path: Path) -> None:
    done = command("vae", "--data", str(cache), "--out", str(tmp_path / "run"), "--resolution", "16")
    assert done.exit_code == 1
    assert f"--data {cache} holds latents" in done.output


def test_a_missing_matplotlib_is_said_before_the_first_step(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowturbo.plotting.importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="matplotlib is not installed") as raised:
        train(task(cache), TrainingRun(tmp_path / "run", loop()))
    assert "flowturbo[train]" in raised.value.remedy
    assert not (tmp_path / "run").exists()


def test_a_second_run_in_the_same_folder_is_refused(cache: Path, tmp_path: Path) -> None:
    words = ["sit", "--data", str(cache), "--out", str(tmp_path), *TINY, "--max-steps", "1", "--batch-size", "2"]
    assert command(*words, "--resume").exit_code == 0  # nothing to resume yet: starts
    done = command(*words)
    assert done.exit_code == 1
    assert "already holds a run" in done.output


def test_a_finished_run_can_be_resumed_without_its_metrics(cache: Path, tmp_path: Path) -> None:
    train(task(cache), TrainingRun(tmp_path, loop(max_steps=2)))
    before = (tmp_path / "final.safetensors").read_bytes()
    (tmp_path / "metrics.jsonl").unlink()
    train(task(cache), TrainingRun(tmp_path, loop(max_steps=2), resume=True))
    assert (tmp_path / "final.safetensors").read_bytes() == before


def test_ema_follows_and_ends_at_its_decay() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    ema = Ema(network, 0.5)
    with torch.no_grad():
        network.weight.fill_(1)
        ema.network.weight.fill_(0)
    ema.update(network, 0)
    assert float(ema.network.weight) == pytest.approx(0.9)
    ema.update(network, 1000)
    assert float(ema.network.weight) == pytest.approx(0.95)


def test_the_average_has_the_networks_own_buffers() -> None:
    network = torch.nn.BatchNorm1d(2)
    ema = Ema(network, 0.9)
    network(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    ema.update(network, 0)
    assert torch.equal(ema.network.running_mean, network.running_mean)  # type: ignore[arg-type]
    assert int(ema.network.num_batches_tracked) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0: 1.0, 99: 1.0}),
        ({"warmup": 4}, {0: 0.25, 3: 1.0, 50: 1.0}),
        ({"decay": 20}, {0: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}),
        ({"schedule": "linear"}, {0: 1.0, 25: 0.75, 99: 0.01}),
        ({"schedule": "linear", "warmup": 20}, {9: 0.5, 20: 1.0, 60: 0.5}),
        ({"schedule": "cosine", "warmup": 20}, {20: 1.0, 60: 0.5, 40: 0.5 + 0.5 * 0.5**0.5}),
    ],
    ids=str,
)
def test_the_learning_rate_rises_and_falls(options: dict[str, Any], expected: dict[int, float]) -> None:
    config = loop(max_steps=100, **options)
    assert {step: config.compute_lr_scale(step) for step in expected} == pytest.approx(expected)


def test_an_infinite_gradient_stops_a_run_whose_loss_is_a_number(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 3: the loss is 0\.5 and the gradient norm inf"):
        LossGuard(tmp_path, limit=10.0).check_loss(3, 0.5, math.inf)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    for shape in ((3, 8, 24), (2, 24, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.3


def test_without_torch_the_command_says_what_to_install(tmp_path: Path) -> None:
    from test_arrows import fresh

    words = ["sit", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    done = fresh(f"from flowturbo.cli.train import main\nmain({words!r})")
    assert done.returncode == 1
    assert "training needs torch" in done.stderr
    assert "Do: pip install 'flowturbo[train]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert fresh("from flowturbo.cli.train import main\nmain(['sit', '--help'])").returncode == 0


@pytest.mark.parametrize(
    "shape", [{"heads": 0}, {"heads": -2}, {"depth": 0}, {"patch": 0}, {"width": 0}, {"classes": 0}]
)
def test_a_network_of_nothing_is_refused(shape: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(shape))} is {next(iter(shape.values()))}, below 1"):
        SiTConfig(**{"depth": 1, "width": 16, "heads": 2, "patch": 2, "latent_size": 4, **shape})  # type: ignore[arg-type]


def test_lines_of_a_metrics_file_that_are_no_steps_are_dropped_when_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 0, "loss": 2.0}', '{"step": 1}', '{"step": 2, "loss": "x"}', "[]", '{"step": 3, "lo']
    path.write_text("\n".join(lines))
    with MetricsFile(path, 4) as metrics:
        metrics.write(4, {"loss": 1.0})
    assert read_metrics(path) == [{"step": 0, "loss": 2.0}, {"step": 4, "loss": 1.0}]


@pytest.mark.parametrize(("before", "after"), [("muon", "adamw"), ("adamw", "muon")])
def test_another_optimizer_does_not_go_on_with_a_run(cache: Path, tmp_path: Path, before: str, after: str) -> None:
    words = ["sit", "--data", str(cache), "--out", str(tmp_path), *TINY, "--batch-size", "4", "--checkpoint-every", "2"]
    assert command(*words, "--max-steps", "2", "--optimizer", before).exit_code == 0
    refused = command(*words, "--max-steps", "4", "--optimizer", after, "--resume")
    assert refused.exit_code == 1 and "another --optimizer trained" in refused.output
    assert command(*words, "--max-steps", "4", "--optimizer", before, "--resume").exit_code == 0


def test_two_trainings_do_not_share_a_folder(cache: Path, tmp_path: Path) -> None:
    words = ["sit", "--data", str(cache), "--out", str(tmp_path), *TINY, "--max-steps", "2", "--batch-size", "2"]
    with hold_lock(tmp_path / ".lock", busy="", remedy=""):
        for more in ([], ["--resume", "--seed", "1"]):
            done = command(*words, *more)
            assert done.exit_code == 1
            assert f"another training is writing {tmp_path}" in done.output
            assert "name another --out" in done.output
        assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]  # nothing of the first one's is touched
    assert command(*words).exit_code == 0
    assert not (tmp_path / ".lock").exists()


def test_a_training_and_a_cache_that_are_refused_leave_the_folder(cache: Path, tmp_path: Path) -> None:
    data = write_photographs(tmp_path / "data", ("a", "b"))
    out = tmp_path / "latents"
    out.mkdir()
    with (
        hold_lock(out / ".lock", busy="", remedy=""),
        pytest.raises(OutputError, match="another process is writing") as raised,
    ):
        make_cache(data, out)
    assert raised.value.remedy
    make_cache(data, out)
    assert not (out / ".lock").exists()


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_a_damaged_last_checkpoint_is_told_from_the_whole_ones(cache: Path, tmp_path: Path, size: int) -> None:
    train(task(cache), TrainingRun(tmp_path, loop()))
    middle, last = (tmp_path / f"step-{n:08d}.safetensors" for n in (8, 12))
    whole = last.read_bytes()
    last.write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match="is damaged") as raised:
        train(task(cache), TrainingRun(tmp_path, loop(), resume=True))
    assert str(last) in raised.value.given
    assert f"{middle.name} before it is whole" in raised.value.given
    assert f"remove {last.name}: --resume then goes on from {middle.name}" in raised.value.remedy
    last.unlink()  # what the message says
    train(task(cache), TrainingRun(tmp_path, loop(), resume=True))
    assert last.read_bytes() == whole


def test_only_damaged_checkpoints_are_told(cache: Path, tmp_path: Path) -> None:
    train(task(cache), TrainingRun(tmp_path, loop(max_steps=4)))
    for content in (b"", (tmp_path / "final.safetensors").read_bytes()):  # cut, and no checkpoint of a training
        (tmp_path / "step-00000004.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="is whole") as raised:
            train(task(cache), TrainingRun(tmp_path, loop(), resume=True))
        assert f"no checkpoint in {tmp_path} is whole" in raised.value.given
        assert "start in another --out" in raised.value.remedy


def test_a_full_disk_is_one_message(cache: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 8 kB here, which is what a disk without space is to whoever writes."""
    words = ["sit", "--data", str(cache), "--out", str(tmp_path / "run"), *TINY, "--max-steps", "1"]
    photographs = Photographs(list_photographs(write_photographs(tmp_path / "data", ("a",), count=24, side=16)), 16)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        done = command(*words, "--batch-size", "2")
        with pytest.raises(OutputError) as raised:
            build_cache(tmp_path / "latents", photographs, small_vae(), "test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.exit_code == 1
    assert "step-00000001.safetensors: File too large" in done.output
    assert "free space" in done.output
    assert "latents-00000000.safetensors: File too large" in raised.value.given
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SiT of two classes for latents of 4², of one step."""
    out = tmp_path_factory.mktemp("trained")
    done = command("sit", "--data", str(cache), "--out", str(out), *TINY, "--max-steps", "1", "--batch-size", "2")
    assert done.exit_code == 0, done.output
    return out / "final.safetensors"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--width", "128"], "--width beside --init"),
        (["--width", "16"], "--width beside --init"),
        (["--depth", "2", "--heads", "4"], "--depth, --heads beside --init"),
        (["--patch", "1"], "--patch beside --init"),
        (["--model", "SiT-S/2"], "--model beside --init"),
        (["--no-learned-sigma"], "--no-learned-sigma beside --init"),
        (["--num-classes", "0"], "classes is 0, below 1"),
        (["--num-classes", "1"], "label 1, the network 1 classes"),
    ],
)
def test_a_shape_beside_init_is_refused(
    cache: Path, trained: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    done = command("sit", "--data", str(cache), "--out", str(tmp_path / "run"), "--init", str(trained), *options)
    assert done.exit_code == 1
    assert said in done.output
    assert "Allowed: " in done.output
    assert "Do: " in done.output
    assert not (tmp_path / "run").exists()


def test_a_released_size_and_a_shape_are_refused(cache: Path, tmp_path: Path) -> None:
    words = ["sit", "--data", str(cache), "--out", str(tmp_path / "run"), "--model", "SiT-S/2", "--depth", "3"]
    done = command(*words)
    assert done.exit_code == 1
    assert "--model, --depth together" in done.output


def test_init_with_other_classes_and_another_side(trained: Path, tmp_path: Path) -> None:
    """A fresh label table and fresh positions; everything else is the network's that it starts from."""
    photographs = Photographs(list_photographs(write_photographs(tmp_path / "data", ("a", "b", "c"), side=32)), 32)
    build_cache(tmp_path / "latents", photographs, small_vae(), "test")
    words = ["sit", "--data", str(tmp_path / "latents"), "--out", str(tmp_path / "run"), "--init", str(trained)]
    done = command(*words, "--num-classes", "5", "--max-steps", "1", "--batch-size", "2", "--lr", "1e-30", "--ema", "0")
    assert done.exit_code == 0, done.output
    assert "fresh label table: 5 classes" in done.output
    assert "fresh positions: latents of 8²" in done.output
    network = load_network(tmp_path / "run" / "final.safetensors", "predictor")
    assert (network.model.config.classes, network.model.config.latent_size) == (5, 8)
    before, after = load_file(trained), network.model.state_dict()
    table = after["y_embedder.embedding_table.weight"]
    assert table.shape == (6, 16)
    assert 0.01 < float(table.std()) < 0.03
    assert torch.equal(after["pos_embed"], SiT.build_positions(network.model.config))
    other = {"y_embedder.embedding_table.weight", "pos_embed"}
    assert all(torch.allclose(before[key], after[key]) for key in before if key not in other)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["fresh"] == ["positions", "label table"]


def test_init_on_a_side_that_its_patch_does_not_divide(cache: Path, tmp_path: Path) -> None:
    save_network(tmp_path / "a.safetensors", SiT(SiTConfig(1, 16, 2, 8, 8, classes=2)), role="predictor")
    done = command(
        "sit", "--data", str(cache), "--out", str(tmp_path / "run"), "--init", str(tmp_path / "a.safetensors")
    )
    assert done.exit_code == 1
    assert "latent size 4 is not a multiple of patch 8" in done.output
    assert "cache-latents --resolution" in done.output


@pytest.mark.parametrize(("dropout", "guidance"), [("0", 1.0), ("0.25", None)])
def test_label_dropout_is_in_the_metadata(cache: Path, tmp_path: Path, dropout: str, guidance: float | None) -> None:
    words = ["sit", "--data", str(cache), "--out", str(tmp_path), *TINY, "--max-steps", "1", "--batch-size", "2"]
    done = command(*words, "--label-dropout", dropout)
    assert done.exit_code == 0, done.output
    for name in ("final.safetensors", "step-00000001.safetensors"):  # a checkpoint is built as it is, too
        metadata = load_network(tmp_path / name, "predictor").metadata
        assert metadata["label_dropout"] == float(dropout)
        assert metadata.get("guidance") == guidance


def test_guidance_of_a_refiner_needs_a_trained_null_label(cache: Path, tmp_path: Path) -> None:
    words = ["--data", str(cache), "--max-steps", "1", "--batch-size", "2"]
    assert command("sit", *words, "--out", str(tmp_path / "a"), *TINY, "--label-dropout", "0").exit_code == 0
    predictor = ["--predictor", str(tmp_path / "a" / "final.safetensors"), "--teacher-guidance", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = command("refiner", *words, "--out", str(tmp_path / "b"), *predictor)
    assert done.exit_code == 0, done.output
    assert "warning: --teacher-guidance 2" in done.output
    assert "null label, which guidance moves away from, has not been learned" in done.output
