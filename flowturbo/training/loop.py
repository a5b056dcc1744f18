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
from flowturbo.training.config import LoopConfig
from flowturbo.training.optimizers import Ema, make_optimizers, set_lr
from flowturbo.training.processes import join_processes
from flowturbo.training.random_draws import Microbatch, list_microbatches, prefetch
from flowturbo.training.run_log import (
    MEDIAN_WINDOW,
    LossGuard,
    TrainingLogger,
    describe_start,
    list_changes,
    plot_loss_curve,
    read_metrics,
    read_run_config,
    save_image_grid,
)
from flowturbo.training.training_state import (
    check_last_checkpoint,
    list_checkpoints,
    load_checkpoint,
    remove_partial_files,
    save_checkpoint,
)
from runtime.system.errors import TrainingError
from runtime.system.files import make_folder, write_json
from runtime.system.locks import LOCK_FILE, hold_lock

Losses = dict[str, Tensor]


class TrainingTask(Protocol):
    """What is trained: a network, its losses on the samples at some positions, and what to show and save of it."""

    @property
    def network(self) -> nn.Module: ...

    def to(self, device: torch.device) -> None:
        """Move the network and all that its losses need."""

    def load_batch(self, microbatch: Microbatch) -> Any:
        """Return the samples of a share, tensors in host memory; called on a thread, one share ahead."""

    def compute_losses(self, batch: Any) -> Losses:
        """Return scalars, means over the batch, which is on the device; the one called "loss" is minimised."""

    def render_preview(self, ema: nn.Module) -> tuple[Pixels, int] | None:
        """Return images for a grid and its number of columns, if there can be one."""

    def save_result(self, ema: nn.Module, out: Path) -> Path:
        """Save the result and return its path."""

    def describe(self) -> dict[str, object]:
        """Return everything beside the loop's options that is needed to repeat the run, as JSON data."""

    def list_unreadable(self) -> dict[str, str]:
        """Return the files that could not be read so far, and why."""


@dataclass(frozen=True)
class TrainingRun:
    """Where a run writes, and whether it goes on with an earlier one.

    Attributes:
        out: folder of the run.
        config: options of the loop.
        resume: go on from the last checkpoint in `out`, if there is one.
        console: for the lines about progress.
    """

    out: Path
    config: LoopConfig
    resume: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True))


class _LossModule(nn.Module):
    """A task's losses as a module's forward, which is what DistributedDataParallel synchronises gradients around."""

    def __init__(self, network: nn.Module, losses: Callable[[Any], Losses], device: str, bf16: bool) -> None:
        super().__init__()
        self.network, self.losses, self.device, self.bf16 = network, losses, device, bf16

    def forward(self, batch: Any) -> Losses:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            return self.losses(batch)


def train(task: TrainingTask, run: TrainingRun) -> Path:
    """Train to `max_steps` and return the path of the saved result.

    Raises:
        OutputError: another training writes the folder, or a file cannot be written.
        CheckpointError: the last checkpoint of a resumed run is damaged, or of another network.
        TrainingError: the folder holds another run, the loss or the gradient is not finite, or the loss explodes. The
            message names the step and the last good checkpoint.
        BackendError: matplotlib is missing.
    """
    accelerator = join_processes(run.config.device)
    run.console.quiet |= not accelerator.is_main_process
    task.to(accelerator.device)
    check_matplotlib("train")  # the loss curve is drawn last of all
    make_folder(run.out)
    busy = f"another training is writing {run.out}"
    is_writer = accelerator.is_main_process
    remedy = "wait for it, or name another --out"
    with hold_lock(run.out / LOCK_FILE, busy=busy, remedy=remedy) if is_writer else nullcontext():
        if not run.resume and list_checkpoints(run.out):
            raise TrainingError(
                f"{run.out} already holds a run",
                allowed="an empty or new folder, or --resume",
                remedy="add --resume to go on with it, or name another --out",
            )
        accelerator.wait_for_everyone()  # no process writes before all have looked
        return _train_in_folder(task, run, accelerator)


