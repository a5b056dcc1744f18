"""Find fixed schedules for a model: the mean of adaptive steps, and the best layout of H, P and R blocks.

A frozen schedule needs no look at the error while it runs: no host round trip, and every modulation is known ahead.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np

from calibration.samplers.probe import SamplerMeasurement, SamplerMeter
from flowturbo.evaluation.speed.rounds import time_calls
from flowturbo.evaluation.table.pareto_plot import find_pareto_front
from runtime.pipeline import Pipeline
from runtime.request import RequestOptions
from runtime.sampling.blocks import MAX_REFINER_STEP
from runtime.sampling.controllers import Journal
from runtime.sampling.grids import Grid, build_shifted_grid, build_uniform_grid
from runtime.system.progress import SILENT, Progress

_NUM_POINTS = 2000
GRID_SHIFTS = (1.25, 1.6)


def average_grid(journals: Sequence[Journal], steps: int) -> Grid:
    """Return a grid of `steps` steps; its density over flow time is the mean of the accepted steps of many images."""
    edges = np.linspace(0.0, 1.0, _NUM_POINTS + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    density = np.zeros(_NUM_POINTS)
    for journal in journals:
        accepted = journal.accepted
        ends = np.array([step.t + step.dt for step in accepted])
        lengths = np.array([step.dt for step in accepted])
        indices = np.minimum(np.searchsorted(ends, centres), len(accepted) - 1)
        density += 1.0 / lengths[indices] / len(accepted)
    cumulative = np.concatenate([[0.0], np.cumsum(density)])
    points = np.interp(np.arange(1, steps) / steps * cumulative[-1], cumulative, edges)
    return (0.0, *(float(point) for point in points), 1.0)


@dataclass(frozen=True)
class Costs:
    """Times of the parts of an image on this machine, in milliseconds: medians of several runs.

    Attributes:
        image_ms: everything beside the evaluations: noise, conditioning, decoding, host.
        predictor_ms, refiner_ms: one guided evaluation.
    """

    image_ms: float
    predictor_ms: float
    refiner_ms: float

    def predict_ms(self, predictor: float, refiner: float) -> float:
        """Return the predicted time of an image with so many evaluations."""
        return self.image_ms + predictor * self.predictor_ms + refiner * self.refiner_ms


def measure_costs(pipeline: Pipeline, options: RequestOptions, *, batch: int = 1, repeats: int = 5) -> Costs:
    """Time whole images of few and many evaluations, taking turns, and divide the differences.

    Differences of whole runs hold for backends whose calls return early, as a stopwatch around a call does not.
    """
    label = min(pipeline.manifest.model.classes)
    has_refiner = pipeline.manifest.model.refiner is not None
    names = ["H1P1", "H1P13", *(["H1P1R6"] if has_refiner else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of long refiner steps: nobody looks at these pictures
        requests = {}
        for name in names:
            named_options: RequestOptions = {**options, "schedule": name}
            requests[name] = pipeline.request([label] * batch, **named_options)
        times_ms = time_calls({name: partial(pipeline.run, request) for name, request in requests.items()}, repeats)
    median = {name: statistics.median(times) / batch for name, times in times_ms.items()}
    predictor = max(0.0, (median["H1P13"] - median["H1P1"]) / 12)
    refiner = max(0.0, (median["H1P1R6"] - median["H1P1"]) / 12) if has_refiner else 0.0
    return Costs(max(0.0, median["H1P1"] - 3 * predictor), predictor, refiner)


@dataclass(frozen=True)
class Layout:
    """Blocks and their grid."""

    schedule: str
    grid: Grid
    grid_name: str

    @property
    def longest_refiner_step(self) -> float:
        """Flow time of the longest step of an R block; 0 without R blocks."""
        count = int(self.schedule.partition("R")[2] or 0)
        steps = [b - a for a, b in pairwise(self.grid)]
        return max(steps[len(steps) - count :], default=0.0) if count else 0.0


def list_layouts(max_nfe: int, has_refiner: bool, make_frozen_grid: Callable[[int], Grid]) -> list[Layout]:
    """Return every H, P, R layout of at most `max_nfe` predictor evaluations on every grid worth trying.

    Layouts whose refiner steps are longer than refiners are trained for are left out.
    """
    grids: dict[str, Callable[[int], Grid]] = {"uniform": build_uniform_grid, "lte": make_frozen_grid}
    grids |= {f"shift:{shift:g}": partial(build_shifted_grid, shift=shift) for shift in GRID_SHIFTS}
    candidates = []
    for h in (1, 2, 3):
        for p in range(0, max_nfe - 2 * h + 1):
            for r in (0, 1, 2, 3, 5) if has_refiner else (0,):
                name = f"H{h}" + (f"P{p}" if p else "") + (f"R{r}" if r else "")
                for grid_name, make_grid in grids.items():
                    layout = Layout(name, make_grid(h + p + r), grid_name)
                    if h + p + r >= 2 and layout.longest_refiner_step <= MAX_REFINER_STEP + 1e-9:
                        candidates.append(layout)
    return candidates


@dataclass(frozen=True)
class LayoutTrial:
    """A layout, its predicted time and its error."""

    layout: Layout
    ms: float
    measurement: SamplerMeasurement


def search_layouts(
    meter: SamplerMeter, costs: Costs, candidates: Sequence[Layout], progress: Progress = SILENT
) -> tuple[list[LayoutTrial], list[LayoutTrial]]:
    """Return every trial, and the Pareto front of time against error, fastest first.

    All candidates run on a quarter of the images, and on all of them those that few cheaper ones beat there.
    """
    rough_meter = meter.take_first(max(4, len(meter.draw) // 4))
    progress.stage(f"{len(candidates)} layouts on a quarter of the images")
    rough_trials = [_try_layout(rough_meter, layout, costs) for layout in candidates]
    rough_trials.sort(key=lambda trial: trial.ms)
    promising_trials = [
        trial
        for i, trial in enumerate(rough_trials)
        if sum(other.measurement.error < trial.measurement.error for other in rough_trials[: i + 1])
        < max(2, (i + 1) // 8)
    ]
    progress.stage(f"{len(promising_trials)} of them on all images")
    trials = [_try_layout(meter, trial.layout, costs) for trial in promising_trials]
    front = find_pareto_front([(trial.ms, trial.measurement.error) for trial in trials])
    return rough_trials, [trials[i] for i in front]


def _try_layout(meter: SamplerMeter, layout: Layout, costs: Costs) -> LayoutTrial:
    measurement = meter.measure(schedule=layout.schedule, grid=layout.grid)
    name = f"{layout.schedule} ({layout.grid_name})"
    return LayoutTrial(
        layout, costs.predict_ms(measurement.predictor_nfe, measurement.refiner_nfe), replace(measurement, name=name)
    )
