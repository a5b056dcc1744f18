"""`flowturbo-calibrate constant`, `schedule`, `solver` and `study`: samplers that fit a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from calibration.cli.calibration_options import CalibrationGuidance, ModelOptions, format_command, parse_flow_times
from calibration.guidance_choice import Guidance
from calibration.plot import plot_front, plot_frozen, plot_trials
from calibration.samplers.block_search import average_grid, list_layouts, measure_costs, search_layouts
from calibration.samplers.controller_setting import fit_setting, make_rule_options
from calibration.samplers.probe import FIT_SEED, HELD_OUT_SEED, SamplerMeter, find_latents_cache, summarise_measurement
from calibration.samplers.result_files import check_sampler_output, make_sampler, store_sampler
from calibration.samplers.study import run_study
from flowturbo.plotting import check_matplotlib
from runtime.cli.command_base import Command, check_output_path, echo_json
from runtime.cli.dataclass_options import options
from runtime.cli.progress_display import show_progress
from runtime.cli.runner_options import PipelineOptions
from runtime.pipeline import Pipeline
from runtime.sampling.solvers import ADAPTIVE_RULES
from runtime.system.errors import RequestError
from runtime.system.json_codec import to_json
from runtime.system.option_fields import REQUIRED, argument, option
from runtime.system.progress import Progress


@dataclass(frozen=True)
class ResultOptions:
    """Where the result goes."""

    name: str | None = option(None, help="What the sampler is called.", default_text="made of the other options")
    out: Path | None = option(None, help="File of the sampler.", default_text="NAME.json")
    install: bool = option(True, "--install/--no-install", help="Also put it into the directory's manifest.")
    as_json: bool = option(False, "--json", help="Print the saved sampler and nothing else on stdout.")


def open_meters(
    pipeline: Pipeline, images: int, guidance: Guidance, progress: Progress
) -> tuple[SamplerMeter, SamplerMeter]:
    """Return the meter that a calibration looks at, and the one that decides in the end."""

    def make_meter(role: str, first_seed: int) -> SamplerMeter:
        progress.stage(f"a very fine run of {images} images, {role}; kept for the next time")
        cache = find_latents_cache()
        return SamplerMeter(pipeline, images, guidance, first_seed=first_seed, cache=cache, progress=progress)

    return make_meter("to look at", FIT_SEED), make_meter("held out", HELD_OUT_SEED)


@dataclass(frozen=True)
class ConstantOptions:
    """Which rule, and how many evaluations."""

    engines: Path = argument(REQUIRED)
    rule: str = option(REQUIRED, help="Of adaptive steps.", choices=tuple(ADAPTIVE_RULES))
    nfe: float = option(REQUIRED, help="Evaluations an image shall take, on average.", minimum=2, maximum=1000)
    images: int = option(256, help="Images that are looked at.", minimum=8, maximum=100_000)


@click.command(cls=Command)
@options(ConstantOptions, CalibrationGuidance, ResultOptions, PipelineOptions)
def constant(
    fitted: ConstantOptions, guidance: CalibrationGuidance, result: ResultOptions, load: PipelineOptions
) -> None:
    """Find the constant of the norm rule, or the tolerance of lte and blocks, that meets a number of evaluations."""

    engines, rule, nfe, images = fitted.engines, fitted.rule, fitted.nfe, fitted.images
    name, out, install, as_json = result.name, result.out, result.install, result.as_json
    guidance_settings = guidance.make_guidance()
    check_sampler_output(name, out)
    check_matplotlib("calibrate")
    with show_progress(quiet=as_json) as progress, load.load(engines) as pipeline:
        fit_meter, held_out_meter = open_meters(pipeline, images, guidance_settings, progress)
        fit = fit_setting(fit_meter, rule, nfe, progress)
        sampler_name = name or f"{rule}-{nfe:g}"
        held_out_result = held_out_meter.measure(**make_rule_options(rule, fit.setting))
        sampler = make_sampler(
            pipeline.manifest,
            sampler_name,
            "adaptive",
            guidance_settings,
            format_command(),
            has_refiner=rule == "blocks",
            rule=rule,
            setting=fit.setting,
            measured={
                "looked_at": summarise_measurement(fit.measurement),
                "held_out": summarise_measurement(held_out_result),
                "trials": fit.trials,
            },
        )
        plot_trials(locate_plot(sampler_name, out), fit.trials, ADAPTIVE_RULES[rule].parameter, nfe)
        progress.write(f"held out: {held_out_result.nfe:.2f} evaluations, error {held_out_result.error:.4f}")
        store_sampler(sampler, out, engines if install else None, progress)
    if as_json:
        echo_json(to_json(sampler))


@dataclass(frozen=True)
class ScheduleOptions:
    """What is frozen or searched."""

    engines: Path = argument(REQUIRED)
    steps: int | None = option(
        None, help="Freeze the mean schedule of adaptive steps to so many.", minimum=2, maximum=200
    )
    budget_ms: float | None = option(None, help="Search blocks and grids: the least error within so many ms an image.")
    target_error: float | None = option(None, help="Search blocks and grids: the fastest with at most this error.")
    tolerance: float = option(0.01, help="Of the adaptive steps that are frozen.", advanced=True)
    most_nfe: int | None = option(
        None,
        help="Of layouts that are tried.",
        minimum=3,
        maximum=50,
        default_text="12; not with --steps",
        advanced=True,
    )
    batch: int | None = option(
        None, help="Images at once, for the time.", minimum=1, default_text="1; not with --steps", advanced=True
    )
    images: int = option(256, help="Images that are looked at.", minimum=8, maximum=100_000)


@click.command(cls=Command)
@options(ScheduleOptions, CalibrationGuidance, ResultOptions, PipelineOptions)
def schedule(
    searched: ScheduleOptions, guidance: CalibrationGuidance, result: ResultOptions, load: PipelineOptions
) -> None:
    """Freeze what adaptive steps do on average, or search the best blocks and grid for this device."""

    engines, images, tolerance = searched.engines, searched.images, searched.tolerance
    steps, budget_ms, target_error = searched.steps, searched.budget_ms, searched.target_error
    most_nfe, batch = searched.most_nfe, searched.batch
    name, out, install, as_json = result.name, result.out, result.install, result.as_json
    if sum(value is not None for value in (steps, budget_ms, target_error)) != 1:
        raise RequestError(
            "what is wanted", allowed="one of --steps, --budget-ms and --target-error", remedy="for example --steps 8"
        )
    if steps is not None and (most_nfe, batch) != (None, None):
        raise RequestError(
            "--steps with --most-nfe or --batch", allowed="these with --budget-ms or --target-error, which search",
            remedy="leave them out",
        )  # fmt: skip
    guidance_settings = guidance.make_guidance()
    check_sampler_output(name, out)
    check_matplotlib("calibrate")
    with show_progress(quiet=as_json) as progress, load.load(engines) as pipeline:
        fit_meter, held_out_meter = open_meters(pipeline, images, guidance_settings, progress)
        progress.stage(f"the steps that {images} images take at tolerance {tolerance:g}")
        journals = fit_meter.measure(adaptive="lte", tolerance=tolerance).journals
        if steps is not None:
            sampler = _freeze_schedule(
                pipeline, held_out_meter, journals, steps, name, guidance_settings, out, progress
            )
        else:
            sampler = _search_schedule(
                pipeline,
                fit_meter,
                held_out_meter,
                journals,
                most_nfe or 12,
                batch or 1,
                budget_ms,
                target_error,
                name,
                guidance_settings,
                out,
                progress,
            )
        store_sampler(sampler, out, engines if install else None, progress)
    if as_json:
        echo_json(to_json(sampler))


def _freeze_schedule(
    pipeline: Pipeline,
    held_out_meter: SamplerMeter,
    journals: Sequence[Any],
    steps: int,
    name: str | None,
    guidance_settings: Guidance,
    out: Path | None,
    progress: Progress,
) -> Any:

    grid, blocks = average_grid(journals, steps), f"H1P{steps - 1}"
    uniform_result, frozen_result = (
        held_out_meter.measure(schedule=blocks),
        held_out_meter.measure(schedule=blocks, grid=grid),
    )
    progress.write(
        f"{blocks} on held-out seeds: {uniform_result.error:.4f} on a uniform grid, {frozen_result.error:.4f} "
        "on this one"
    )
    progress.write("grid: " + ", ".join(f"{t:.4f}" for t in grid))
    sampler_name = name or f"lte-{steps}"
    plot_frozen(locate_plot(sampler_name, out), grid, uniform_result.error, frozen_result.error)
    measured = {"uniform": summarise_measurement(uniform_result), "held_out": summarise_measurement(frozen_result)}
    return make_sampler(
        pipeline.manifest, sampler_name, "schedule", guidance_settings, format_command(), schedule=blocks, grid=grid,
        measured=measured,
    )  # fmt: skip


def _search_schedule(
    pipeline: Pipeline,
    fit_meter: SamplerMeter,
    held_out_meter: SamplerMeter,
    journals: Sequence[Any],
    most_nfe: int,
    batch: int,
    budget_ms: float | None,
    target_error: float | None,
    name: str | None,
    guidance_settings: Guidance,
    out: Path | None,
    progress: Progress,
) -> Any:

    costs = measure_costs(pipeline, guidance_settings.options, batch=batch)
    progress.write(
        f"on {pipeline.ran.device}: {costs.predictor_ms:.2f} ms a predictor evaluation, {costs.refiner_ms:.2f} ms a "
        f"refiner's, {costs.image_ms:.2f} ms beside them"
    )
    has_refiner = pipeline.manifest.model.refiner is not None
    candidates = list_layouts(most_nfe, has_refiner, lambda n: average_grid(journals, n))
    trials, front = search_layouts(fit_meter, costs, candidates, progress)
    for trial in front:
        progress.write(f"  {trial.ms:8.1f} ms  error {trial.measurement.error:.4f}  {trial.measurement.name}")
    affordable = [
        trial
        for trial in front
        if (budget_ms is None or trial.ms <= budget_ms)
        and (target_error is None or trial.measurement.error <= target_error)
    ]
    if not affordable:
        raise RequestError(
            f"no layout within {f'{budget_ms:g} ms' if budget_ms is not None else f'an error of {target_error:g}'}",
            allowed=f"{front[0].ms:.1f} ms and more, or an error of {front[-1].measurement.error:.4f} and more",
            remedy="allow more (--most-nfe allows more evaluations), or search a table: flowturbo-calibrate solver",
        )
    best = affordable[-1] if budget_ms is not None else affordable[0]
    held_out_result = held_out_meter.measure(schedule=best.layout.schedule, grid=best.layout.grid)
    published_result = (
        held_out_meter.measure(schedule="H1P5R3") if has_refiner else held_out_meter.measure(schedule="H1P6")
    )
    progress.write(
        f"held-out seeds: {best.measurement.name} {held_out_result.error:.4f}; {published_result.name} "
        f"{published_result.error:.4f}"
    )
    sampler_name = name or f"best-{best.ms:.0f}ms"
    plot_front(
        locate_plot(sampler_name, out),
        [(trial.ms, trial.measurement.error) for trial in trials],
        [(trial.ms, trial.measurement.error, trial.measurement.name) for trial in front],
        f"predicted ms per image, batch {batch}, {pipeline.ran.provider}",
    )
    return make_sampler(
        pipeline.manifest,
        sampler_name,
        "schedule",
        guidance_settings,
        format_command(),
        has_refiner="R" in best.layout.schedule,
        schedule=best.layout.schedule,
        grid=best.layout.grid,
        measured={
            "held_out": summarise_measurement(held_out_result),
            published_result.name: summarise_measurement(published_result),
            "ms_predicted": best.ms,
            "device": pipeline.ran.device,
            "front": [[trial.ms, trial.measurement.error, trial.measurement.name] for trial in front],
        },
    )


@dataclass(frozen=True)
class TableSearchOptions:
    """How a table is searched."""

    engines: Path | None = argument(None)
    nfe: int = option(REQUIRED, help="Predictor evaluations.", minimum=2, maximum=16)
    refiner_nfe: int = option(0, help="Refiner's, after them.", minimum=0, maximum=8)
    images: int = option(64, help="Images that are looked at.", minimum=2)
    batch: int = option(16, help="Images of one step.", minimum=1, advanced=True)
    steps: int = option(120, help="Steps of the search.", minimum=1, advanced=True)
    lr: float = option(0.03, help="Peak learning rate.", advanced=True)
    fine_steps: int = option(64, help="Heun steps aimed at.", minimum=4, advanced=True)
    seed: int = option(0, help="Of the order of the images.", advanced=True)
    restart: bool = option(False, help="Begin anew instead of going on with a search that was stopped.", advanced=True)


@click.command(cls=Command)
@options(TableSearchOptions, ModelOptions, CalibrationGuidance, ResultOptions)
def solver(
    searched: TableSearchOptions, model: ModelOptions, guidance: CalibrationGuidance, result: ResultOptions
) -> None:
    """Search step lengths and coefficients of a multistep table by gradient, against fine trajectories of the model.

    ENGINES, if named, gets the table; the search itself runs on the checkpoints, in PyTorch. A search that was
    stopped goes on where it was.
    """
    from calibration.samplers.search_job import calibrate_table
    from calibration.samplers.table_search import SearchConfig

    config = SearchConfig(
        nfe=searched.nfe,
        refiner_nfe=searched.refiner_nfe,
        images=searched.images,
        batch=min(searched.batch, searched.images),
        steps=searched.steps,
        lr=searched.lr,
        fine_steps=searched.fine_steps,
        seed=searched.seed,
    )
    with show_progress(quiet=result.as_json) as progress:
        sampler = calibrate_table(
            searched.engines,
            model.make_spec(guidance),
            config,
            result.name,
            result.out,
            restart=searched.restart,
            install=result.install,
            command=format_command(),
            progress=progress,
        )
    if result.as_json:
        echo_json(to_json(sampler))


@dataclass(frozen=True)
class StudyOptions:
    """What is studied, and where the page goes."""

    engines: Path = argument(REQUIRED)
    images: int = option(256, help="Seeds.", minimum=8)
    interval: tuple[float, float] = option(
        (0.3, 1.0), help="Guidance interval of the second half.", default_text="0.3,1", parse=parse_flow_times
    )
    out: Path = option(Path("samplers.md"), help="The page; plots go beside it.")
    figures: Path | None = option(None, help="Folder of the plots.", default_text="images/ beside the page")
    guidance: float | None = option(None, help="Guidance scale.", default_text="the directory's")


@click.command(cls=Command)
@options(StudyOptions, PipelineOptions)
def study(studied: StudyOptions, load: PipelineOptions) -> None:
    """Measure every sampler on an engine directory and write down how to choose."""

    images, out = studied.images, studied.out
    check_matplotlib("calibrate")
    check_output_path(out)
    full_guidance = CalibrationGuidance(studied.guidance).make_guidance()
    interval_guidance = replace(full_guidance, interval=studied.interval)
    with show_progress() as progress, load.load(studied.engines) as pipeline:
        run_study(
            pipeline,
            images,
            full_guidance,
            interval_guidance,
            out,
            studied.figures or out.parent / "images",
            format_command(),
            progress,
        )
        progress.write(f"written: {out}")


def locate_plot(name: str, out: Path | None) -> Path:
    """Where a calibration's plot goes: beside its file."""
    return (out or Path(f"{name}.json")).with_suffix(".png")
