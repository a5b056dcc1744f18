"""python -m benchmarks.training: the training loop compared with a bare forward, backward and optimiser step.

Speed: one run of the real loop (drawing from a cache on disk, clipping, EMA, metrics). It stops after every block, and
the bare one makes as many steps on tensors in memory, so both see the same machine at the same time. Memory: each in
its own process, with the same imports, one checkpoint included.

Letters: B images, C latent channels, H = W latent side.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file

from flowturbo.data.latents import CACHE_MANIFEST, CachedLatents, CacheManifest
from flowturbo.evaluation.speed.memory import read_process_memory
from flowturbo.flow import flow_loss
from flowturbo.models.sit import SiT, SiTConfig, build_sit_config
from flowturbo.training.config import FlowConfig, LoopConfig
from flowturbo.training.loop import Losses, TrainingRun, train
from flowturbo.training.sit_task import LatentBatch, SitTask
from runtime.cli.command_base import Command, echo_json
from runtime.system.files import write_json

ITEMS, CLASSES = 512, 10


@dataclass(frozen=True)
class TrainingSetup:
    """The settings of a measurement.

    Attributes:
        block: steps between a change from one loop to the other.
        blocks: turns of each loop; one more at the beginning is not counted.
    """

    network: SiTConfig
    batch_size: int
    device: str
    precision: str
    block: int
    blocks: int


def write_noise_latents(folder: Path, side: int, channels: int = 4) -> CachedLatents:
    """Write a cache of noise."""
    folder.mkdir()
    shape, g = (ITEMS, 2, channels, side, side), torch.Generator().manual_seed(0)
    parts = {"mean": torch.randn(shape, generator=g).half(), "std": torch.full(shape, 0.1).half()}
    labels = torch.arange(ITEMS, dtype=torch.int64) % CLASSES
    save_file({**parts, "label": labels}, folder / "latents-00000000.safetensors")
    names = {str(label): f"class{label}" for label in range(CLASSES)}
    manifest = CacheManifest("noise", 8 * side, "none", 1.0, shape[2:], ITEMS, ITEMS, names=names, complete=True)
    write_json(folder / CACHE_MANIFEST, asdict(manifest))
    return CachedLatents(folder)


class BareLoop:
    """Forward, backward, AdamW: nothing else, on one batch on the device."""

    def __init__(self, setup: TrainingSetup, device: torch.device) -> None:
        torch.manual_seed(0)
        config, count = setup.network, setup.batch_size
        self.model, self.bf16, self.device = SiT(config).to(device), setup.precision == "bf16", device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        shape = (count, config.out_channels, config.latent_size, config.latent_size)
        self.data, self.noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
        self.t, self.y = torch.rand(count, device=device), torch.arange(count, device=device) % CLASSES

    def step(self) -> None:
        """Make one step of training."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = flow_loss(self.model, self.data, self.noise, self.t, self.y).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class InterleavedTask(SitTask):
    """A SiT's training that makes way for the bare loop after every block of steps, and times both."""

    def __init__(self, setup: TrainingSetup, latents: CachedLatents) -> None:
        torch.manual_seed(0)
        super().__init__(SiT(setup.network), latents, FlowConfig(), seed=0)
        self.setup, self.num_steps, self.loop_start = setup, 0, 0.0
        self.loop_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.bare_loop, self.device = BareLoop(self.setup, device), device

    def compute_losses(self, batch: LatentBatch) -> Losses:
        if self.num_steps % self.setup.block == 0:
            now = self._read_clock()
            if self.num_steps:
                self.loop_seconds.append(now - self.loop_start)
            for _ in range(self.setup.block):
                self.bare_loop.step()
            self.loop_start = self._read_clock()
            self.bare_seconds.append(self.loop_start - now)
        self.num_steps += 1
        return super().compute_losses(batch)

    def _read_clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def make_loop_config(setup: TrainingSetup, steps: int, checkpoint_every: int) -> LoopConfig:
    """Return the defaults of `flowturbo-train sit`, except for what is measured."""
    return LoopConfig(
        max_steps=steps,
        batch_size=setup.batch_size,
        checkpoint_every=checkpoint_every,
        device=setup.device,  # type: ignore[arg-type]  # click has checked both
        precision=setup.precision,  # type: ignore[arg-type]
    )


