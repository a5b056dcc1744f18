"""`flowturbo-calibrate`: measures a model to deploy it better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calibration.cli.calibration_options import command, guidance_of, guidance_options, say
from calibration.cli.lowbit_commands import int8, sensitivity
from export.cli.build_options import DIRECTIONS
from runtime.cli.command_base import PATH, F, Group, check_output, echo_json, stack
from runtime.cli.sampler_options import backend_options
from runtime.system.errors import RequestError
from runtime.system.version import VERSION

if TYPE_CHECKING:
    from calibration.samplers.probe import Guidance, Probe
    from runtime.pipeline import Pipeline


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
    return stack(
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


def probes(pipeline: Pipeline, images: int, guidance: Guidance) -> tuple[Probe, Probe]:
    """What a calibration looks at, and what decides in the end."""
    from calibration.samplers.probe import FITTED, HELD_OUT, Probe, tenths
    from runtime.system.hashes import cache_folder

    def make(what: str, first: int) -> Probe:
        say(f"a very fine run of {images} images ({what}); kept for the next time")
        cache = cache_folder()
        return Probe(
            pipeline,
            images,
            guidance,
            first_seed=first,
            cache=None if cache is None else cache / "calibration",
            report=tenths(say),
        )

    return make("to look at", FITTED), make("held out", HELD_OUT)


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
    from calibration.samplers.controller_setting import fit_setting
    from calibration.samplers.probe import summary
    from calibration.samplers.result_files import check_result, keep, new_saved
    from flowturbo.plotting import check_matplotlib
    from runtime.pipeline import Pipeline
    from runtime.sampling.solvers import RULES

    how = guidance_of(guidance, guidance_channels, guidance_interval)
    check_result(name, out)
    check_matplotlib("calibrate")
    with Pipeline.load(engines, **options) as pipeline:
        looked, held_out = probes(pipeline, images, how)
        fitted = fit_setting(looked, rule, nfe, say)
        called = name or f"{rule}-{nfe:g}"
        setting = {"constant" if rule == "norm" else "tolerance": fitted.setting}
        decided = held_out.measure(adaptive=rule, **setting)
        saved = new_saved(
            pipeline.manifest,
            called,
            "adaptive",
            how,
            command(),
            refiner=rule == "blocks",
            rule=rule,
            setting=fitted.setting,
            measured={"looked_at": summary(fitted.measured), "held_out": summary(decided), "trials": fitted.trials},
        )
    plot_trials(picture_of(called, out), fitted.trials, RULES[rule].setting, nfe)
    say(f"held out: {decided.predictor + decided.refiner:.2f} evaluations, error {decided.error:.4f}")
    keep(saved, out, engines if install else None, say)
    if as_json:
        echo_json(saved_json(saved))


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
    from calibration.samplers.result_files import check_result, keep
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
    how = guidance_of(guidance, guidance_channels, guidance_interval)
    check_result(name, out)
    check_matplotlib("calibrate")
    with Pipeline.load(engines, **options) as pipeline:
        looked, held_out = probes(pipeline, images, how)
        say(f"the steps that {images} images take at tolerance {tolerance:g}")
        journals = looked.measure(adaptive="lte", tolerance=tolerance).journals
        if steps is not None:
            saved = _frozen(pipeline, held_out, journals, steps, name, how, out)
        else:
            saved = _searched(
                pipeline,
                looked,
                held_out,
                journals,
                most_nfe or 12,
                batch or 1,
                budget_ms,
                target_error,
                name,
                how,
                out,
            )
    keep(saved, out, engines if install else None, say)
    if as_json:
        echo_json(saved_json(saved))


def _frozen(
    pipeline: Pipeline,
    held_out: Probe,
    journals: Sequence[Any],
    steps: int,
    name: str | None,
    how: Guidance,
    out: Path | None,
) -> Any:
    from calibration.plot import plot_frozen
    from calibration.samplers.block_search import mean_schedule
    from calibration.samplers.probe import summary
    from calibration.samplers.result_files import new_saved

    grid, blocks = mean_schedule(journals, steps), f"H1P{steps - 1}"
    before, after = held_out.measure(schedule=blocks), held_out.measure(schedule=blocks, grid=grid)
    say(f"{blocks} on held-out seeds: {before.error:.4f} on a uniform grid, {after.error:.4f} on this one")
    say("grid: " + ", ".join(f"{t:.4f}" for t in grid))
    called = name or f"lte-{steps}"
    plot_frozen(picture_of(called, out), grid, before.error, after.error)
    measured = {"uniform": summary(before), "held_out": summary(after)}
    return new_saved(
        pipeline.manifest, called, "schedule", how, command(), schedule=blocks, grid=grid,
        measured=measured,
    )  # fmt: skip


def _searched(
    pipeline: Pipeline,
    looked: Probe,
    held_out: Probe,
    journals: Sequence[Any],
    most_nfe: int,
    batch: int,
    budget_ms: float | None,
    target_error: float | None,
    name: str | None,
    how: Guidance,
    out: Path | None,
) -> Any:
    from calibration.plot import plot_front
    from calibration.samplers.block_search import layouts, mean_schedule, measure_costs, search_layouts
    from calibration.samplers.probe import summary
    from calibration.samplers.result_files import new_saved

    costs = measure_costs(pipeline, how.options, batch=batch)
    say(
        f"on {pipeline.ran.device}: {costs.predictor:.2f} ms a predictor evaluation, {costs.refiner:.2f} ms a "
        f"refiner's, {costs.image:.2f} ms beside them"
    )
    with_refiner = pipeline.manifest.model.refiner is not None
    candidates = layouts(most_nfe, with_refiner, lambda n: mean_schedule(journals, n))
    tried, front = search_layouts(looked, costs, candidates, say)
    for one in front:
        say(f"  {one.ms:8.1f} ms  error {one.measured.error:.4f}  {one.measured.name}")
    fitting = [
        one
        for one in front
        if (budget_ms is None or one.ms <= budget_ms) and (target_error is None or one.measured.error <= target_error)
    ]
    if not fitting:
        raise RequestError(
            f"no layout within {f'{budget_ms:g} ms' if budget_ms is not None else f'an error of {target_error:g}'}",
            allowed=f"{front[0].ms:.1f} ms and more, or an error of {front[-1].measured.error:.4f} and more",
            remedy="allow more (--most-nfe allows more evaluations), or search a table: flowturbo-calibrate solver",
        )
    chosen = fitting[-1] if budget_ms is not None else fitting[0]
    decided = held_out.measure(schedule=chosen.layout.schedule, grid=chosen.layout.grid)
    published = held_out.measure(schedule="H1P5R3") if with_refiner else held_out.measure(schedule="H1P6")
    say(f"held-out seeds: {chosen.measured.name} {decided.error:.4f}; {published.name} {published.error:.4f}")
    called = name or f"best-{chosen.ms:.0f}ms"
    plot_front(
        picture_of(called, out),
        [(one.ms, one.measured.error) for one in tried],
        [(one.ms, one.measured.error, one.measured.name) for one in front],
        f"predicted ms per image, batch {batch}, {pipeline.ran.provider}",
    )
    return new_saved(
        pipeline.manifest,
        called,
        "schedule",
        how,
        command(),
        refiner="R" in chosen.layout.schedule,
        schedule=chosen.layout.schedule,
        grid=chosen.layout.grid,
        measured={
            "held_out": summary(decided),
            published.name: summary(published),
            "ms_predicted": chosen.ms,
            "device": pipeline.ran.device,
            "front": [[one.ms, one.measured.error, one.measured.name] for one in front],
        },
    )


@main.command()
@click.argument("engines", type=PATH, required=False)
@click.option("--nfe", required=True, type=click.IntRange(2, 16), help="Predictor evaluations.")
@click.option("--refiner-nfe", default=0, show_default=True, type=click.IntRange(0, 8), help="Refiner's, after them.")
@click.option("--predictor", type=PATH, help="Checkpoint of the SiT.  [default: the demo's]")
@click.option("--refiner", type=PATH, help="Checkpoint of its refiner.")
@click.option("--heads", type=int, help="Attention heads, for a width that no released model has.")
@click.option("--time-direction", type=DIRECTIONS, help="data-to-noise for REPA checkpoints.")
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
    from calibration.samplers.search_job import Wanted, find

    search["batch"] = min(search["batch"], search["images"])
    scale = guidance_of(guidance, guidance_channels, guidance_interval)
    wanted = Wanted(predictor, refiner, heads, resolution, scale, time_direction)
    saved = find(engines, wanted, search, name, out, restart=restart, install=install, command=command(), say=say)
    if as_json:
        echo_json(saved_json(saved))


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
    check_output(out)
    how = guidance_of(guidance, None, None)
    within = replace(how, interval=guidance_of(None, None, interval).interval)
    with Pipeline.load(engines, **options) as pipeline:
        run_study(pipeline, images, how, within, out, figures or out.parent / "images", command(), say)
    say(f"written: {out}")


def picture_of(name: str, out: Path | None) -> Path:
    """Where a calibration's plot goes: beside its file."""
    return (out or Path(f"{name}.json")).with_suffix(".png")


def saved_json(saved: Any) -> Any:
    """A saved sampler as its file has it."""
    from runtime.system.json_codec import to_json

    return to_json(saved)


if __name__ == "__main__":
    main()
