"""What a run shows and leaves behind while it trains: lines, metrics.jsonl, TensorBoard, a loss curve, sample grids."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from flowturbo.data.photographs import Pixels
from flowturbo.training.config import LoopConfig
from runtime.system.files import write_atomically

PROGRESS_INTERVAL_S = 15.0
LOSS_SMOOTHING = 0.98
"""Decay of the smoothed loss in the progress lines."""


class TrainingLogger:
    """Tells of every step: metrics.jsonl, TensorBoard where it is installed, and a line now and then.

    Of many processes only the main one tells; the others are asked for `read_recent_losses` alone.
    """

    def __init__(
        self, out: Path, config: LoopConfig, start: int, processes: int, console: Console, is_main: bool = True
    ) -> None:
        self.path, self.start, self.is_main = out / "metrics.jsonl", start, is_main
        self._exit_stack = ExitStack()
        if is_main:
            self._metrics = self._exit_stack.enter_context(MetricsFile(self.path, start))
            self._progress = _ProgressPrinter(config, start, config.batch_size * config.accumulate * processes, console)
            self._summary_writer = _open_tensorboard(out / "tensorboard", start)
            if self._summary_writer is not None:
                self._exit_stack.callback(self._summary_writer.close)

    def read_recent_losses(self, count: int) -> list[float]:
        """The last losses before the first step of this start."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines if _parse_step(line) in range(self.start)][-count:]

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Records the losses, gradient norm and rate of a step."""
        if not self.is_main:
            return
        self._metrics.write(step, values)
        self._progress.update(step, values["loss"])
        if self._summary_writer is not None:
            for name, value in values.items():
                self._summary_writer.add_scalar(name, value, step)

    def __enter__(self) -> TrainingLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self._exit_stack.close()


def _open_tensorboard(folder: Path, start: int) -> Any:
    """A writer that drops what a killed process wrote beyond its last checkpoint; None without TensorBoard."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start)


class _ProgressPrinter:
    """One line now and then: loss since the last line and smoothed, images per second, time to go."""

    def __init__(self, config: LoopConfig, start: int, samples_per_step: int, console: Console) -> None:
        self.max_steps, self.samples_per_step, self.console = config.max_steps, samples_per_step, console
        self.line_step, self.line_time, self.loss_sum = start, time.monotonic(), 0.0
        self.smoothed_loss: float | None = None

    def update(self, step: int, loss: float) -> None:
        self.loss_sum += loss
        self.smoothed_loss = (
            loss if self.smoothed_loss is None else LOSS_SMOOTHING * self.smoothed_loss + (1 - LOSS_SMOOTHING) * loss
        )
        now, steps_done = time.monotonic(), step + 1
        if now - self.line_time < PROGRESS_INTERVAL_S and steps_done < self.max_steps:
            return
        line_steps = steps_done - self.line_step
        steps_per_s = line_steps / max(now - self.line_time, 1e-9)
        remaining = timedelta(seconds=round((self.max_steps - steps_done) / steps_per_s))
        self.console.print(
            f"step {steps_done}/{self.max_steps}  loss {self.loss_sum / line_steps:.4f}  EMA {self.smoothed_loss:.4f}  "
            f"{steps_per_s * self.samples_per_step:.0f} img/s  ETA {remaining}"
        )
        self.line_step, self.line_time, self.loss_sum = steps_done, now, 0.0


class MetricsFile:
    """metrics.jsonl: one line per step.

    A resumed run drops the lines at and after its first step, which the killed process wrote beyond its last
    checkpoint, so that every step has exactly one line.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        if path.exists():
            valid_lines = [
                line for line in path.read_text(encoding="utf-8").splitlines() if _parse_step(line) in range(start)
            ]
            with write_atomically(path) as aside:
                aside.write_text("".join(line + "\n" for line in valid_lines), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _parse_step(line: str) -> int:
    """The step of a line, −1 of one that a killed process left unfinished or somebody has edited."""
    try:
        row = json.loads(line)
        float(row["loss"])
        return int(row["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_loss_curve(metrics: Path, out: Path, width: int = 200) -> None:
    """Draws the running mean of the loss over `width` steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    losses = np.asarray([row["loss"] for row in read_metrics(metrics)])
    if len(losses) == 0:
        return
    width = max(1, min(width, len(losses) // 5))
    smoothed = np.convolve(losses, np.ones(width) / width, mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(np.arange(len(smoothed)) + width // 2, smoothed)
    axes.set(xlabel="step", ylabel=f"loss (mean of {width} steps)")
    low, high = np.percentile(smoothed, [0, 97]) if len(smoothed) else (0.0, 0.0)
    if high > low:  # the first losses, which fall from far above, are cut off
        axes.set_ylim(low * 0.98, high * 1.05)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with write_atomically(out) as aside:
        figure.savefig(aside, format="png", dpi=100)
    plt.close(figure)


def save_image_grid(images: Pixels, out: Path, columns: int) -> None:
    """Images [B, R, R, 3] side by side, row by row, one pixel apart."""
    count, side = images.shape[0], images.shape[1]
    rows = -(-count // columns)
    sheet = np.full((rows * (side + 1) - 1, columns * (side + 1) - 1, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (side + 1), (i % columns) * (side + 1)
        sheet[top : top + side, left : left + side] = image
    with write_atomically(out) as aside:
        Image.fromarray(sheet).save(aside, format="PNG")
