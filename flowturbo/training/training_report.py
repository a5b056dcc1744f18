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
from runtime.system.files import replacing

EVERY_SECONDS = 15.0
SMOOTHING = 0.98
"""Decay of the smoothed loss in the progress lines."""


class Report:
    """Tells of every step: metrics.jsonl, TensorBoard where it is installed, and a line now and then.

    Of many processes only the main one tells; the others are asked for `recent_losses` alone.
    """

    def __init__(
        self, out: Path, config: LoopConfig, start: int, processes: int, console: Console, main: bool = True
    ) -> None:
        self.path, self.start, self.main = out / "metrics.jsonl", start, main
        self._closing = ExitStack()
        if main:
            self._metrics = self._closing.enter_context(Metrics(self.path, start))
            self._progress = _Progress(config, start, config.batch_size * config.accumulate * processes, console)
            self._board = _tensorboard(out / "tensorboard", start)
            if self._board is not None:
                self._closing.callback(self._board.close)

    def recent_losses(self, count: int) -> list[float]:
        """The last losses before the first step of this start."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines if _step_of(line) in range(self.start)][-count:]

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Records the losses, gradient norm and rate of a step."""
        if not self.main:
            return
        self._metrics.write(step, values)
        self._progress.show(step, values["loss"])
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()


def _tensorboard(folder: Path, start: int) -> Any:
    """A writer that drops what a killed process wrote beyond its last checkpoint; None without TensorBoard."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start)


class _Progress:
    """One line now and then: loss since the last line and smoothed, images per second, time to go."""

    def __init__(self, config: LoopConfig, start: int, samples: int, console: Console) -> None:
        self.last, self.samples, self.console = config.max_steps, samples, console
        self.since_step, self.since_time, self.total = start, time.monotonic(), 0.0
        self.smooth: float | None = None

    def show(self, step: int, loss: float) -> None:
        self.total += loss
        self.smooth = loss if self.smooth is None else SMOOTHING * self.smooth + (1 - SMOOTHING) * loss
        now, done = time.monotonic(), step + 1
        if now - self.since_time < EVERY_SECONDS and done < self.last:
            return
        steps = done - self.since_step
        rate = steps / max(now - self.since_time, 1e-9)
        left = timedelta(seconds=round((self.last - done) / rate))
        self.console.print(
            f"step {done}/{self.last}  loss {self.total / steps:.4f}  EMA {self.smooth:.4f}  "
            f"{rate * self.samples:.0f} img/s  ETA {left}"
        )
        self.since_step, self.since_time, self.total = done, now, 0.0


class Metrics:
    """metrics.jsonl: one line per step.

    A resumed run drops the lines at and after its first step, which the killed process wrote beyond its last
    checkpoint, so that every step has exactly one line.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) in range(start)]
            with replacing(path) as aside:
                aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _step_of(line: str) -> int:
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


def loss_curve(metrics: Path, out: Path, width: int = 200) -> None:
    """Draws the running mean of the loss over `width` steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    losses = np.asarray([row["loss"] for row in read_metrics(metrics)])
    if len(losses) == 0:
        return
    width = max(1, min(width, len(losses) // 5))
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(np.arange(len(smooth)) + width // 2, smooth)
    axes.set(xlabel="step", ylabel=f"loss (mean of {width} steps)")
    low, high = np.percentile(smooth, [0, 97]) if len(smooth) else (0.0, 0.0)
    if high > low:  # the first losses, which fall from far above, are cut off
        axes.set_ylim(low * 0.98, high * 1.05)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with replacing(out) as aside:
        figure.savefig(aside, format="png", dpi=100)
    plt.close(figure)


def save_grid(images: Pixels, out: Path, columns: int) -> None:
    """Images [B, R, R, 3] side by side, row by row, one pixel apart."""
    count, side = images.shape[0], images.shape[1]
    rows = -(-count // columns)
    sheet = np.full((rows * (side + 1) - 1, columns * (side + 1) - 1, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (side + 1), (i % columns) * (side + 1)
        sheet[top : top + side, left : left + side] = image
    with replacing(out) as aside:
        Image.fromarray(sheet).save(aside, format="PNG")
