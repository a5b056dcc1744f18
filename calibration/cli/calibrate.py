"""`flowturbo-calibrate`: measures a model to deploy it better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calibration.cli.calibration_options import format_command, guidance_options, parse_guidance
from calibration.cli.lowbit_commands import int8, sensitivity
from export.cli.build_options import TIME_DIRECTIONS
from runtime.cli.command_base import PATH, F, Group, check_output_path, combine_options, echo_json
from runtime.cli.progress_display import show_progress
from runtime.cli.sampler_options import backend_options
from runtime.system.errors import RequestError
from runtime.system.version import VERSION

if TYPE_CHECKING:
    from calibration.guidance_choice import Guidance
    from calibration.samplers.probe import SamplerMeter
    from runtime.pipeline import Pipeline
    from runtime.system.progress import Progress


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION)
def main() -> None:
    """Measure a model to deploy it better: samplers that fit it, kept by name.

    \b
    flowturbo-calibrate schedule engines --steps 8 --name frozen8
    flowturbo-calibrate solver engines --nfe 6 --name fast6
    flowturbo-run --engine engines --class 207 --schedule fast6

    What is found is written to a small JSON file and into the engine directory's manifest. Everything is judged by
    the same-seed error: the distance of the latents from those of a very fine sampler, on seeds that were not used.
    """


def result_options(name: str) -> Callable[[F], F]:
    """Where the result goes."""
    return combine_options(
        click.option("--name", help=f"What the sampler is called.  [default: {name}]"),
        click.option("--out", type=PATH, help="File of the sampler.  [default: NAME.json]"),
        click.option("--install/--no-install", default=True, help="Also put it into the directory's manifest."),
        click.option("--json", "as_json", is_flag=True, help="Print the saved sampler and nothing else on stdout."),
    )


main.add_command(int8)
main.add_command(sensitivity)

ENGINES = click.argument("engines", type=PATH)
IMAGES = click.option(
    "--images", default=256, show_default=True, type=click.IntRange(8, 100_000), help="Images that are looked at."
)


def open_meters(
    pipeline: Pipeline, images: int, guidance: Guidance, progress: Progress
) -> tuple[SamplerMeter, SamplerMeter]:
    """Return the meter that a calibration looks at, and the one that decides in the end."""
    from calibration.samplers.probe import FIT_SEED, HELD_OUT_SEED, SamplerMeter, find_latents_cache

    def make_meter(role: str, first_seed: int) -> SamplerMeter:
        progress.stage(f"a very fine run of {images} images, {role}; kept for the next time")
        cache = find_latents_cache()
        return SamplerMeter(pipeline, images, guidance, first_seed=first_seed, cache=cache, progress=progress)

    return make_meter("to look at", FIT_SEED), make_meter("held out", HELD_OUT_SEED)


@main.command()
@ENGINES
@click.option("--rule", required=True, type=click.Choice(["norm", "lte", "blocks"]), help="Of adaptive steps.")
@click.option(
    "--nfe", required=True, type=click.FloatRange(2, 1000), help="Evaluations an image shall take, on average."
)
@IMAGES
@guidance_options
@result_options("RULE-NFE")
@backend_options
def constant(
    engines: Path,
    rule: str,
    nfe: float,
    images: int,
    guidance: float | None,
    guidance_channels: int | None,
    guidance_interval: str | None,
    name: str | None,
    out: Path | None,
    install: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the constant of the norm rule, or the tolerance of lte and blocks, that meets a number of evaluations."""
    from calibration.plot import plot_trials
    from calibration.samplers.controller_setting import fit_setting, make_rule_options
    from calibration.samplers.probe import summarise_measurement
    from calibration.samplers.result_files import check_sampler_output, make_sampler, store_sampler
    from flowturbo.plotting import check_matplotlib
    from runtime.pipeline import Pipeline
    from runtime.sampling.solvers import ADAPTIVE_RULES

    guidance_settings = parse_guidance(guidance, guidance_channels, guidance_interval)
    check_sampler_output(name, out)
    check_matplotlib("calibrate")
    with show_progress() as progress, Pipeline.load(engines, **options) as pipeline:
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
        echo_json(sampler_to_json(sampler))


