"""The training loop, one for VAE, SiT and refiner."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from flowturbo.data import Pixels
from flowturbo.training import checkpoint
from flowturbo.training.config import LoopConfig
from flowturbo.training.draws import positions
from flowturbo.training.ema import Ema
from flowturbo.training.optimizers import make_optimizers, set_lr
from flowturbo.training.report import Metrics, loss_curve, save_grid
from runtime.errors import TrainingError
from runtime.files import make_folder, write_json

Losses = dict[str, Tensor]


class Task(Protocol):
    """What is trained: a network, its losses on the samples at some positions, and what to show and save of it."""

    @property
    def network(self) -> nn.Module: ...

    def losses(self, where: range) -> Losses:
        """Scalars; the one called "loss" is minimised."""

    def pictures(self, ema: nn.Module) -> tuple[Pixels, int] | None:
        """Images for a grid and its number of columns."""

    def finish(self, ema: nn.Module, out: Path) -> Path:
        """Saves the result and says where."""

    def describe(self) -> dict[str, Any]:
        """Everything beside the loop's options that is needed to repeat the run."""


@dataclass(frozen=True)
class Run:
    """Where a run writes, and whether it goes on with an earlier one."""

    out: Path
    config: LoopConfig
    resume: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True))

    def prepare(self, task: Task) -> dict[str, Any]:
        """Makes the folder, saves the resolved configuration, and returns it."""
        make_folder(self.out)
        if not self.resume and checkpoint.checkpoints(self.out):
            raise TrainingError(
                f"{self.out} already holds a run",
                allowed="an empty or new folder, or --resume",
                remedy="add --resume to go on with it, or name another --out",
            )
        resolved = {**task.describe(), "loop": self.config.to_json(), "torch": torch.__version__}
        write_json(self.out / "config.json", resolved)
        return resolved


def train(task: Task, run: Run) -> Path:
    """Trains to `max_steps` and returns the saved result.

    Raises:
        TrainingError: the loss or the gradient is not finite; the message names the step and the last good checkpoint.
    """
    config, network = run.config, task.network
    resolved = run.prepare(task)
    ema, optimizers = Ema(network, config.ema), make_optimizers(network, config)
    start = _resume(run, network, ema.network, optimizers)
    progress = _Progress(run, start)
    network.train()
    with Metrics(run.out / "metrics.jsonl", start) as metrics:
        for step in range(start, config.max_steps):
            set_lr(optimizers, config.lr_scale(step))
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                losses = task.losses(positions(step, config.batch_size))
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            norm = float(nn.utils.clip_grad_norm_(network.parameters(), config.clip))
            values = {name: float(value.detach()) for name, value in losses.items()}
            _check_finite(values["loss"], norm, step, run.out)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            ema.update(network, step)
            metrics.write(step, {**values, "grad_norm": norm, "lr": optimizers[0].param_groups[0]["lr"]})
            progress.show(step, values)
            done = step + 1
            if done % config.checkpoint_every == 0 or done == config.max_steps:
                checkpoint.save(run.out, done, network, ema.network, optimizers, resolved, config.keep)
            if config.sample_every and (done % config.sample_every == 0 or done == config.max_steps):
                _illustrate(task, ema.network, run.out, done)
    result = task.finish(ema.network, run.out)
    run.console.print(f"done: {result}")
    return result


def _resume(run: Run, network: nn.Module, ema: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    found = checkpoint.checkpoints(run.out) if run.resume else []
    if not found:
        if run.resume:
            run.console.print(f"no checkpoint in {run.out} yet: starting at step 0")
        return 0
    step = checkpoint.load(found[-1][1], network, ema, optimizers)
    run.console.print(f"resuming from {found[-1][1]}")
    return step


def _check_finite(loss: float, norm: float, step: int, out: Path) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    found = checkpoint.checkpoints(out)
    good = f"the last good checkpoint is {found[-1][1]}" if found else "there is no checkpoint yet"
    raise TrainingError(
        f"step {step}: the loss is {loss} and the gradient norm {norm}; {good}",
        allowed="finite numbers",
        remedy="lower --lr or --clip, or use --precision fp32, and go on with --resume",
    )


def _illustrate(task: Task, ema: nn.Module, out: Path, done: int) -> None:
    shown = task.pictures(ema)
    if shown is not None:
        folder = make_folder(out / "samples")
        save_grid(shown[0], folder / f"step-{done:08d}.png", shown[1])
    loss_curve(out / "metrics.jsonl", out / "loss.png")


class _Progress:
    """One line now and then: losses averaged since the last line, images per second, time to go."""

    def __init__(self, run: Run, start: int, every_seconds: float = 15.0) -> None:
        self.run, self.every = run, every_seconds
        self.since_step, self.since_time = start, time.monotonic()
        self.sums: dict[str, float] = {}

    def show(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        now, config = time.monotonic(), self.run.config
        if now - self.since_time < self.every and step + 1 < config.max_steps:
            return
        steps = step + 1 - self.since_step
        rate = steps / (now - self.since_time)
        means = "  ".join(f"{name} {total / steps:.4f}" for name, total in self.sums.items())
        left = (config.max_steps - step - 1) / rate
        self.run.console.print(
            f"step {step + 1}/{config.max_steps}  {means}  {rate * config.batch_size:.0f} img/s  "
            f"{left / 60:.1f} min to go"
        )
        self.since_step, self.since_time, self.sums = step + 1, now, {}
