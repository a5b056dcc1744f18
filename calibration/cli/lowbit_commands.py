"""`flowturbo-calibrate int8` and `sensitivity`: what a low-precision build needs to know."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calibration.cli.calibration_options import command, guidance_of, guidance_options, say
from export.cli.build_options import DIRECTIONS
from export.lowbit.ranges import METHODS
from runtime.cli.command_base import PATH, Command, F, echo_json, stack
from runtime.system.errors import RequestError

if TYPE_CHECKING:
    from calibration.lowbit.quality_meter import Target
    from calibration.lowbit.trajectories import Deployment
    from export.lowbit.ranges import Ranges

DEFAULT_PSNR_DB, LEAST_FID_IMAGES = 35.0, 128
ABOVE_ZERO = click.FloatRange(0, min_open=True)


def model_options(function: F) -> F:
    """Which model, and how it will be sampled."""
    return stack(
        click.option("--predictor", type=PATH, help="Checkpoint of the SiT.  [default: the demo's]"),
        click.option("--refiner", type=PATH, help="Checkpoint of its refiner."),
        click.option(
            "--vae", "vaes", multiple=True, help="Decoders that pictures are judged by, as for build-engines."
        ),
        click.option("--heads", type=int, help="Attention heads, for a width that no released model has."),
        click.option("--time-direction", type=DIRECTIONS, help="data-to-noise for REPA checkpoints."),
        click.option("--resolution", type=int, help="Pixels a side, where the checkpoint's own is not wanted."),
        click.option("--schedule", help="Blocks such as H1P5R3.  [default: the model's own]"),
        click.option("--solver", help="A solver with fixed steps in place of a schedule."),
        click.option("--steps", type=click.IntRange(1, 1000), help="Steps of the solver."),
    )(function)


def deployment_of(options: dict[str, Any], *, pictures: bool) -> Deployment:
    """The model and sampler of `model_options` and `guidance_options`, taken out of a command's options."""
    from calibration.lowbit.trajectories import load_deployment
    from calibration.samplers.search_job import Wanted

    guidance = guidance_of(*(options.pop(name) for name in ("guidance", "guidance_channels", "guidance_interval")))
    wanted = Wanted(
        predictor=options.pop("predictor"),
        refiner=options.pop("refiner"),
        heads=options.pop("heads"),
        resolution=options.pop("resolution"),
        guidance=guidance,
        time_direction=options.pop("time_direction"),
    )
    vaes = options.pop("vaes")
    sampler = {name: options.pop(name) for name in ("schedule", "solver", "steps")}
    return load_deployment(wanted, sampler, vaes=vaes if pictures else ("none",))


@click.command(cls=Command)
@model_options
@click.option("--samples", default=64, show_default=True, type=int, help="Images whose trajectories are looked at.")
@click.option("--batch", default=8, show_default=True, type=int, help="Images at once.")
@click.option("--seed", default=0, show_default=True, type=int, help="First seed.")
@click.option("--out", required=True, type=PATH, help="The calibration, a .npz file.")
@click.option("--restart", is_flag=True, help="Begin anew instead of going on with a run that was stopped.")
@click.option("--json", "as_json", is_flag=True, help="Print the record and the clips and nothing else on stdout.")
@guidance_options
def int8(samples: int, batch: int, seed: int, out: Path, restart: bool, as_json: bool, **options: Any) -> None:
    """Measure what the layers of a model read on real trajectories, for build-engines --precision int8.

    Runs the schedule, guidance and classes of the deployment in PyTorch, both branches, twice: ranges by channel and
    flow time, clips by four methods, and equalisers. A run that was stopped goes on with the same command.
    """
    from calibration.lowbit import measure_ranges
    from runtime.system.files import make_folder

    if out.suffix != ".npz":
        raise RequestError(f"--out {out}", allowed="a file that ends in .npz")
    settings = measure_ranges.Settings(samples, seed, batch)
    make_folder(out.absolute().parent)
    deployment = deployment_of(options, pictures=False)
    ranges = measure_ranges.calibrate(deployment, settings, out, say, command=command(), resume=not restart)
    if as_json:
        echo_json(measure_ranges.as_json(ranges))
        return
    click.echo(measure_ranges.overview(ranges))
    click.echo(f"written: {out} (sha256 {ranges.sha256[:12]}…)")
    click.echo(f"use it: flowturbo-export build-engines --precision int8 --calibration {out} --out engines-int8")


def say_difference(ranges: Ranges, deployment: Deployment) -> None:
    """Tells where a calibration was measured on another deployment than the one that is looked at now."""
    for name, now in deployment.settings.items():
        if (then := ranges.record.settings.get(name)) != now:
            say(f"note: the calibration was measured with {name.replace('_', ' ')} {then}, this search uses {now}")


