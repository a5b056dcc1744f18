"""The training loop, one for VAE, SiT and refiner, on one process or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from rich.console import Console
from torch import Tensor, nn

from flowturbo.data.photographs import Pixels
from flowturbo.plotting import check_matplotlib
from flowturbo.training import training_state
from flowturbo.training.config import LoopConfig
from flowturbo.training.ema import Ema
from flowturbo.training.loss_watch import WINDOW, Watch
from flowturbo.training.optimizers import make_optimizers, set_lr
from flowturbo.training.processes import join_processes
from flowturbo.training.random_draws import Share, ahead, step_shares
from flowturbo.training.run_log import changes, describe_start, read_config
from flowturbo.training.training_report import Report, loss_curve, read_metrics, save_grid
from runtime.system.errors import TrainingError
from runtime.system.files import make_folder, write_json

Losses = dict[str, Tensor]


class Task(Protocol):
    """What is trained: a network, its losses on the samples at some positions, and what to show and save of it."""

    @property
    def network(self) -> nn.Module: ...

    def to(self, device: torch.device) -> None:
        """Moves the network and all that its losses need."""

    def draw(self, share: Share) -> Any:
        """The samples of a share, tensors in host memory; called on a thread, one share ahead."""

    def losses(self, batch: Any) -> Losses:
        """Scalars, means over the batch, which lies on the device; the one called "loss" is minimised."""

    def pictures(self, ema: nn.Module) -> tuple[Pixels, int] | None:
        """Images for a grid and its number of columns."""

    def finish(self, ema: nn.Module, out: Path) -> Path:
        """Saves the result and says where."""

    def describe(self) -> dict[str, Any]:
        """Everything beside the loop's options that is needed to repeat the run."""

    def skipped(self) -> dict[str, str]:
        """Files that could not be read so far, and why."""


@dataclass(frozen=True)
class Run:
    """Where a run writes, and whether it goes on with an earlier one."""

    out: Path
    config: LoopConfig
    resume: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True))


class _Objective(nn.Module):
    """A task's losses as a module's forward, which is what DistributedDataParallel synchronises gradients around."""

    def __init__(self, network: nn.Module, losses: Callable[[Any], Losses], device: str, bf16: bool) -> None:
        super().__init__()
        self.network, self.losses, self.device, self.bf16 = network, losses, device, bf16

    def forward(self, batch: Any) -> Losses:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            return self.losses(batch)


def train(task: Task, run: Run) -> Path:
    """Trains to `max_steps` and returns the saved result.

    Raises:
        TrainingError: the loss or the gradient is not finite, or the loss explodes; the message names the step and
            the last good checkpoint.
    """
    config, accelerator = run.config, join_processes(run.config.device)
    run.console.quiet |= not accelerator.is_main_process
    task.to(accelerator.device)
    network = task.network
    resolved = _prepare(task, run, accelerator)
    ema, optimizers = Ema(network, config.ema), make_optimizers(network, config)
    start = _resume(run, network, ema.network, optimizers, accelerator)
    _introduce(run, resolved, network, accelerator)
    if accelerator.is_main_process:
        _record_start(run, resolved, start)
    objective = accelerator.prepare_model(
        _Objective(network, task.losses, accelerator.device.type, config.precision == "bf16")
    )
    network.train()
    with (
        Report(run.out, config, start, accelerator.num_processes, run.console, accelerator.is_main_process) as report,
        closing(ahead(task.draw, _shares(config, start, accelerator))) as batches,
    ):
        watch = Watch(run.out, config.explode, report.recent_losses(WINDOW))
        for step in range(start, config.max_steps):
            set_lr(optimizers, config.lr_scale(step))
            values = _gradients(objective, batches, config, accelerator)
            watch.judge(step, values["loss"], values["grad_norm"])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            ema.update(network, step)
            report.step(step, {**values, "lr": optimizers[0].param_groups[0]["lr"]})
            if accelerator.is_main_process:
                _keep_and_show(task, run, step + 1, ema.network, optimizers, resolved)
    return _finish(task, run, ema.network, accelerator)


def _shares(config: LoopConfig, start: int, accelerator: Accelerator) -> Iterator[Share]:
    for step in range(start, config.max_steps):
        yield from step_shares(
            step, config.batch_size, config.accumulate, accelerator.process_index, accelerator.num_processes
        )