def measure_speed(setup: TrainingSetup, folder: Path) -> dict[str, float]:
    """Return images per second of both, and their ratio block by block."""
    task = InterleavedTask(setup, write_noise_latents(folder / "latents", setup.network.latent_size))
    steps = setup.block * (setup.blocks + 1) + 1
    train(task, TrainingRun(folder / "run", make_loop_config(setup, steps, steps), console=Console(quiet=True)))
    bare, loop = (np.asarray(s[1 : setup.blocks + 1]) for s in (task.bare_seconds, task.loop_seconds))
    # Each block of the loop is compared with the bare blocks before and after it: a machine's speed drifts.
    bare_around = (bare + np.asarray(task.bare_seconds[2 : setup.blocks + 2])) / 2
    images = setup.block * setup.batch_size
    return {
        "loop_images_per_s": images / median(loop.tolist()),
        "bare_images_per_s": images / median(bare.tolist()),
        "speed_ratio": median((bare_around / loop).tolist()),
    }


def _read_peak_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    # Not getrusage's ru_maxrss, which a process inherits from the one that started it.
    return read_process_memory().peak_rss_bytes or 0


def measure_bare_memory(setup: TrainingSetup, folder: Path, queue: Any) -> None:
    """Measure the peak of a few bare steps, and of this process before them."""
    bytes_before = _read_peak_bytes(setup.device)
    bare_loop = BareLoop(setup, torch.device(setup.device))
    for _ in range(5):
        bare_loop.step()
    queue.put((bytes_before, _read_peak_bytes(setup.device)))


def measure_loop_memory(setup: TrainingSetup, folder: Path, queue: Any) -> None:
    """Measure the same of the loop, with a checkpoint in the middle."""
    bytes_before = _read_peak_bytes(setup.device)
    torch.manual_seed(0)
    latents = write_noise_latents(folder / "latents", setup.network.latent_size)
    task = SitTask(SiT(setup.network), latents, FlowConfig(), seed=0)
    train(task, TrainingRun(folder / "run", make_loop_config(setup, 6, 3), console=Console(quiet=True)))
    queue.put((bytes_before, _read_peak_bytes(setup.device)))


def measure_peak_memory(setup: TrainingSetup, folder: Path) -> dict[str, float]:
    """Return the peaks of both, each in its own process: as a whole, and without the memory before training."""
    context, peaks = multiprocessing.get_context("spawn"), {}
    measures: dict[str, Callable[[TrainingSetup, Path, Any], None]] = {
        "bare": measure_bare_memory,
        "loop": measure_loop_memory,
    }
    for name, measure in measures.items():
        queue = context.Queue()
        run_folder = folder / name
        run_folder.mkdir()
        process = context.Process(target=measure, args=(setup, run_folder, queue))
        process.start()
        peaks[name] = queue.get()
        process.join()
    (bare_before, bare), (loop_before, loop) = peaks["bare"], peaks["loop"]
    return {
        "bare_peak_mb": bare / 1e6,
        "loop_peak_mb": loop / 1e6,
        "memory_ratio": loop / bare,
        "net_memory_ratio": (loop - loop_before) / (bare - bare_before),
    }


@click.command(cls=Command)
@click.option("--model", default="", help="A released size, e.g. SiT-S/2, instead of the four below.")
@click.option("--width", default=256, show_default=True)
@click.option("--depth", default=6, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--patch", default=4, show_default=True)
@click.option("--latent-size", default=16, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16"]))
@click.option("--block", default=5, show_default=True, help="Steps of one loop before the other has its turn.")
@click.option("--blocks", default=12, show_default=True, help="Turns of each.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def main(
    model: str,
    width: int,
    depth: int,
    heads: int,
    patch: int,
    latent_size: int,
    batch_size: int,
    device: str,
    precision: str,
    block: int,
    blocks: int,
    as_json: bool,
) -> None:
    """Compare the training loop with a bare forward, backward and step: images per second, peak memory."""
    network = build_sit_config(model, latent_size) if model else SiTConfig(depth, width, heads, patch, latent_size)
    setup = TrainingSetup(network, batch_size, device, precision, block, blocks)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            **measure_speed(setup, Path(folder)),
            **measure_peak_memory(setup, Path(folder)),
            "threads": torch.get_num_threads(),
            **asdict(setup),
        }
    if as_json:
        echo_json(results)
        return
    click.echo(f"images per second: {results['speed_ratio']:.3f} of the bare loop's (wanted: at least 0.9)")
    click.echo(
        f"peak memory: {results['memory_ratio']:.3f} of the bare loop's (wanted: at most 1.1); "
        f"{results['net_memory_ratio']:.3f} without what a process has before it trains"
    )
    click.echo(json.dumps({key: value for key, value in results.items() if key != "network"}))


if __name__ == "__main__":
    main()
