"""Plot calibrations and the study: error against evaluations and time, and what a search gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.system.files import make_folder, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")


class Sheet:
    """A figure with panels side by side, written whole or not at all."""

    def __init__(self, panels: int, width: float = 5.2, height: float = 4.0) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width * panels, height), layout="constrained")
        FigureCanvasAgg(self.figure)
        self.axes: list[Axes] = list(self.figure.subplots(1, panels, squeeze=False)[0])

    def save(self, path: Path) -> None:
        """Write a PNG."""
        make_folder(path.absolute().parent)
        with write_atomically(path) as aside:
            self.figure.savefig(aside, format="png", dpi=120)


def plot_error_panel(
    axes: Any, families: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, title: str, *, legend: bool = True
) -> None:
    """Plot error over evaluations or time, both logarithmic, a line per family of samplers."""
    for index, (name, points) in enumerate(families.items()):
        ordered = sorted(points)
        axes.plot(
            [x for x, _ in ordered],
            [y for _, y in ordered],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1,
            color=f"C{index % 10}",
            linestyle="-" if index < 10 else "--",
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="same-seed error (latent rms)", title=title)
    axes.grid(visible=True, which="both", linewidth=0.3, color="0.85")
    if legend:
        axes.legend(fontsize=7, frameon=False)


def plot_search(path: Path, history: Sequence[tuple[int, float, float | None]], before: float, after: float) -> None:
    """Plot the course of a table search, and its error on held-out seeds before and after."""
    sheet = Sheet(2, width=4.2, height=3.4)
    course, gain = sheet.axes
    course.plot([s for s, _, _ in history], [loss for _, loss, _ in history], color="0.7", label="loss on a batch")
    selection_points = [(s, error) for s, _, error in history if error is not None]
    course.plot(
        [s for s, _ in selection_points], [e for _, e in selection_points], "o-", markersize=3, label="choosing images"
    )
    course.set(xlabel="step", ylabel="distance to the fine trajectory", yscale="log")
    course.legend(frameon=False, fontsize=8)
    _plot_bars(gain, {"before": before, "after": after})
    sheet.save(path)


def plot_frozen(path: Path, grid: Sequence[float], before: float, after: float) -> None:
    """Plot step lengths of a frozen schedule beside equal ones, and the errors of both on held-out seeds."""
    sheet = Sheet(2, width=4.2, height=3.4)
    lengths, gain = sheet.axes
    steps = len(grid) - 1
    uniform = [i / steps for i in range(steps + 1)]
    for times, colour, name in ((uniform, "0.7", "uniform"), (grid, "tab:green", "frozen")):
        lengths.stairs([b - a for a, b in pairwise(times)], times, baseline=None, color=colour, label=name)
    lengths.set(xlabel="flow time t", ylabel="step length Δt", xlim=(0, 1), ylim=(0, None))
    lengths.legend(frameon=False)
    _plot_bars(gain, {"uniform": before, "frozen": after})
    sheet.save(path)


def plot_trials(path: Path, trials: Sequence[tuple[float, float, float]], setting: str, target: float) -> None:
    """Plot evaluations and error over the settings of a rule that were tried, and the target of evaluations."""
    sheet = Sheet(2, width=4.2, height=3.4)
    evaluations, error = sheet.axes
    ordered = sorted(trials)
    evaluations.plot([s for s, _, _ in ordered], [nfe for _, nfe, _ in ordered], "o-", markersize=3)
    evaluations.axhline(target, color="0.6", linewidth=0.8)
    evaluations.set(xlabel=setting, ylabel="evaluations per image", xscale="log", yscale="log")
    error.plot([nfe for _, nfe, _ in ordered], [e for _, _, e in ordered], "o-", markersize=3)
    error.axvline(target, color="0.6", linewidth=0.8)
    error.set(xlabel="evaluations per image", ylabel="same-seed error", xscale="log", yscale="log")
    sheet.save(path)


def plot_sensitivity(path: Path, distances: Mapping[str, float], title: str) -> None:
    """Plot the distance of the latents with one layer alone low: a line per kind of layer, over the blocks."""
    points_by_part: dict[str, list[tuple[str, float]]] = {}
    for name, distance in distances.items():
        block, _, layer = name.partition("blocks.")
        number, _, part = layer.partition(".")
        points_by_part.setdefault(part, []).append((f"{block[0]}{number}", distance))
    sheet = Sheet(1, width=6.4, height=3.8)
    (axes,) = sheet.axes
    for index, (part, points) in enumerate(points_by_part.items()):
        axes.plot([x for x, _ in points], [y for _, y in points], marker=MARKERS[index], label=part)
    axes.set(xlabel="block (p: predictor, r: refiner)", ylabel="latent rms, alone", yscale="log", title=title)
    axes.legend(frameon=False, fontsize=8)
    sheet.save(path)


def _plot_bars(axes: Axes, errors: Mapping[str, float]) -> None:
    bars = axes.bar(list(errors), list(errors.values()), color=["0.7", "tab:green"])
    axes.bar_label(bars, fmt="%.4f")
    axes.set(ylabel="same-seed error", title="held-out seeds")


def plot_front(
    path: Path, points: Sequence[tuple[float, float]], front: Sequence[tuple[float, float, str]], unit: str
) -> None:
    """Plot all trials, and the front with its names."""
    sheet = Sheet(1, width=6.4, height=4.4)
    (axes,) = sheet.axes
    axes.plot([x for x, _ in points], [y for _, y in points], ".", color="0.75", markersize=4)
    axes.plot([x for x, _, _ in front], [y for _, y, _ in front], "o-", color="tab:red", markersize=4)
    for x, y, name in front:
        axes.annotate(name, (x, y), fontsize=6, xytext=(4, 3), textcoords="offset points")
    axes.set(xlabel=unit, ylabel="same-seed error (latent rms)", yscale="log")
    sheet.save(path)