def _gradients(
    objective: nn.Module, batches: Iterator[Any], config: LoopConfig, accelerator: Accelerator
) -> dict[str, float]:
    """Leaves the step's mean gradient, clipped, in the parameters; returns losses, means over all processes."""
    sums: dict[str, Tensor] = {}
    for turn in range(config.accumulate):
        batch = send_to_device(next(batches), accelerator.device)
        last = turn == config.accumulate - 1
        with nullcontext() if last else accelerator.no_sync(objective):
            losses: Losses = objective(batch)
            (losses["loss"] / config.accumulate).backward()  # type: ignore[no-untyped-call]
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() / config.accumulate
    norm = nn.utils.clip_grad_norm_(objective.parameters(), config.clip or torch.inf)
    values = torch.stack([*sums.values(), norm]).float()
    # One copy from the device a step, and one message between processes.
    found: Tensor = accelerator.reduce(values, "mean")
    return dict(zip([*sums, "grad_norm"], found.tolist(), strict=True))


def _prepare(task: Task, run: Run, accelerator: Accelerator) -> dict[str, Any]:
    """Makes the folder and returns the resolved configuration; nobody writes before everybody has looked."""
    check_matplotlib("train")  # the loss curve is drawn last of all
    make_folder(run.out)
    if not run.resume and training_state.checkpoints(run.out):
        raise TrainingError(
            f"{run.out} already holds a run",
            allowed="an empty or new folder, or --resume",
            remedy="add --resume to go on with it, or name another --out",
        )
    accelerator.wait_for_everyone()
    return {**task.describe(), "loop": run.config.to_json(), "processes": accelerator.num_processes}


def _introduce(run: Run, resolved: dict[str, Any], network: nn.Module, accelerator: Accelerator) -> None:
    config, trained = run.config, sum(p.numel() for p in network.parameters() if p.requires_grad)
    run.console.print(
        f"{resolved['task']}: {trained:,} parameters to train, {config.max_steps} steps of "
        f"{config.batch_size} × {config.accumulate} passes × {accelerator.num_processes} processes "
        f"on {accelerator.device}; all options are in {run.out / 'config.json'}"
    )


def _record_start(run: Run, resolved: dict[str, Any], start: int) -> None:
    """Saves the configuration before the first step, and what each start of the run was."""
    training_state.sweep(run.out)
    before = read_config(run.out) if start else {}
    for line in changes(before, resolved):
        run.console.print(f"  other than before: {line}")
    starts = [*before.get("starts", []), describe_start(start, resolved["loop"])]
    write_json(run.out / "config.json", {**resolved, "starts": starts})


def _resume(
    run: Run, network: nn.Module, ema: nn.Module, optimizers: list[torch.optim.Optimizer], accelerator: Accelerator
) -> int:
    found = training_state.checkpoints(run.out) if run.resume else []
    latest = [path.name for _, path in found[-1:]]
    if len(set(map(str, gather_object([latest])))) > 1:
        raise TrainingError(
            f"the processes see different checkpoints in {run.out}",
            allowed="one folder that all machines share",
            remedy="put --out on a shared file system",
        )
    if not found:
        if run.resume:
            run.console.print(f"no checkpoint in {run.out} yet: starting at step 0")
        return 0
    step = training_state.load(found[-1][1], network, ema, optimizers)
    run.console.print(f"resuming from {found[-1][1]}")
    return step


def _keep_and_show(
    task: Task,
    run: Run,
    done: int,
    ema: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    resolved: dict[str, Any],
) -> None:
    config, last = run.config, done == run.config.max_steps
    if done % config.checkpoint_every == 0 or last:
        training_state.save(run.out, done, task.network, ema, optimizers, resolved, config.keep)
    if config.sample_every and (done % config.sample_every == 0 or last):
        _illustrate(task, ema, run.out, done)


def _illustrate(task: Task, ema: nn.Module, out: Path, done: int) -> None:
    shown = task.pictures(ema)
    if shown is not None:
        folder = make_folder(out / "samples")
        save_grid(shown[0], folder / f"step-{done:08d}.png", shown[1])
    loss_curve(out / "metrics.jsonl", out / "loss.png")


def _finish(task: Task, run: Run, ema: nn.Module, accelerator: Accelerator) -> Path:
    result = task.finish(ema, run.out) if accelerator.is_main_process else run.out
    skipped: dict[str, str] = {}
    for found in gather_object([task.skipped()]):
        skipped |= found
    if accelerator.is_main_process:
        loss_curve(run.out / "metrics.jsonl", run.out / "loss.png")
        last = read_metrics(run.out / "metrics.jsonl")[-1:]
        done = training_state.checkpoints(run.out)[-1][0]
        summary = {"result": result.name, "steps": done, "last": last[0] if last else None}
        write_json(run.out / "summary.json", {**summary, "skipped": skipped})
        if skipped:
            run.console.print(f"skipped {len(skipped)} files that cannot be read (summary.json names them)")
        run.console.print(f"done: {result}")
    return result
