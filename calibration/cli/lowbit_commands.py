"""`flowturbo-calibrate int8` and `sensitivity`: what a low-precision build needs to know."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from calibration.cli.calibration_options import CalibrationGuidance, ModelOptions, format_command
from calibration.lowbit import measure_ranges
from calibration.lowbit import sensitivity as sensitivity_search
from calibration.lowbit.quality_meter import QualityMeter, QualityTarget, open_demo_fid
from calibration.lowbit.trajectories import Deployment, load_deployment
from calibration.plot import plot_sensitivity
from export.lowbit.choice import write_choice
from export.lowbit.ranges import CLIP_METHODS, Ranges, read_ranges
from flowturbo.plotting import check_matplotlib
from runtime.cli.command_base import Command, echo_json
from runtime.cli.dataclass_options import OptionDefaults, options
from runtime.cli.progress_display import show_progress
from runtime.sampling.sampler import NAME_FIELDS, SamplerChoice
from runtime.system.errors import RequestError
from runtime.system.files import make_folder
from runtime.system.json_codec import to_json
from runtime.system.option_fields import REQUIRED, option

DEFAULT_PSNR_DB, MIN_FID_IMAGES = 35.0, 128


@dataclass(frozen=True)
class DeploymentOptions(ModelOptions):
    """Which model, and how it will be sampled."""

    vaes: tuple[str, ...] = option((), "--vae", help="Decoders that pictures are compared with, as for build-engines.")

    def load(self, sampler: SamplerChoice, guidance: CalibrationGuidance, *, has_vaes: bool) -> Deployment:
        """Load the model with the sampler and the guidance that it will be deployed with."""
        choice = None if sampler == SamplerChoice() else sampler
        return load_deployment(self.make_spec(guidance), choice, vaes=self.vaes if has_vaes else ("none",))


SAMPLER_NAME = OptionDefaults(SamplerChoice(), only=NAME_FIELDS)


@dataclass(frozen=True)
class Int8Options:
    """What is measured, and where it goes."""

    samples: int = option(64, help="Images whose trajectories are looked at.")
    batch: int = option(8, help="Images at once.", advanced=True)
    seed: int = option(0, help="First seed.", advanced=True)
    out: Path = option(REQUIRED, help="The calibration, a .npz file.")
    restart: bool = option(False, help="Begin anew instead of going on with a run that was stopped.", advanced=True)
    as_json: bool = option(False, "--json", help="Print the record and the clips and nothing else on stdout.")


@click.command(cls=Command)
@options(Int8Options, DeploymentOptions, SAMPLER_NAME, CalibrationGuidance)
def int8(
    measured: Int8Options, model: DeploymentOptions, sampler: SamplerChoice, guidance: CalibrationGuidance
) -> None:
    """Measure what the layers of a model read on real trajectories, for build-engines --precision int8.

    Runs the schedule, guidance and classes of the deployment in PyTorch, both branches, twice: ranges by channel and
    flow time, clips by four methods, and equalisers. A run that was stopped goes on with the same command.
    """
    out, restart, as_json = measured.out, measured.restart, measured.as_json
    if out.suffix != ".npz":
        raise RequestError(f"--out {out}", allowed="a file that ends in .npz")
    settings = measure_ranges.CalibrationSettings(measured.samples, measured.seed, measured.batch)
    make_folder(out.absolute().parent)
    deployment = model.load(sampler, guidance, has_vaes=False)
    with show_progress(quiet=as_json) as progress:
        ranges = measure_ranges.calibrate_int8(
            deployment, settings, out, progress, command=format_command(), resume=not restart
        )
    if as_json:
        echo_json(measure_ranges.ranges_to_json(ranges))
        return
    click.echo(measure_ranges.format_overview(ranges))
    click.echo(f"written: {out} (sha256 {ranges.sha256[:12]}…)")
    click.echo(f"use it: flowturbo-export build-engines --precision int8 --calibration {out} --out engines-int8")


def report_difference(ranges: Ranges, deployment: Deployment) -> None:
    """Say on stderr, under --json too, where a calibration was measured on another deployment than this one."""
    for name, current in deployment.settings.items():
        if (measured := ranges.record.settings.get(name)) != current:
            click.echo(
                f"note: the calibration was measured with {name.replace('_', ' ')} {measured}, this search uses "
                f"{current}",
                err=True,
            )


@dataclass(frozen=True)
class SensitivityOptions:
    """What is measured, what has to be reached, and where the choice goes."""

    precision: Literal["int8", "fp16"] = option("int8", help="Low type.")
    calibration: Path | None = option(None, help="Ranges of flowturbo-calibrate int8; int8 needs them.")
    methods: tuple[str, ...] = option(
        (), "--method", help="Clips to compare.", choices=CLIP_METHODS, default_text="all", advanced=True
    )
    images: int = option(32, help="Seeds that are looked at.", minimum=1)
    batch: int = option(16, help="Images at once.", minimum=1, advanced=True)
    target_psnr: float | None = option(
        None,
        help="Median dB of the pictures that has to be kept.",
        minimum=0,
        is_open=True,
        default_text=f"{DEFAULT_PSNR_DB:g}",
    )
    target_rms: float | None = option(
        None, help="Or the largest median distance of the latents.", minimum=0, is_open=True
    )
    target_fid: float | None = option(
        None,
        help="Or, for the demo model, its FID over the exact model's, such as 1.03.",
        minimum=0,
        is_open=True,
        advanced=True,
    )
    out: Path = option(REQUIRED, help="The choice, a .json file; a plot goes beside it.")
    as_json: bool = option(False, "--json", help="Print the choice and nothing else on stdout.")


@click.command(cls=Command)
@options(SensitivityOptions, DeploymentOptions, SAMPLER_NAME, CalibrationGuidance)
def sensitivity(
    searched: SensitivityOptions, model: DeploymentOptions, sampler: SamplerChoice, guidance: CalibrationGuidance
) -> None:
    """Measure what every layer costs in quality when it is quantised, and choose what stays wide.

    Whole trajectories and pictures from the same seeds, with one layer, one block, or a choice of layers rounded as
    the engine rounds them. The choice is for build-engines --choice. With --precision fp16 the same search finds the
    layers, softmaxes and decoders that need float32. A search that was stopped goes on with the same command.
    """
    precision, calibration, methods = searched.precision, searched.calibration, searched.methods
    images, batch, out, as_json = searched.images, searched.batch, searched.out, searched.as_json
    target_rms, target_fid = searched.target_rms, searched.target_fid
    target = _parse_target(searched.target_psnr, target_rms, target_fid, model.predictor is None, images)
    ranges = _read_calibration(precision, calibration)
    if out.suffix != ".json":
        raise RequestError(f"--out {out}", allowed="a file that ends in .json")
    check_matplotlib("calibrate")
    make_folder(out.absolute().parent)
    deployment = model.load(sampler, guidance, has_vaes=target_rms is None)
    if ranges is not None:
        ranges.check_model(deployment.request.inputs, str(calibration))
    vae = next(iter(deployment.vaes), None)
    if target.latent_rms is None and vae is None:
        raise RequestError("a target of pictures without a decoder", remedy="name one with --vae, or use --target-rms")
    partial = out.with_suffix(".partial.npz")
    key = [precision, None if ranges is None else ranges.sha256]
    with show_progress(quiet=as_json) as progress, open_demo_fid() if target_fid is not None else nullcontext() as fid:
        if ranges is not None:
            report_difference(ranges, deployment)
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
    if precision == "int8":
        if calibration is None:
            raise RequestError(
                "int8 without a calibration", remedy="measure one: flowturbo-calibrate int8 --out ranges.npz"
            )
        return read_ranges(calibration)
    if calibration is not None:
        raise RequestError("--calibration with --precision fp16", allowed="--precision int8, which has clips")
    return None
