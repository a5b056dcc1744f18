"""Draw the steps that images took. Only this part of the runtime needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from runtime.request import Request
from runtime.sampling.controllers import Journal, PathStep
from runtime.system.errors import RequestError
from runtime.system.files import check_output_file, write_atomically

PLOT_FORMATS = (".png", ".svg", ".pdf")
_MAX_PATHS = 32
_COLOURS = {"H": "tab:blue", "P": "tab:green", "R": "tab:orange"}


def check_plot_path(path: Path, pictures: Path) -> None:
    """Check that a plot can be drawn, before any picture is made; make its folder.

    Raises:
        RequestError: a place among the pictures, or no matplotlib.
        OutputError: a format that cannot be drawn, or a place that cannot be written.
    """
    if path.suffix.lower() == ".png" and path.resolve().parent == pictures.resolve():
        raise RequestError(
            f"--plot-path {path}", allowed="a file, and no .png among the pictures", remedy="name another folder"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--plot-path needs matplotlib", remedy="pip install matplotlib")
    check_output_file(path, option="--plot-path", suffixes=PLOT_FORMATS)


def plot_paths(path: Path, request: Request, journals: Sequence[Journal]) -> None:
    """Plot step length over flow time, a line per image, with rejected trials as crosses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    paths = [journal.steps for journal in journals[:_MAX_PATHS]]
    if not paths:  # of a fixed plan: a step from each time of an evaluation to the next
        times_of_plan = sorted({0.0, 1.0} | {evaluation.t for evaluation in request.sampler.plan})
        paths = [[PathStep(a, b - a, "fixed", None, True) for a, b in pairwise(times_of_plan)]]
    labelled_blocks: set[str] = set()
    for steps in paths:
        accepted = [step for step in steps if step.accepted]
        times = [step.t for step in accepted] + [accepted[-1].t + accepted[-1].dt]
        axes.stairs([abs(step.dt) for step in accepted], times, color="0.6", linewidth=0.8, baseline=None)
        for block in dict.fromkeys(step.block for step in accepted):
            block_steps = [step for step in accepted if step.block == block]
            axes.plot(
                [step.t + step.dt / 2 for step in block_steps],
                [abs(step.dt) for step in block_steps],
                ".",
                markersize=4,
                color=_COLOURS.get(block, "tab:purple"),
                label=None if block in labelled_blocks else block,
            )
            labelled_blocks.add(block)
        rejected = [step for step in steps if not step.accepted]
        axes.plot(
            [step.t for step in rejected], [abs(step.dt) for step in rejected], "x", markersize=4, color="tab:red"
        )
    axes.set(xlabel="flow time t", ylabel="step length Δt", yscale="log", title=request.sampler.name, xlim=(0, 1))
    axes.legend(title="block (×: given up)", frameon=False)
    with write_atomically(path) as temp_path:
        figure.savefig(temp_path, format=path.suffix.lower()[1:], dpi=150)
