"""The options of `build-engines`, by subject; `--help` shows them in the order in which the command stacks them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from export.build_request import DEFAULT_MAX_BATCH, MAX_BATCH
from export.proof.gate import MIN_IMAGES, GateLimits
from export.targets import PRECISIONS
from runtime.cli.command_base import PATH, F, combine_options
from runtime.directory.records import TARGETS

TIME_DIRECTIONS = click.Choice(["noise-to-data", "data-to-noise"])
_PRECISION_HELP = (
    "auto: cpu fp32, openvino bf16 with AMX, GPUs fp16. int8 needs --calibration; int8-weights and int4-weights "
    "save memory."
)


def checkpoint_options(function: F) -> F:
    """What is deployed."""
    vaes = "ema, mse, taesd, a folder, a hub id, or none; may be repeated."
    sizes = "Pixels a side; may be repeated.  [default: as trained]"
    return combine_options(
        click.option("--predictor", type=PATH, help="SiT checkpoint (.pt or .safetensors).  [default: the demo model]"),
        click.option("--refiner", help="FlowTurbo refiner checkpoint, or none."),
        click.option("--vae", "vaes", multiple=True, help=vaes),
        click.option("--resolution", "resolutions", multiple=True, type=int, help=sizes),
        click.option("--heads", type=int, help="Attention heads, where the width does not tell."),
        click.option("--time-direction", type=TIME_DIRECTIONS, help="data-to-noise for REPA checkpoints."),
    )(function)


def target_options(function: F) -> F:
    """What it is built for."""
    targets = click.Choice([*TARGETS, "auto"])
    return combine_options(
        click.option(
            "--target",
            "targets",
            multiple=True,
            default=("auto",),
            show_default=True,
            type=targets,
            help="What will run the engines; may be repeated.",
        ),
        click.option(
            "--precision", default="auto", show_default=True, type=click.Choice(PRECISIONS), help=_PRECISION_HELP
        ),
    )(function)


default_schedule_option = click.option(
    "--default-schedule", help="What flowturbo-run uses: blocks, or the name of a kept sampler."
)


def sampler_options(function: F) -> F:
    """How it is sampled when nobody says otherwise."""
    sampler_help = "Keep this sampler of flowturbo-calibrate in the directory; may be repeated."
    return combine_options(
        click.option("--sampler", "samplers", multiple=True, type=PATH, help=sampler_help), default_schedule_option
    )(function)


def layer_options(function: F) -> F:
    """What is done to single layers, and what quantised engines have to reach."""
    limits = GateLimits()
    ranges = "Ranges of flowturbo-calibrate int8; --precision int8 needs them."
    images = f"Pictures that a quantised build is judged by.  [default: {limits.images}]"
    psnr = f"dB that their median must have against the wider twin's.  [default: {limits.psnr_db:g}]"
    return combine_options(
        click.option("--calibration", type=PATH, help=ranges),
        click.option("--choice", type=PATH, help="What stays wide, from flowturbo-calibrate sensitivity."),
        click.option("--gate-images", type=click.IntRange(MIN_IMAGES), help=images),
        click.option("--gate-psnr", type=click.FloatRange(0), help=psnr),
    )(function)


def pop_gate_limits(options: dict[str, Any]) -> GateLimits:
    """The limits of the gate, taken out of a command's options; its own where none is named."""
    overrides = {"images": options.pop("gate_images"), "psnr_db": options.pop("gate_psnr")}
    return replace(GateLimits(), **{name: limit for name, limit in overrides.items() if limit is not None})


def graph_options(function: F) -> F:
    """Which graphs there are, and for which sizes."""
    batch = f"Largest batch of one engine call.  [default: {DEFAULT_MAX_BATCH}]"
    tiles = "Also decoders for tiles of so many pixels, for large pictures in little memory."
    return combine_options(
        click.option("--max-batch", type=click.IntRange(1, MAX_BATCH), help=batch),
        click.option("--static-batch", is_flag=True, help="Engines for exactly max-batch images."),
        click.option("--encoder/--no-encoder", default=False, show_default=True, help="Build the VAE's encoder too."),
        click.option("--tile", type=int, help=tiles),
    )(function)


def build_options(function: F) -> F:
    """Where it comes from and goes to, and what the build may do."""
    against = "With --from: judge quantised engines beside the wider ones in this directory, on this device."
    out = "Engine directory to make.  [default: engines, or --from]"
    force = "Keep engines that miss their tolerance; go on without those that fail."
    return combine_options(
        click.option(
            "--from", "source", type=PATH, help="Take ONNX files and proof from this directory: needs no torch."
        ),
        click.option("--against", type=PATH, help=against),
        click.option("--out", type=PATH, help=out),
        click.option("--low-memory", is_flag=True, help="Small builder workspace, for boards of 8 GB and less."),
        click.option("--rebuild", is_flag=True, help="Build even if nothing changed."),
        click.option("--force", is_flag=True, help=force),
        click.option("--allow-foreign", is_flag=True, help="Accept engines of another device from --from."),
    )(function)
