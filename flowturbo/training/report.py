"""What a run leaves behind while it trains: metrics.jsonl, a loss curve and sample grids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from flowturbo.data import Pixels
from runtime.files import replacing


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
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1  # a line that was being written when the process was killed


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def loss_curve(metrics: Path, out: Path, width: int = 200) -> None:
    """Draws the running mean of the loss over `width` steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    losses = np.asarray([row["loss"] for row in read_metrics(metrics)])
    width = max(1, min(width, len(losses) // 5))
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(np.arange(len(smooth)) + width // 2, smooth)
    low, high = np.percentile(smooth, [0, 97]) if len(smooth) else (0.0, 1.0)
    axes.set(xlabel="step", ylabel=f"loss (mean of {width} steps)", ylim=(low * 0.98, high * 1.05))
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
