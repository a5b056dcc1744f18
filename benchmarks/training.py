"""python -m benchmarks.training: what the training loop costs beside a bare forward, backward and optimiser step.

Speed: one run of the real loop (drawing from a cache on disk, clipping, EMA, metrics) that stops now and then to let
the bare one do as many steps on tensors it has at hand, so both see the same machine at the same time. Memory: each in
a process of its own, with the same imports, one checkpoint included.

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

from flowturbo.data.latents import MANIFEST, Latents, Manifest
from flowturbo.flow import flow_loss
from flowturbo.models.sit import SiT, SiTConfig, named_config
from flowturbo.training.config import LoopConfig
from flowturbo.training.loop import Losses, Run, train
from flowturbo.training.sit_task import Batch, FlowConfig, SitTask
from runtime.cli.command_base import Command, echo_json
from runtime.system.files import write_json

ITEMS, CLASSES = 512, 10


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        block: steps between a change from one loop to the other.
        blocks: how often each has its turn; one more at the beginning is not counted.
    """

    network: SiTConfig
    batch_size: int
    device: str
    precision: str
    block: int
    blocks: int


def make_latents(folder: Path, side: int, channels: int = 4) -> Latents:
    """A cache of noise."""
    folder.mkdir()
    shape, g = (ITEMS, 2, channels, side, side), torch.Generator().manual_seed(0)
    parts = {"mean": torch.randn(shape, generator=g).half(), "std": torch.full(shape, 0.1).half()}
    labels = torch.arange(ITEMS, dtype=torch.int64) % CLASSES
    save_file({**parts, "label": labels}, folder / "latents-00000000.safetensors")
    names = {str(label): f"class{label}" for label in range(CLASSES)}
    manifest = Manifest("noise", 8 * side, "none", 1.0, shape[2:], ITEMS, ITEMS, names=names, complete=True)
    write_json(folder / MANIFEST, asdict(manifest))
    return Latents(folder)


class Bare:
    """Forward, backward, AdamW: nothing else, on one batch that lies on the device."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        torch.manual_seed(0)
        config, count = setting.network, setting.batch_size
        self.model, self.bf16, self.device = SiT(config).to(device), setting.precision == "bf16", device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        shape = (count, config.out_channels, config.latent_size, config.latent_size)
        self.data, self.noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
        self.t, self.y = torch.rand(count, device=device), torch.arange(count, device=device) % CLASSES

    def step(self) -> None:
        """One step of training."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = flow_loss(self.model, self.data, self.noise, self.t, self.y).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Interleaved(SitTask):
    """A SiT's training that makes way for the bare loop after every block of steps, and times both."""

    def __init__(self, setting: Setting, latents: Latents) -> None:
        torch.manual_seed(0)
        super().__init__(SiT(setting.network), latents, FlowConfig(), seed=0)
        self.setting, self.seen, self.bare = setting, 0, None
        self.loop_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.bare, self.device = Bare(self.setting, device), device

    def losses(self, batch: Batch) -> Losses:
        if self.seen % self.setting.block == 0:
            self._change_over()
        self.seen += 1
        return super().losses(batch)

    def _change_over(self) -> None:
        now = self._clock()
        if self.seen:
            self.loop_seconds.append(now - self.back)
        assert self.bare is not None
        for _ in range(self.setting.block):
            self.bare.step()
        self.back = self._clock()
        self.bare_seconds.append(self.back - now)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def loop_config(setting: Setting, steps: int, checkpoint_every: int) -> LoopConfig:
    """The defaults of `flowturbo-train sit`, but for what is measured."""
    return LoopConfig(
        max_steps=steps,
        batch_size=setting.batch_size,
        checkpoint_every=checkpoint_every,
        device=setting.device,  # type: ignore[arg-type]  # click has checked both
        precision=setting.precision,  # type: ignore[arg-type]
    )


def measure_speed(setting: Setting, folder: Path) -> dict[str, Any]:
    """Images per second of both, and their ratio block by block."""
    task = Interleaved(setting, make_latents(folder / "latents", setting.network.latent_size))
    steps = setting.block * (setting.blocks + 1) + 1
    train(task, Run(folder / "run", loop_config(setting, steps, steps), console=Console(quiet=True)))
    bare, loop = (np.asarray(s[1 : setting.blocks + 1]) for s in (task.bare_seconds, task.loop_seconds))
    # Each block of the loop is compared with the bare blocks before and after it: a machine's speed drifts.
    around = (bare + np.asarray(task.bare_seconds[2 : setting.blocks + 2])) / 2
    images = setting.block * setting.batch_size
    return {
        "loop_images_per_s": images / median(loop.tolist()),
        "bare_images_per_s": images / median(bare.tolist()),
        "speed_ratio": median((around / loop).tolist()),
    }


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    # Not getrusage's ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def bare_memory(setting: Setting, folder: Path, queue: Any) -> None:
    """Peak of a few bare steps, and of this process before them."""
    before = _peak_bytes(setting.device)
    bare = Bare(setting, torch.device(setting.device))
    for _ in range(5):
        bare.step()
    queue.put((before, _peak_bytes(setting.device)))


def loop_memory(setting: Setting, folder: Path, queue: Any) -> None:
    """The same of the loop, with a checkpoint in the middle."""
    before = _peak_bytes(setting.device)
    torch.manual_seed(0)
    latents = make_latents(folder / "latents", setting.network.latent_size)
    task = SitTask(SiT(setting.network), latents, FlowConfig(), seed=0)
    train(task, Run(folder / "run", loop_config(setting, 6, 3), console=Console(quiet=True)))
    queue.put((before, _peak_bytes(setting.device)))


def measure_memory(setting: Setting, folder: Path) -> dict[str, Any]:
    """Peaks of both in processes of their own: as a whole, and without what a process has before it trains."""
    context, found = multiprocessing.get_context("spawn"), {}
    measures: dict[str, Callable[[Setting, Path, Any], None]] = {"bare": bare_memory, "loop": loop_memory}
    for name, measure in measures.items():
        queue = context.Queue()
        own = folder / name
        own.mkdir()
        process = context.Process(target=measure, args=(setting, own, queue))
        process.start()
        found[name] = queue.get()
        process.join()
    (bare_before, bare), (loop_before, loop) = found["bare"], found["loop"]
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
    network = named_config(model, latent_size) if model else SiTConfig(depth, width, heads, patch, latent_size)
    setting = Setting(network, batch_size, device, precision, block, blocks)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            **measure_speed(setting, Path(folder)),
            **measure_memory(setting, Path(folder)),
            "threads": torch.get_num_threads(),
            **asdict(setting),
        }
    if as_json:
        echo_json(found)
        return
    click.echo(f"images per second: {found['speed_ratio']:.3f} of the bare loop's (wanted: at least 0.9)")
    click.echo(
        f"peak memory: {found['memory_ratio']:.3f} of the bare loop's (wanted: at most 1.1); "
        f"{found['net_memory_ratio']:.3f} without what a process has before it trains"
    )
    click.echo(json.dumps({key: value for key, value in found.items() if key != "network"}))


if __name__ == "__main__":
    main()