@main.command()
@ENGINES
@click.option("--steps", type=click.IntRange(2, 200), help="Freeze the mean schedule of adaptive steps to so many.")
@click.option("--budget-ms", type=float, help="Search blocks and grids: the least error within so many ms an image.")
@click.option("--target-error", type=float, help="Search blocks and grids: the fastest with at most this error.")
@click.option("--tolerance", default=0.01, show_default=True, help="Of the adaptive steps that are frozen.")
@click.option(
    "--most-nfe", type=click.IntRange(3, 50), help="Of layouts that are tried.  [default: 12; not with --steps]"
)
@click.option("--batch", type=click.IntRange(1), help="Images at once, for the time.  [default: 1; not with --steps]")
@IMAGES
@guidance_options
@result_options("lte-N, or best-MSms")
@backend_options
def schedule(
    engines: Path,
    steps: int | None,
    budget_ms: float | None,
    target_error: float | None,
    tolerance: float,
    most_nfe: int | None,
    batch: int | None,
    images: int,
    guidance: float | None,
    guidance_channels: int | None,
    guidance_interval: str | None,
    name: str | None,
    out: Path | None,
    install: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Freeze what adaptive steps do on average, or search the best blocks and grid for this device."""
    from calibration.samplers.result_files import check_sampler_output, store_sampler
    from flowturbo.plotting import check_matplotlib
    from runtime.pipeline import Pipeline

    if sum(value is not None for value in (steps, budget_ms, target_error)) != 1:
        raise RequestError(
            "what is wanted", allowed="one of --steps, --budget-ms and --target-error", remedy="for example --steps 8"
        )
    if steps is not None and (most_nfe, batch) != (None, None):
        raise RequestError(
            "--steps with --most-nfe or --batch", allowed="these with --budget-ms or --target-error, which search",
            remedy="leave them out",
        )  # fmt: skip
    guidance_settings = parse_guidance(guidance, guidance_channels, guidance_interval)
    check_sampler_output(name, out)
    check_matplotlib("calibrate")
    with show_progress() as progress, Pipeline.load(engines, **options) as pipeline:
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
        echo_json(sampler_to_json(sampler))


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
    from calibration.plot import plot_frozen
    from calibration.samplers.block_search import average_grid
    from calibration.samplers.probe import summarise_measurement
    from calibration.samplers.result_files import make_sampler

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
    from calibration.plot import plot_front
    from calibration.samplers.block_search import average_grid, list_layouts, measure_costs, search_layouts
    from calibration.samplers.probe import summarise_measurement
    from calibration.samplers.result_files import make_sampler

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


@main.command()
@click.argument("engines", type=PATH, required=False)
@click.option("--nfe", required=True, type=click.IntRange(2, 16), help="Predictor evaluations.")
@click.option("--refiner-nfe", default=0, show_default=True, type=click.IntRange(0, 8), help="Refiner's, after them.")
@click.option("--predictor", type=PATH, help="Checkpoint of the SiT.  [default: the demo's]")
@click.option("--refiner", type=PATH, help="Checkpoint of its refiner.")
@click.option("--heads", type=int, help="Attention heads, for a width that no released model has.")
@click.option("--time-direction", type=TIME_DIRECTIONS, help="data-to-noise for REPA checkpoints.")
@click.option("--resolution", type=int, help="Pixels a side, where the checkpoint's own is not wanted.")
@click.option("--images", default=64, show_default=True, type=click.IntRange(2), help="Images that are looked at.")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1), help="Images of one step.")
@click.option("--steps", default=120, show_default=True, type=click.IntRange(1), help="Steps of the search.")
@click.option("--lr", default=0.03, show_default=True, help="Peak learning rate.")
@click.option("--fine-steps", default=64, show_default=True, type=click.IntRange(4), help="Heun steps aimed at.")
@click.option("--seed", default=0, show_default=True, help="Of the order of the images.")
@click.option("--restart", is_flag=True, help="Begin anew instead of going on with a search that was stopped.")
@guidance_options
@result_options("tuned-NFE")
def solver(
    engines: Path | None,
    predictor: Path | None,
    refiner: Path | None,
    heads: int | None,
    time_direction: str | None,
    resolution: int | None,
    restart: bool,
    guidance: float | None,
    guidance_channels: int | None,
    guidance_interval: str | None,
    name: str | None,
    out: Path | None,
    install: bool,
    as_json: bool,
    **search: Any,
) -> None:
    """Search step lengths and coefficients of a multistep table by gradient, against fine trajectories of the model.

    ENGINES, if named, gets the table; the search itself runs on the checkpoints, in PyTorch. A search that was
    stopped goes on where it was.
    """
    from calibration.model import ModelSpec
    from calibration.samplers.search_job import calibrate_table
    from calibration.samplers.table_search import SearchConfig

    search["batch"] = min(search["batch"], search["images"])
    guidance_settings = parse_guidance(guidance, guidance_channels, guidance_interval)
    model_spec = ModelSpec(predictor, refiner, heads, resolution, guidance_settings, time_direction)
    with show_progress() as progress:
        sampler = calibrate_table(
            engines,
            model_spec,
            SearchConfig(**search),
            name,
            out,
            restart=restart,
            install=install,
            command=format_command(),
            progress=progress,
        )
    if as_json:
        echo_json(sampler_to_json(sampler))


@main.command()
@ENGINES
@click.option("--images", default=256, show_default=True, type=click.IntRange(8), help="Seeds.")
@click.option("--interval", default="0.3,1", show_default=True, help="Guidance interval of the second half.")
@click.option("--out", default=Path("samplers.md"), show_default=True, type=PATH, help="The page; plots go beside it.")
@click.option("--figures", type=PATH, help="Folder of the plots.  [default: images/ beside the page]")
@click.option("--guidance", type=float, help="Guidance scale.  [default: the directory's]")
@backend_options
def study(
    engines: Path, images: int, interval: str, out: Path, figures: Path | None, guidance: float | None, **options: Any
) -> None:
    """Measure every sampler on an engine directory and write down how to choose."""
    from calibration.samplers.study import run_study
    from flowturbo.plotting import check_matplotlib
    from runtime.pipeline import Pipeline

    check_matplotlib("calibrate")
    check_output_path(out)
    full_guidance = parse_guidance(guidance, None, None)
    interval_guidance = replace(full_guidance, interval=parse_guidance(None, None, interval).interval)
    with show_progress() as progress, Pipeline.load(engines, **options) as pipeline:
        run_study(
            pipeline,
            images,
            full_guidance,
            interval_guidance,
            out,
            figures or out.parent / "images",
            format_command(),
            progress,
        )
        progress.write(f"written: {out}")


def locate_plot(name: str, out: Path | None) -> Path:
    """Where a calibration's plot goes: beside its file."""
    return (out or Path(f"{name}.json")).with_suffix(".png")


def sampler_to_json(sampler: Any) -> Any:
    """A saved sampler as its file has it."""
    from runtime.system.json_codec import to_json

    return to_json(sampler)


if __name__ == "__main__":
    main()