def _train_in_folder(task: TrainingTask, run: TrainingRun, accelerator: Accelerator) -> Path:
    """Train in a folder that no other training writes, and return the path of the saved result."""
    config, network = run.config, task.network
    resolved_config = {**task.describe(), "loop": config.to_json(), "processes": accelerator.num_processes}
    ema, optimizers = Ema(network, config.ema), make_optimizers(network, config)
    start = _begin_run(run, network, ema.network, optimizers, resolved_config, accelerator)
    objective = accelerator.prepare_model(
        _LossModule(network, task.compute_losses, accelerator.device.type, config.precision == "bf16")
    )
    network.train()
    microbatches = (
        microbatch
        for step in range(start, config.max_steps)
        for microbatch in list_microbatches(
            step, config.batch_size, config.accumulate, accelerator.process_index, accelerator.num_processes
        )
    )
    with (
        TrainingLogger(
            run.out, config, start, accelerator.num_processes, run.console, accelerator.is_main_process
        ) as logger,
        closing(prefetch(task.load_batch, microbatches)) as batches,
    ):
        loss_guard = LossGuard(run.out, config.explode, logger.read_recent_losses(MEDIAN_WINDOW))
        for step in range(start, config.max_steps):
            set_lr(optimizers, config.compute_lr_scale(step))
            values = _accumulate_gradients(objective, batches, config, accelerator)
            loss_guard.check_loss(step, values["loss"], values["grad_norm"])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            ema.update(network, step)
            logger.log_step(step, {**values, "lr": optimizers[0].param_groups[0]["lr"]})
            if accelerator.is_main_process:
                steps_done, is_last = step + 1, step + 1 == config.max_steps
                if steps_done % config.checkpoint_every == 0 or is_last:
                    save_checkpoint(run.out, steps_done, network, ema.network, optimizers, resolved_config, config.keep)
                if config.sample_every and (steps_done % config.sample_every == 0 or is_last):
                    if (preview := task.render_preview(ema.network)) is not None:
                        grid = make_folder(run.out / "samples") / f"step-{steps_done:08d}.png"
                        save_image_grid(preview[0], grid, preview[1])
                    plot_loss_curve(run.out / "metrics.jsonl", run.out / "loss.png")
    return _finish_run(task, run, ema.network, accelerator)


def _accumulate_gradients(
    objective: nn.Module, batches: Iterator[Any], config: LoopConfig, accelerator: Accelerator
) -> dict[str, float]:
    """Leave the step's mean gradient, clipped, in the parameters; return losses, means over all processes."""
    sums: dict[str, Tensor] = {}
    for pass_index in range(config.accumulate):
        batch = send_to_device(next(batches), accelerator.device)
        is_last = pass_index == config.accumulate - 1
        with nullcontext() if is_last else accelerator.no_sync(objective):
            losses: Losses = objective(batch)
            (losses["loss"] / config.accumulate).backward()  # type: ignore[no-untyped-call]
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() / config.accumulate
    norm = nn.utils.clip_grad_norm_(objective.parameters(), config.clip or torch.inf)
    values = torch.stack([*sums.values(), norm]).float()
    # One copy from the device a step, and one message between processes.
    means: Tensor = accelerator.reduce(values, "mean")
    return dict(zip([*sums, "grad_norm"], means.tolist(), strict=True))


def _begin_run(
    run: TrainingRun,
    network: nn.Module,
    ema: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    resolved_config: dict[str, object],
    accelerator: Accelerator,
) -> int:
    """Load the last checkpoint of a resumed run, write config.json before the first step, and return that step."""
    checkpoints = list_checkpoints(run.out) if run.resume else []
    latest = [path.name for _, path in checkpoints[-1:]]
    if len(set(map(str, gather_object([latest])))) > 1:
        raise TrainingError(
            f"the processes see different checkpoints in {run.out}",
            allowed="one folder that all machines share",
            remedy="put --out on a shared file system",
        )
    start = 0
    if checkpoints:
        check_last_checkpoint(run.out)
        start = load_checkpoint(checkpoints[-1][1], network, ema, optimizers)
        run.console.print(f"resuming from {checkpoints[-1][1]}")
    elif run.resume:
        run.console.print(f"no checkpoint in {run.out} yet: starting at step 0")
    config, num_trainable = run.config, sum(p.numel() for p in network.parameters() if p.requires_grad)
    run.console.print(
        f"{resolved_config['task']}: {num_trainable:,} parameters to train, {config.max_steps} steps of "
        f"{config.batch_size} × {config.accumulate} passes × {accelerator.num_processes} processes "
        f"on {accelerator.device}; all options are in {run.out / 'config.json'}"
    )
    if accelerator.is_main_process:
        remove_partial_files(run.out)
        previous = read_run_config(run.out) if start else {}
        for line in list_changes(previous, resolved_config):
            run.console.print(f"  other than before: {line}")
        starts = [*previous.get("starts", []), describe_start(start, config)]
        write_json(run.out / "config.json", {**resolved_config, "starts": starts})
    return start


def _finish_run(task: TrainingTask, run: TrainingRun, ema: nn.Module, accelerator: Accelerator) -> Path:
    """Save the result, the loss curve and the summary, and return the result."""
    result = task.save_result(ema, run.out) if accelerator.is_main_process else run.out
    unreadable: dict[str, str] = {}
    for process_unreadable in gather_object([task.list_unreadable()]):
        unreadable |= process_unreadable
    if accelerator.is_main_process:
        plot_loss_curve(run.out / "metrics.jsonl", run.out / "loss.png")
        last_metrics = read_metrics(run.out / "metrics.jsonl")[-1:]
        steps_done = list_checkpoints(run.out)[-1][0]
        summary = {"result": result.name, "steps": steps_done, "last": last_metrics[0] if last_metrics else None}
        write_json(run.out / "summary.json", {**summary, "skipped": unreadable})
        if unreadable:
            run.console.print(f"skipped {len(unreadable)} files that cannot be read (summary.json names them)")
        run.console.print(f"done: {result}")
    return result
