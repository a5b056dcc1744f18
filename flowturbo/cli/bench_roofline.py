"""`flowturbo-bench roofline`: estimates for devices, and what engines reach of this machine's measured limits."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from flowturbo.evaluation.load_options import make_load_options
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
from runtime.cli.command_base import Command, echo_json
from runtime.cli.dataclass_options import options
from runtime.cli.runner_options import RunnerOptions
from runtime.request import RequestOptions
from runtime.sampling.guidance import ImageCondition, check_guidance_scale
from runtime.sampling.sampler import SamplerChoice, resolve_sampler
from runtime.system.errors import RequestError
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
    resolution, batch, guidance, load_options = roof.resolution, roof.batch, roof.guidance, make_load_options(runner)
    if resolution is not None and resolution % 16:
        raise RequestError(f"resolution {resolution}", allowed="multiples of 16: patch 2 × 8 px per latent")
    scale = check_guidance_scale(guidance)
    selected_devices = [find_device(name) for name in roof.devices] or list(DEVICES)
    if engines and sizes:
        raise RequestError("--model together with engine directories", remedy="name one or the other")
    limits = measure_best_limits() if roof.measure else None
    predictions: list[Prediction] = []
    utilization_by_name: dict[str, list[StageUtilization]] = {}
    for folder in engines:
        for engine_schedule in schedules or (None,):
            request_options: RequestOptions = {"guidance": guidance, "schedule": engine_schedule}
            pipeline = TimedPipeline.open(folder, resolution, **load_options)
            with pipeline:
                subject = build_engine_subject(str(folder), pipeline, (), batch, request_options, conditioning="fresh")
                name, conditions = subject.condition.sampler, subject.request.conditions
                model = describe_model(pipeline.manifest, pipeline.resolution, subject.request.vae)
                batches = pipeline.split_batches(subject.request)
                parts = [conditions[part] for parts in batches for part in parts]
                decoded = [parts[-1].stop - parts[0].start for parts in batches]
                workload = count_workload(model, subject.request.sampler.plan, parts, decoded)
                predictions += [predict_latency(d, model, workload, name, batch) for d in selected_devices]
                if limits is not None and not is_on_gpu(pipeline):  # the limits are the CPU's
                    utilization_by_name[f"{folder} {name}"] = compute_utilization(
                        workload, measure_stages(subject.sample, roof.repeats), limits, pipeline.precision
                    )
    for schedule in () if engines else schedules or DEFAULT_SCHEDULES:
        sampler = resolve_sampler(SamplerChoice(schedule=schedule))
        images = [ImageCondition(((0, 1.0),), scale, 1)] * batch
        for size in sizes or SIT_SIZES:
            model = describe_released_model(size, resolution or 256)
            workload = count_workload(model, sampler.plan, [images])
            predictions += [predict_latency(d, model, workload, sampler.name, batch) for d in selected_devices]
    if roof.as_json:
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
