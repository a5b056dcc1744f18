"""Draw the Pareto plot: latency against quality, and the samplers that no other one beats in both."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowturbo.evaluation.quality.metrics import METRICS
from flowturbo.evaluation.table.table_run import RowResult, TableResult
from flowturbo.plotting import check_matplotlib
from runtime.system.files import write_atomically

GROUP_COLOURS = {"SiT": "tab:grey", "FlowTurbo": "tab:red", "other": "tab:blue"}
PANEL_METRICS = ("fid", "kid", "latent_rms")
"""Metrics that are plotted, lower being better: FID, or KID without it, and the same-seed error."""


def find_pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices, in order of the first number, of points that no other one undercuts in both numbers."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def save_pareto_plot(result: TableResult, path: Path) -> bool:
    """Write `path`.png and `path`.svg; return false if no row has both a latency and a quality.

    Raises:
        BackendError: matplotlib is missing.
    """
    vae = result.settings.vaes[0]
    rows = [row for row in result.rows if row.vae == vae]
    present_metrics = [name for name in PANEL_METRICS if any(name in row.values for row in rows)]
    panels = [name for name in present_metrics if not (name == "kid" and "fid" in present_metrics)]
    if not panels:
        return False
    check_matplotlib("eval")
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "flowturbo"  # the same numbers give the same file
    plt = importlib.import_module("matplotlib.pyplot")
    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 5.5), squeeze=False)
    for axis, name in zip(axes[0], panels, strict=True):
        _draw_panel(axis, [row for row in rows if name in row.values and row.values[name].mean != 0], name)
    figure.suptitle(f"{result.settings.num} images, VAE {vae}")
    figure.tight_layout()
    for kind, metadata in (("png", {}), ("svg", {"Date": None})):
        with write_atomically(path.with_name(f"{path.name}.{kind}")) as aside:
            figure.savefig(aside, format=kind, dpi=110, metadata=metadata)
    plt.close(figure)
    return True


def _draw_panel(axis: Any, rows: Sequence[RowResult], name: str) -> None:
    points = [(row.latency.median_ms, row.values[name].mean) for row in rows]
    if not points:
        return
    front_indices = find_pareto_front(points)
    axis.plot(
        *zip(*(points[i] for i in front_indices), strict=True), color="black", linewidth=0.8, linestyle="--", zorder=1
    )
    for index, (row, point) in enumerate(zip(rows, points, strict=True)):
        axis.scatter(*point, color=GROUP_COLOURS[row.group], s=40 if index in front_indices else 18, zorder=2)
        axis.annotate(row.name, point, xytext=(4, 3), textcoords="offset points", fontsize=7)
    is_positive = all(value > 0 for _, value in points)  # an unbiased KID may be below 0
    axis.set(xscale="log", yscale="log" if is_positive else "linear", xlabel="ms per image (median)")
    axis.set_ylabel(METRICS[name].label if name in METRICS else "same-seed latent rms")
    axis.grid(alpha=0.3, which="both")
