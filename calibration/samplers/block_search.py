"""Fixed schedules for a model: the mean schedule that adaptive steps take, and the best layout of H, P and R blocks.

A frozen schedule needs no look at the error while it runs: no host round trip, and every modulation is known ahead.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from calibration.samplers.probe import Measured, Probe
from flowturbo.evaluation.table.pareto_plot import pareto_front
from runtime.pipeline import Pipeline
from runtime.request import RequestOptions
from runtime.sampling.blocks import REFINER_STEP
from runtime.sampling.controllers import Journal
from runtime.sampling.grids import Grid, shifted, uniform

Say = Callable[[str], None]
_POINTS = 2000
SHIFTS = (1.25, 1.6)


def mean_schedule(journals: Sequence[Journal], steps: int) -> Grid:
    """A grid of `steps` steps whose density over flow time is the mean of the accepted steps' of many images."""
    edges = np.linspace(0.0, 1.0, _POINTS + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    density = np.zeros(_POINTS)
    for journal in journals:
        kept = journal.accepted
        ends = np.array([step.t + step.dt for step in kept])
        lengths = np.array([step.dt for step in kept])
        place = np.minimum(np.searchsorted(ends, middle), len(kept) - 1)
        density += 1.0 / lengths[place] / len(kept)
    reached = np.concatenate([[0.0], np.cumsum(density)])
    points = np.interp(np.arange(1, steps) / steps * reached[-1], reached, edges)
    return (0.0, *(float(point) for point in points), 1.0)


@dataclass(frozen=True)
class Costs:
    """What the parts of an image take on this machine, in milliseconds: median of several runs.

    Attributes:
        image: everything beside the evaluations: noise, conditioning, decoding, host.
        predictor, refiner: one guided evaluation.
    """

    image: float
    predictor: float
    refiner: float

    def of(self, predictor: float, refiner: float) -> float:
        """Predicted time of an image with so many evaluations."""
        return self.image + predictor * self.predictor + refiner * self.refiner


def measure_costs(pipeline: Pipeline, options: RequestOptions, *, batch: int = 1, repeats: int = 5) -> Costs:
    """Times whole images of few and many evaluations, taking turns, and divides the differences.

    Differences of whole runs hold for backends whose calls return early, as a stopwatch around a call does not.
    """
    label = min(pipeline.manifest.model.classes)
    with_refiner = pipeline.manifest.model.refiner is not None
    names = ["H1P1", "H1P13", *(["H1P1R6"] if with_refiner else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of long refiner steps: nobody looks at these pictures
        requests = {name: pipeline.request([label] * batch, **_with(options, name)) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(repeats + 1):  # the first warms up
            for name, request in requests.items():
                started = time.perf_counter()
                pipeline.run(request)
                if turn:
                    times[name].append(1e3 * (time.perf_counter() - started) / batch)
    median = {name: statistics.median(values) for name, values in times.items()}
    predictor = max(0.0, (median["H1P13"] - median["H1P1"]) / 12)
    refiner = max(0.0, (median["H1P1R6"] - median["H1P1"]) / 12) if with_refiner else 0.0
    return Costs(max(0.0, median["H1P1"] - 3 * predictor), predictor, refiner)


def _with(options: RequestOptions, schedule: str) -> RequestOptions:
    return {**options, "schedule": schedule}


@dataclass(frozen=True)
class Layout:
    """Blocks and their grid."""

    schedule: str
    grid: Grid
    grid_name: str

    @property
    def longest_refiner_step(self) -> float:
        """Of its R blocks; 0 if there are none."""
        count = int(self.schedule.partition("R")[2] or 0)
        steps = [b - a for a, b in pairwise(self.grid)]
        return max(steps[len(steps) - count :], default=0.0) if count else 0.0


def layouts(most_nfe: int, refiner: bool, frozen: Callable[[int], Grid]) -> list[Layout]:
    """Every H, P, R layout of at most `most_nfe` predictor evaluations on every grid worth trying.

    Layouts whose refiner steps are longer than refiners are trained for are left out.
    """
    grids: dict[str, Callable[[int], Grid]] = {"uniform": uniform, "lte": frozen}
    grids |= {f"shift:{shift:g}": _shift(shift) for shift in SHIFTS}
    found = []
    for h in (1, 2, 3):
        for p in range(0, most_nfe - 2 * h + 1):
            for r in (0, 1, 2, 3, 5) if refiner else (0,):
                name = f"H{h}" + (f"P{p}" if p else "") + (f"R{r}" if r else "")
                for grid_name, build in grids.items():
                    layout = Layout(name, build(h + p + r), grid_name)
                    if h + p + r >= 2 and layout.longest_refiner_step <= REFINER_STEP + 1e-9:
                        found.append(layout)
    return found


def _shift(shift: float) -> Callable[[int], Grid]:
    return lambda steps: shifted(steps, shift)


@dataclass(frozen=True)
class Tried:
    """A layout, its predicted time and its error."""

    layout: Layout
    ms: float
    measured: Measured


def search_layouts(
    probe: Probe, costs: Costs, candidates: Sequence[Layout], say: Say
) -> tuple[list[Tried], list[Tried]]:
    """Everything that was tried, and the Pareto front of time against error.

    All candidates run on a quarter of the images, and on all of them those that few cheaper ones beat there.
    """
    rough = [_tried(_part(probe, 4), layout, costs) for layout in candidates]
    say(f"{len(rough)} layouts on a quarter of the images")
    rough.sort(key=lambda tried: tried.ms)
    promising = [
        tried
        for i, tried in enumerate(rough)
        if sum(other.measured.error < tried.measured.error for other in rough[: i + 1]) < max(2, (i + 1) // 8)
    ]
    say(f"{len(promising)} of them on all images")
    return rough, front_of([_tried(probe, tried.layout, costs) for tried in promising])


def front_of(tried: Sequence[Tried]) -> list[Tried]:
    """Those that no other one undercuts in both time and error, fastest first."""
    return [tried[i] for i in pareto_front([(one.ms, one.measured.error) for one in tried])]


def _tried(probe: Probe, layout: Layout, costs: Costs) -> Tried:
    measured = probe.measure(schedule=layout.schedule, grid=layout.grid)
    name = f"{layout.schedule} ({layout.grid_name})"
    return Tried(layout, costs.of(measured.predictor, measured.refiner), replace(measured, name=name))


def _part(probe: Probe, share: int) -> Probe:
    """The first of a probe's images."""
    return probe.first(max(4, len(probe.draw) // share))
