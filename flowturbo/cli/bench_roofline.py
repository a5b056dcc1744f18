"""`flowturbo-bench roofline`: estimates for devices, and what engines reach of this machine's measured limits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from flowturbo.evaluation.speed.bench_job import is_on_gpu
from flowturbo.evaluation.speed.conditions import build_engine_subject
from flowturbo.evaluation.speed.devices import DEVICES, EFFICIENCY_NOTES
from flowturbo.evaluation.speed.macs import SIT_SIZES
from flowturbo.evaluation.speed.roofline import (
    Prediction,
    StageUtilization,
    compute_utilization,
    count_workload,
    describe_model,
    describe_released_model,
    find_device,
    measure_best_limits,
    measure_stages,
    predict_latency,
)
from flowturbo.evaluation.speed.terminal_tables import render_limits, render_roofline, render_utilization
from flowturbo.evaluation.speed.timed_pipeline import TimedPipeline
from runtime.cli.command_base import PATH, Command, echo_json
from runtime.cli.sampler_options import runner_options
from runtime.request import RequestOptions
from runtime.sampling.guidance import ImageCondition, check_guidance_scale
from runtime.sampling.sampler import SamplerChoice, resolve_sampler
from runtime.system.errors import RequestError
from runtime.system.json_codec import to_json

DEFAULT_SCHEDULES = ("H1P5R3", "H2P8R2")


@click.command(cls=Command)
@click.argument("engines", nargs=-1, type=PATH)
@click.option(
    "--model",
    "sizes",
    multiple=True,
    type=click.Choice(list(SIT_SIZES)),
    help="Released sizes of SiT, patch 2.  [default: all]",
)
@click.option("--schedule", "schedules", multiple=True, help="Schedules; may be repeated.  [default: H1P5R3, H2P8R2]")
@click.option(
    "--resolution", type=click.IntRange(16, 4096), help="Pixels a side.  [default: 256; of engines the first built]"
)
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1, 1024), help="Images at once.")
@click.option("--guidance", default=4.0, show_default=True, help="Scale; 1 halves the rows.")
@click.option("--device", "devices", multiple=True, help="A device of the table; may be repeated.  [default: all]")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure this machine's limits.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1, 1000), help="Runs of the engines.")
@runner_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def roofline(
    engines: tuple[Path, ...],
    sizes: tuple[str, ...],
    schedules: tuple[str, ...],
    resolution: int | None,
    batch: int,
    guidance: float,
    devices: tuple[str, ...],
    measure: bool,
    repeats: int,
    as_json: bool,
    **load: Any,
) -> None:
    """Estimate a picture's time on devices; measure what this machine reaches: flowturbo-bench roofline engines

    Estimates follow from published figures by a rule of thumb. With engine directories the table is of their models,
    and they are run here, beside a measured matrix product and memory copy.
    """
    if resolution is not None and resolution % 16:
        raise RequestError(f"resolution {resolution}", allowed="multiples of 16: patch 2 × 8 px per latent")
    scale, selected_devices = check_guidance_scale(guidance), [find_device(name) for name in devices] or list(DEVICES)
    if engines and sizes:
        raise RequestError("--model together with engine directories", remedy="name one or the other")
    limits = measure_best_limits() if measure else None
    predictions: list[Prediction] = []
    utilization_by_name: dict[str, list[StageUtilization]] = {}
    for folder in engines:
        for engine_schedule in schedules or (None,):
            options: RequestOptions = {"guidance": guidance, "schedule": engine_schedule}
            pipeline = TimedPipeline.open(folder, resolution, **load)
            with pipeline:
                subject = build_engine_subject(str(folder), pipeline, (), batch, options, conditioning="fresh")
                name, conditions = subject.condition.sampler, subject.request.conditions
                model = describe_model(pipeline.manifest, pipeline.resolution, subject.request.vae)
                batches = pipeline.split_batches(subject.request)
                parts = [conditions[part] for parts in batches for part in parts]
                decoded = [parts[-1].stop - parts[0].start for parts in batches]
                workload = count_workload(model, subject.request.sampler.plan, parts, decoded)
                predictions += [predict_latency(d, model, workload, name, batch) for d in selected_devices]
                if limits is not None and not is_on_gpu(pipeline):  # the limits are the CPU's
                    utilization_by_name[f"{folder} {name}"] = compute_utilization(
                        workload, measure_stages(subject.sample, repeats), limits, pipeline.precision
                    )
    for schedule in () if engines else schedules or DEFAULT_SCHEDULES:
        sampler = resolve_sampler(SamplerChoice(schedule=schedule))
        images = [ImageCondition(((0, 1.0),), scale, 1)] * batch
        for size in sizes or SIT_SIZES:
            model = describe_released_model(size, resolution or 256)
            workload = count_workload(model, sampler.plan, [images])
            predictions += [predict_latency(d, model, workload, sampler.name, batch) for d in selected_devices]
    if as_json:
        estimates = [
            {**to_json(p), "device": {**to_json(p.device), "efficiency": p.device.efficiency}} for p in predictions
        ]
        echo_json(
            {
                "schema": 1,
                "estimates": estimates,
                "efficiency_notes": EFFICIENCY_NOTES,
                "measured": None if limits is None else to_json(limits),
                "achieved": to_json(utilization_by_name),
            }
        )
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    resolution_text = "" if engines else f"{resolution or 256} px, "
    render_roofline(predictions, console, f"{resolution_text}batch {batch}, guidance {scale:g}")
    if limits is not None:
        render_limits(limits, console)
    for heading, utilization in utilization_by_name.items():
        render_utilization(heading, utilization, console)
