"""`flowturbo-bench roofline`: estimates for devices, and what engines reach of this machine's measured limits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from flowturbo.evaluation.speed.baselines import find_plugins, load_plugin
from flowturbo.evaluation.speed.bench_job import is_on_gpu
from flowturbo.evaluation.speed.conditions import build_engine_subject
from flowturbo.evaluation.speed.devices import DEVICES, EFFICIENCY_NOTES, Device
from flowturbo.evaluation.speed.macs import SIT_SIZES
from flowturbo.evaluation.speed.roofline import (
    MachineLimits,
    ModelCost,
    Prediction,
    StageUtilization,
    compute_utilization,
    count_workload,
    describe_model,
    describe_released_model,
    find_device,
    measure_limits,
    measure_stages,
    predict_latency,
)
from flowturbo.evaluation.speed.terminal_tables import render_limits, render_roofline, render_utilization
from flowturbo.evaluation.speed.timed_pipeline import TimedPipeline
from runtime.cli.command_base import Command, echo_json
from runtime.cli.dataclass_options import options
from runtime.cli.runner_options import RunnerOptions
from runtime.request import RequestOptions
from runtime.sampling.guidance import ImageCondition, check_guidance_scale
from runtime.sampling.sampler import SamplerChoice, resolve_sampler
from runtime.system.errors import BackendError, RequestError
from runtime.system.json_codec import to_json
from runtime.system.option_fields import argument, option

DEFAULT_SCHEDULES = ("H1P5R3", "H2P8R2")


@dataclass(frozen=True)
class RooflineOptions:
    """What is estimated, and whether this machine is measured."""

    engines: tuple[Path, ...] = argument(())
    sizes: tuple[str, ...] = option(
        (), "--model", help="Released sizes of SiT, patch 2.", choices=tuple(SIT_SIZES), default_text="all"
    )
    samplers: tuple[str, ...] = option(
        (), "--sampler", help="FlowTurbo blocks; may be repeated.", default_text=", ".join(DEFAULT_SCHEDULES)
    )
    schedules: tuple[str, ...] = option((), "--schedule", help="The same as --sampler.", advanced=True)
    resolution: int | None = option(
        None, help="Pixels a side.", minimum=16, maximum=4096, default_text="256; of engines the first built"
    )
    batch: int = option(1, help="Images at once.", minimum=1, maximum=1024)
    guidance: float = option(4.0, help="Scale; 1 halves the rows.")
    devices: tuple[str, ...] = option(
        (), "--device", help="A device of the table; may be repeated.", default_text="all"
    )
    measure: bool = option(True, "--measure/--no-measure", help="Measure this machine's limits.")
    repeats: int = option(5, help="Runs of the engines.", minimum=1, maximum=1000)
    as_json: bool = option(False, "--json", help="Print JSON and nothing else on stdout.")


@click.command(cls=Command)
@options(RooflineOptions, RunnerOptions)
def roofline(roof: RooflineOptions, runner: RunnerOptions) -> None:
    """Estimate a picture's time on devices; measure what this machine reaches: flowturbo-bench roofline engines

    Estimates follow from published figures by a rule of thumb. With engine directories the table is of their models,
    and they are run here, beside a measured matrix product and memory copy.
    """
    engines, sizes, schedules = roof.engines, roof.sizes, (*roof.samplers, *roof.schedules)
    resolution, batch, guidance, load = roof.resolution, roof.batch, roof.guidance, asdict(runner)
    if resolution is not None and resolution % 16:
        raise RequestError(f"resolution {resolution}", allowed="multiples of 16: patch 2 × 8 px per latent")
    scale, selected_devices = (
        check_guidance_scale(guidance),
        [find_device(name) for name in roof.devices] or list(DEVICES),
    )
    if engines and sizes:
        raise RequestError("--model together with engine directories", remedy="name one or the other")
    limits = measure_best_limits() if roof.measure else None
    predictions: list[Prediction] = []
    utilization_by_name: dict[str, list[StageUtilization]] = {}
    for schedule in schedules or (DEFAULT_SCHEDULES if not engines else ()):
        models = (
            [describe_released_model(size, resolution or 256) for size in sizes or SIT_SIZES] if not engines else []
        )
        for model in models:
            predictions += _estimate_devices(model, schedule, batch, scale, selected_devices)
    for folder in engines:
        for engine_schedule in schedules or (None,):
            engine_predictions, utilization = _measure_engines(
                folder, resolution, engine_schedule, batch, guidance, selected_devices, limits, roof.repeats, load
            )
            predictions += engine_predictions
            if utilization:
                utilization_by_name[
                    f"{folder} {engine_predictions[0].sampler if engine_predictions else engine_schedule}"
                ] = utilization
    if roof.as_json:
        echo_json(_build_json_report(predictions, limits, utilization_by_name))
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    resolution_text = "" if engines else f"{resolution or 256} px, "
    render_roofline(predictions, console, f"{resolution_text}batch {batch}, guidance {scale:g}")
    if limits is not None:
        render_limits(limits, console)
    for name, utilization in utilization_by_name.items():
        render_utilization(name, utilization, console)


def measure_best_limits() -> MachineLimits:
    """NumPy's, and what an installed baseline's library does better."""
    limits = measure_limits()
    for name in find_plugins():
        try:
            products = load_plugin(name).measure_matrix_products()
        except BackendError:  # not installed: NumPy's figures stand alone, and the note says whose they are
            continue
        best_rates = {kind: max(rate, limits.flops_per_s.get(kind, 0.0)) for kind, rate in products.items()}
        limits = replace(
            limits, flops_per_s={**limits.flops_per_s, **best_rates}, note=f"{limits.note}; products also by {name}"
        )
    return limits


def _estimate_devices(
    model: ModelCost, schedule: str, batch: int, scale: float, devices: Sequence[Device]
) -> list[Prediction]:
    sampler = resolve_sampler(SamplerChoice(schedule=schedule))
    workload = count_workload(model, sampler.plan, [[ImageCondition(((0, 1.0),), scale, 1)] * batch])
    return [predict_latency(device, model, workload, sampler.name, batch) for device in devices]


def _measure_engines(
    folder: Path,
    resolution: int | None,
    schedule: str | None,
    batch: int,
    guidance: float,
    devices: Sequence[Device],
    limits: MachineLimits | None,
    repeats: int,
    load_options: dict[str, Any],
) -> tuple[list[Prediction], list[StageUtilization]]:
    """Estimates for a directory's model, and what its engines reach here."""
    options: RequestOptions = {"guidance": guidance}
    if schedule is not None:
        options["schedule"] = schedule
    pipeline = TimedPipeline.open(folder, resolution, **load_options)
    with pipeline:
        subject = build_engine_subject(str(folder), pipeline, (), batch, options, conditioning="fresh")
        request = subject.request
        model = describe_model(pipeline.manifest, pipeline.resolution, request.vae)
        batches = pipeline.split_batches(request)
        parts = [request.conditions[part] for batch in batches for part in batch]
        workload = count_workload(
            model, request.sampler.plan, parts, [batch[-1].stop - batch[0].start for batch in batches]
        )
        predictions = [predict_latency(device, model, workload, request.sampler.name, batch) for device in devices]
        if limits is None or is_on_gpu(pipeline):  # the limits are the CPU's
            return predictions, []
        return predictions, compute_utilization(
            workload, measure_stages(subject.sample, repeats), limits, pipeline.precision
        )


def _build_json_report(
    predictions: Sequence[Prediction],
    limits: MachineLimits | None,
    utilization_by_name: dict[str, list[StageUtilization]],
) -> dict[str, Any]:
    return {
        "schema": 1,
        "estimates": [
            {**to_json(p), "device": {**to_json(p.device), "efficiency": p.device.efficiency}} for p in predictions
        ],
        "efficiency_notes": EFFICIENCY_NOTES,
        "measured": None if limits is None else to_json(limits),
        "achieved": {name: to_json(utilization) for name, utilization in utilization_by_name.items()},
    }