@click.command(cls=Command)
@model_options
@click.option("--precision", default="int8", show_default=True, type=click.Choice(["int8", "fp16"]), help="Low type.")
@click.option("--calibration", type=PATH, help="Ranges of flowturbo-calibrate int8; int8 needs them.")
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(METHODS), help="Clips to compare.  [default: all]"
)
@click.option("--images", default=32, show_default=True, type=click.IntRange(1), help="Seeds that are looked at.")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1), help="Images at once.")
@click.option("--target-psnr", type=ABOVE_ZERO, help="Median dB of the pictures that has to be kept.  [default: 35]")
@click.option("--target-rms", type=ABOVE_ZERO, help="Or the largest median distance of the latents.")
@click.option(
    "--target-fid", type=ABOVE_ZERO, help="Or, for the demo model, its FID over the exact model's, such as 1.03."
)
@click.option("--out", required=True, type=PATH, help="The choice, a .json file; a plot goes beside it.")
@click.option("--json", "as_json", is_flag=True, help="Print the choice and nothing else on stdout.")
@guidance_options
def sensitivity(
    precision: str,
    calibration: Path | None,
    methods: tuple[str, ...],
    images: int,
    batch: int,
    target_psnr: float | None,
    target_rms: float | None,
    target_fid: float | None,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what every layer costs in quality when it is quantised, and choose what stays wide.

    Whole trajectories and pictures from the same seeds, with one layer, one block, or a choice of layers rounded as
    the engine rounds them. The choice is for build-engines --choice. With --precision fp16 the same search finds the
    layers, softmaxes and decoders that need float32. A search that was stopped goes on with the same command.
    """
    from calibration.lowbit import sensitivity as sensitivity_search
    from calibration.lowbit.quality_meter import Judge, demo_fid
    from calibration.plot import plot_sensitivity
    from export.lowbit.choice import write_choice
    from flowturbo.plotting import check_matplotlib
    from runtime.system.files import make_folder
    from runtime.system.json_codec import to_json

    target = _target(target_psnr, target_rms, target_fid, options["predictor"] is None, images)
    ranges = _ranges(precision, calibration)
    if out.suffix != ".json":
        raise RequestError(f"--out {out}", allowed="a file that ends in .json")
    check_matplotlib("calibrate")
    make_folder(out.absolute().parent)
    deployment = deployment_of(options, pictures=target_rms is None)
    if ranges is not None:
        ranges.check_model(deployment.request.inputs, str(calibration))
        say_difference(ranges, deployment)
    vae = next(iter(deployment.vaes), None)
    if target.latent_rms is None and vae is None:
        raise RequestError("a target of pictures without a decoder", remedy="name one with --vae, or use --target-rms")
    partial = out.with_suffix(".partial.json")
    key = [precision, None if ranges is None else ranges.sha256]
    with demo_fid() if target_fid is not None else nullcontext() as fid:
        judge = Judge(deployment, images, batch, vae, partial, key, say, fid=fid)
        if ranges is not None:
            found = sensitivity_search.search_int8(judge, ranges, target, methods or METHODS, say)
        else:
            found = sensitivity_search.search_fp16(judge, target, say)
    sensitivity_search.check_reached(found, target)
    choice = sensitivity_search.choice_of(found, precision, deployment, ranges, target, command())
    write_choice(out, choice)
    plot_sensitivity(out.with_suffix(".png"), found.alone, f"{precision}, {images} images")
    partial.unlink(missing_ok=True)
    if as_json:
        echo_json({**to_json(choice), "sha256": choice.sha256})
        return
    for line in sensitivity_search.table(found):
        click.echo(line)
    using = f" --calibration {calibration}" if calibration else ""
    click.echo(f"use it: flowturbo-export build-engines --precision {precision}{using} --choice {out}")


def _target(psnr: float | None, rms: float | None, fid: float | None, is_demo: bool, images: int) -> Target:
    """The one target of a search.

    Raises:
        RequestError: more than one, or FID where it means nothing.
    """
    from calibration.lowbit.quality_meter import Target

    if sum(value is not None for value in (psnr, rms, fid)) > 1:
        raise RequestError("several targets", allowed="one of --target-psnr, --target-rms and --target-fid")
    if fid is not None and (not is_demo or images < LEAST_FID_IMAGES):
        raise RequestError(
            f"--target-fid with {images} images{'' if is_demo else ' of a model of your own'}",
            allowed=f"the demo model and {LEAST_FID_IMAGES} images at least",
            remedy="use --target-psnr, or judge your own pictures with flowturbo-eval score",
        )
    return Target(DEFAULT_PSNR_DB if psnr is None and rms is None and fid is None else psnr, rms, fid)


def _ranges(precision: str, calibration: Path | None) -> Ranges | None:
    from export.lowbit.ranges import read_ranges

    if precision == "int8":
        if calibration is None:
            raise RequestError(
                "int8 without a calibration", remedy="measure one: flowturbo-calibrate int8 --out ranges.npz"
            )
        return read_ranges(calibration)
    if calibration is not None:
        raise RequestError("--calibration with --precision fp16", allowed="--precision int8, which has clips")
    return None
