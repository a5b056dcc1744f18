"""`flowturbo-calibrate int8` and `sensitivity`: what a low-precision build needs to know."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calibration.cli.calibration_options import format_command, guidance_options, parse_guidance
from export.cli.build_options import TIME_DIRECTIONS
from export.lowbit.ranges import CLIP_METHODS
from runtime.cli.command_base import PATH, Command, F, combine_options, echo_json
from runtime.cli.progress_display import show_progress
from runtime.system.errors import RequestError

if TYPE_CHECKING:
    from calibration.lowbit.quality_meter import QualityTarget
    from calibration.lowbit.trajectories import Deployment
    from export.lowbit.ranges import Ranges
    from runtime.system.progress import Progress

DEFAULT_PSNR_DB, MIN_FID_IMAGES = 35.0, 128
POSITIVE_NUMBER = click.FloatRange(0, min_open=True)


def model_options(function: F) -> F:
    """Which model, and how it will be sampled."""
    return combine_options(
        click.option("--predictor", type=PATH, help="Checkpoint of the SiT.  [default: the demo's]"),
        click.option("--refiner", type=PATH, help="Checkpoint of its refiner."),
        click.option(
            "--vae", "vaes", multiple=True, help="Decoders that pictures are judged by, as for build-engines."
        ),
        click.option("--heads", type=int, help="Attention heads, for a width that no released model has."),
        click.option("--time-direction", type=TIME_DIRECTIONS, help="data-to-noise for REPA checkpoints."),
        click.option("--resolution", type=int, help="Pixels a side, where the checkpoint's own is not wanted."),
        click.option("--schedule", help="Blocks such as H1P5R3.  [default: the model's own]"),
        click.option("--solver", help="A solver with fixed steps in place of a schedule."),
        click.option("--steps", type=click.IntRange(1, 1000), help="Steps of the solver."),
    )(function)


def pop_deployment(options: dict[str, Any], *, has_vaes: bool) -> Deployment:
    """The model and sampler of `model_options` and `guidance_options`, taken out of a command's options."""
    from calibration.lowbit.trajectories import load_deployment
    from calibration.model import ModelSpec
    from runtime.sampling.sampler import SamplerChoice

    guidance = parse_guidance(*(options.pop(name) for name in ("guidance", "guidance_channels", "guidance_interval")))
    model_spec = ModelSpec(
        predictor=options.pop("predictor"),
        refiner=options.pop("refiner"),
        heads=options.pop("heads"),
        resolution=options.pop("resolution"),
        guidance=guidance,
        time_direction=options.pop("time_direction"),
    )
    vaes = options.pop("vaes")
    sampler = {name: options.pop(name) for name in ("schedule", "solver", "steps")}
    choice = SamplerChoice(**sampler) if any(value is not None for value in sampler.values()) else None
    return load_deployment(model_spec, choice, vaes=vaes if has_vaes else ("none",))


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
    settings = measure_ranges.CalibrationSettings(samples, seed, batch)
    make_folder(out.absolute().parent)
    deployment = pop_deployment(options, has_vaes=False)
    with show_progress() as progress:
        ranges = measure_ranges.calibrate_int8(
            deployment, settings, out, progress, command=format_command(), resume=not restart
        )
    if as_json:
        echo_json(measure_ranges.ranges_to_json(ranges))
        return
    click.echo(measure_ranges.format_overview(ranges))
    click.echo(f"written: {out} (sha256 {ranges.sha256[:12]}…)")
    click.echo(f"use it: flowturbo-export build-engines --precision int8 --calibration {out} --out engines-int8")


def report_difference(ranges: Ranges, deployment: Deployment, progress: Progress) -> None:
    """Tells where a calibration was measured on another deployment than the one that is looked at now."""
    for name, current in deployment.settings.items():
        if (measured := ranges.record.settings.get(name)) != current:
            progress.write(
                f"note: the calibration was measured with {name.replace('_', ' ')} {measured}, this search uses "
                f"{current}"
            )


