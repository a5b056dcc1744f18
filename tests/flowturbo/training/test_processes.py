"""Training on several processes, started as users start them, and killed as machines kill them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import send_to_device
from click.testing import CliRunner
from safetensors.torch import load_file
from training_data import make_cache, write_photographs

from benchmarks.kill_resume import kill_and_resume
from flowturbo.checkpoints import save_network
from flowturbo.cli.train import main
from flowturbo.data.latents import CachedLatents
from flowturbo.data.photographs import Photographs, list_photographs
from flowturbo.models.sit import SiT, SiTConfig, build_refiner_config
from flowturbo.training.lpips import Lpips
from flowturbo.training.random_draws import Microbatch
from flowturbo.training.refiner_task import RefinerConfig, RefinerTask
from flowturbo.training.run_log import read_metrics
from flowturbo.training.sit_task import FlowConfig, SitTask
from flowturbo.training.vae_task import VaeConfig, VaeTask, build_vae

LOOP = ["--max-steps", "5", "--checkpoint-every", "2", "--lr", "1e-3", "--ema", "0.9", "--device", "cpu"]
NETWORK = SiTConfig(1, 16, 2, 2, 4, classes=2)
VAE = VaeConfig(channels=(8, 8, 8), groups=4, crop=0, lpips=1.0)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    make_cache(write_photographs(folder / "data", ("a", "b"), count=8), folder / "latents")
    return folder / "latents"


def train(*words: str) -> None:
    done = CliRunner().invoke(main, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output


def train_on_two(*words: str) -> str:
    start = [sys.executable, *TORCHRUN, "-m", "flowturbo.cli.train", *words]
    done = subprocess.run(start, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_same(a: Path, b: Path) -> None:
    rows = [read_metrics(run / "metrics.jsonl") for run in (a, b)]
    assert [row["step"] for row in rows[1]] == list(range(len(rows[0])))
    for one, two in zip(*rows, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    ours, theirs = (load_file(run / "final.safetensors") for run in (a, b))
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-6) for key in ours)


def test_two_processes_are_one_with_twice_the_batch(cache: Path, tmp_path: Path) -> None:
    """A refiner, because its Δt is shared by a step's samples; two processes go on where one has stopped."""
    torch.manual_seed(0)
    save_network(tmp_path / "predictor.safetensors", SiT(NETWORK), role="predictor")
    words = ["refiner", "--data", str(cache), "--predictor", str(tmp_path / "predictor.safetensors"), *LOOP]
    train(*words, "--out", str(tmp_path / "one"), "--batch-size", "8")
    train(*words, "--out", str(tmp_path / "two"), "--batch-size", "8", "--max-steps", "2")
    resumed = ["--out", str(tmp_path / "two"), "--batch-size", "2", "--accumulate", "2", "--resume"]
    said = train_on_two(*words, *resumed)
    assert_same(tmp_path / "one", tmp_path / "two")
    assert said.count("resuming from") == 1  # one process talks
    starts = json.loads((tmp_path / "two" / "config.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2]


@pytest.mark.parametrize(
    ("kills", "seed", "seconds"),
    [
        (1, 7, 0.6),
        pytest.param(3, 0, 1.0, marks=pytest.mark.long),
        pytest.param(10, 1, 1.0, marks=pytest.mark.long),
    ],
)
def test_killed_at_random_moments(kills: int, seed: int, seconds: float, tmp_path: Path) -> None:
    """kill -9 whenever it comes; the weights of an undisturbed run to the last bit, one line a step."""
    assert kill_and_resume(tmp_path, kills=kills, seed=seed, steps=90, seconds=seconds) >= 1


TASKS = {
    "sit": lambda source, files: SitTask(SiT(NETWORK), source, FlowConfig(), 0),
    "refiner": lambda source, files: RefinerTask(
        SiT(build_refiner_config(NETWORK)), SiT(NETWORK), source,
        RefinerConfig(teacher_guidance=2.0, second_call="consistent"), 0,
    ),
    "vae": lambda source, files: VaeTask(
        build_vae(VAE, 16), Photographs(list_photographs(files), 16), VAE, 0, Lpips()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_losses_stay_on_their_device(cache: Path, name: str) -> None:
    """Without a GPU: on the meta device, where touching a tensor that stayed behind on the CPU is an error."""
    task = TASKS[name](CachedLatents(cache), cache.parent / "data")
    task.to(torch.device("meta"))
    batch = send_to_device(task.load_batch(Microbatch(range(4), 0)), torch.device("meta"))
    losses = task.compute_losses(batch)
    losses["loss"].backward()
    assert {value.device.type for value in losses.values()} == {"meta"}
    assert all(p.grad is not None and p.grad.is_meta for p in task.network.parameters() if p.requires_grad)


def test_a_tensor_left_behind_would_be_seen(cache: Path) -> None:
    task = TASKS["sit"](CachedLatents(cache), cache)
    task.to(torch.device("meta"))
    with pytest.raises(RuntimeError, match="meta"):
        task.compute_losses(task.load_batch(Microbatch(range(4), 0)))
