"""What a run shows and leaves behind, and what stops it.

It leaves lines, metrics.jsonl, TensorBoard, a loss curve, sample grids, and what is needed to repeat it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from flowturbo.checkpoint_shards import hash_checkpoint
from flowturbo.data.photographs import Pixels
from flowturbo.training.config import LoopConfig
from flowturbo.training.training_state import list_checkpoints
from runtime.system.errors import TrainingError
from runtime.system.files import report_write_errors, write_atomically
from runtime.system.version import VERSION

PROGRESS_INTERVAL_S = 15.0
LOSS_SMOOTHING = 0.98
"""Decay of the smoothed loss in the progress lines."""
MEDIAN_WINDOW = 200
"""Losses of which the median is taken."""
MIN_LOSSES = 20
"""Losses before one can be called an explosion: the first ones fall quickly."""
_START_KEYS = ("starts", "processes")  # these may differ between the starts of one run


def describe_file(path: Path) -> dict[str, str]:
    """Describe a checkpoint that a run began with: its path and its hash."""
    return {"path": str(path), "sha256": hash_checkpoint(path)}  # a large file is not read again at every start


def describe_start(step: int, config: LoopConfig) -> dict[str, object]:
    """Describe one start of a run: when, by which command, with which software, and the options of its loop."""
    return {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(sys.argv),
        "flowturbo": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "loop": config.to_json(),
    }


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return a run's config.json; empty if there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def list_changes(old_config: Mapping[str, object], new_config: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Yield options of a resumed run that have changed, one line each: "loop.lr 0.001 → 0.0005"."""
    for key in old_config.keys() & new_config.keys():
        name, old, new = f"{prefix}{key}", old_config[key], new_config[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from list_changes(old, new, f"{name}.")
        elif name not in _START_KEYS and old != json.loads(json.dumps(new)):
            yield f"{name} {old} → {new}"


class LossGuard:
    """Stop a run when its loss is not a number or explodes.

    It checks every loss before the optimiser's step, so that the weights and every checkpoint are of good steps. A
    loss explodes when it is above `limit` × the median of the last `MEDIAN_WINDOW` losses. Single losses are checked,
    not means, because a checkpoint may be written after any step.
    """

    def __init__(self, folder: Path, limit: float, losses: Iterable[float] = ()) -> None:
        """Start with the losses before a resume, so that a resumed run is checked like an uninterrupted one.

        A limit of 0 allows any finite loss.
        """
        self.folder, self.limit = folder, limit
        self.losses = deque(losses, maxlen=MEDIAN_WINDOW)

    def check_loss(self, step: int, loss: float, gradient_norm: float) -> None:
        """Raise TrainingError if the run must stop, with the step, the loss and the last good checkpoint."""
        median_loss = median(self.losses) if len(self.losses) >= MIN_LOSSES else math.inf
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            problem = f"the loss is {loss} and the gradient norm {gradient_norm}"
            allowed = "finite numbers"
        elif self.limit and loss > self.limit * median_loss:
            problem = (
                f"the loss explodes: {loss:.4g}, with a median of {median_loss:.4g} over the last "
                f"{len(self.losses)} steps"
            )
            allowed = f"up to {self.limit:g} times the median (--explode)"
        else:
            self.losses.append(loss)
            return
        checkpoints = list_checkpoints(self.folder)
        advice = f"the last good checkpoint is {checkpoints[-1][1]}" if checkpoints else "there is no checkpoint yet"
        raise TrainingError(
            f"step {step}: {problem}; {advice}",
            allowed=allowed,
            remedy="lower --lr or --clip, or use --precision fp32, and go on with --resume",
        )


class TrainingLogger:
    """Record every step in metrics.jsonl, in TensorBoard where it is installed, and in a line now and then.

    Of many processes only the main one records; the others use `read_recent_losses` alone.
    """

    def __init__(
        self, out: Path, config: LoopConfig, start: int, processes: int, console: Console, is_main: bool = True
    ) -> None:
        self.path, self.start, self.is_main = out / "metrics.jsonl", start, is_main
        self._exit_stack = ExitStack()
        self._summary_writer: Any = None
        if is_main:
            self._metrics = self._exit_stack.enter_context(MetricsFile(self.path, start))
            self._progress = _ProgressPrinter(config, start, config.batch_size * config.accumulate * processes, console)
        if is_main and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            # It drops what a killed process wrote beyond its last checkpoint.
            self._summary_writer = SummaryWriter(str(out / "tensorboard"), purge_step=start)
            self._exit_stack.callback(self._summary_writer.close)

    def read_recent_losses(self, count: int) -> list[float]:
        """Return the last losses before the first step of this start."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines if _parse_step(line) in range(self.start)][-count:]

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Record the losses, gradient norm and learning rate of a step."""
        if not self.is_main:
            return
        self._metrics.write(step, values)
        self._progress.update(step, values["loss"])
        if self._summary_writer is not None:
            with report_write_errors(self.path.with_name("tensorboard")):
                for name, value in values.items():
                    self._summary_writer.add_scalar(name, value, step)

    def __enter__(self) -> TrainingLogger:
        return self

    def __exit__(self, *_: object) -> None:
        with report_write_errors(self.path.with_name("tensorboard")):
            self._exit_stack.close()


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

    A resumed run drops the lines at and after its first step. A killed process wrote them beyond its last checkpoint.
    So every step has exactly one line.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        if path.exists():
            valid_lines = [
                line for line in path.read_text(encoding="utf-8").splitlines() if _parse_step(line) in range(start)
            ]
            with write_atomically(path) as aside:
                aside.write_text("".join(line + "\n" for line in valid_lines), encoding="utf-8")
        with report_write_errors(path):
            self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the line of a step."""
        with report_write_errors(self.path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        with report_write_errors(self.path):
            self._file.close()


def _parse_step(line: str) -> int:
    """Return the step of a line; −1 if a killed process left it unfinished or somebody has edited it."""
    try:
        row = json.loads(line)
        float(row["loss"])
        return int(row["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_loss_curve(metrics: Path, out: Path, width: int = 200) -> None:
    """Draw the running mean of the loss over `width` steps."""
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
    """Write images [B, R, R, 3] as one PNG, row by row, one pixel apart."""
    count, side = images.shape[0], images.shape[1]
    rows = -(-count // columns)
    sheet = np.full((rows * (side + 1) - 1, columns * (side + 1) - 1, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (side + 1), (i % columns) * (side + 1)
        sheet[top : top + side, left : left + side] = image
    with write_atomically(out) as aside:
        Image.fromarray(sheet).save(aside, format="PNG")