@click.command(cls=Command)
@model_options
@click.option("--precision", default="int8", show_default=True, type=click.Choice(["int8", "fp16"]), help="Low type.")
@click.option("--calibration", type=PATH, help="Ranges of flowturbo-calibrate int8; int8 needs them.")
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(CLIP_METHODS), help="Clips to compare.  [default: all]"
)
@click.option("--images", default=32, show_default=True, type=click.IntRange(1), help="Seeds that are looked at.")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1), help="Images at once.")
@click.option(
    "--target-psnr", type=POSITIVE_NUMBER, help="Median dB of the pictures that has to be kept.  [default: 35]"
)
@click.option("--target-rms", type=POSITIVE_NUMBER, help="Or the largest median distance of the latents.")
@click.option(
    "--target-fid", type=POSITIVE_NUMBER, help="Or, for the demo model, its FID over the exact model's, such as 1.03."
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
    from calibration.lowbit.quality_meter import QualityMeter, open_demo_fid
    from calibration.plot import plot_sensitivity
    from export.lowbit.choice import write_choice
    from flowturbo.plotting import check_matplotlib
    from runtime.system.files import make_folder
    from runtime.system.json_codec import to_json

    target = _parse_target(target_psnr, target_rms, target_fid, options["predictor"] is None, images)
    ranges = _read_calibration(precision, calibration)
    if out.suffix != ".json":
        raise RequestError(f"--out {out}", allowed="a file that ends in .json")
    check_matplotlib("calibrate")
    make_folder(out.absolute().parent)
    deployment = pop_deployment(options, has_vaes=target_rms is None)
    if ranges is not None:
        ranges.check_model(deployment.request.inputs, str(calibration))
    vae = next(iter(deployment.vaes), None)
    if target.latent_rms is None and vae is None:
        raise RequestError("a target of pictures without a decoder", remedy="name one with --vae, or use --target-rms")
    partial = out.with_suffix(".partial.npz")
    key = [precision, None if ranges is None else ranges.sha256]
    with show_progress() as progress, open_demo_fid() if target_fid is not None else nullcontext() as fid:
        if ranges is not None:
            report_difference(ranges, deployment, progress)
        meter = QualityMeter(deployment, images, batch, vae, partial, key, progress, fid=fid)
        if ranges is not None:
            result = sensitivity_search.search_int8(meter, ranges, target, methods or CLIP_METHODS, progress)
        else:
            result = sensitivity_search.search_fp16(meter, target, progress)
    sensitivity_search.check_target_reached(result, target)
    choice = sensitivity_search.make_choice(result, precision, deployment, ranges, target, format_command())
    write_choice(out, choice)
    distances = {name: quality.latent_rms for name, quality in result.alone.items()}
    plot_sensitivity(out.with_suffix(".png"), distances, f"{precision}, {images} images")
    partial.unlink(missing_ok=True)
    if as_json:
        echo_json({**to_json(choice), "sha256": choice.sha256})
        return
    for line in sensitivity_search.format_result(result):
        click.echo(line)
    calibration_option = f" --calibration {calibration}" if calibration else ""
    click.echo(f"use it: flowturbo-export build-engines --precision {precision}{calibration_option} --choice {out}")


def _parse_target(
    psnr: float | None, rms: float | None, fid: float | None, is_demo: bool, images: int
) -> QualityTarget:
    """The one target of a search.

    Raises:
        RequestError: more than one, or FID where it means nothing.
    """
    from calibration.lowbit.quality_meter import QualityTarget

    if sum(value is not None for value in (psnr, rms, fid)) > 1:
        raise RequestError("several targets", allowed="one of --target-psnr, --target-rms and --target-fid")
    if fid is not None and (not is_demo or images < MIN_FID_IMAGES):
        raise RequestError(
            f"--target-fid with {images} images{'' if is_demo else ' of a model of your own'}",
            allowed=f"the demo model and {MIN_FID_IMAGES} images at least",
            remedy="use --target-psnr, or judge your own pictures with flowturbo-eval score",
        )
    return QualityTarget(DEFAULT_PSNR_DB if psnr is None and rms is None and fid is None else psnr, rms, fid)


def _read_calibration(precision: str, calibration: Path | None) -> Ranges | None:
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
