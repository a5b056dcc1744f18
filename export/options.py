"""Options of `build-engines` that decide what is done to single layers, and what quantised engines have to reach."""

from __future__ import annotations

import click

from export.gate import LEAST_IMAGES, GateLimits
from runtime.cli.common import PATH, F, stack


def layer_options(function: F) -> F:
    """Calibration, choice and the limits of the gate."""
    default = GateLimits()
    return stack(
        click.option(
            "--calibration", type=PATH, help="Ranges of flowturbo-calibrate int8; --precision int8 needs them."
        ),
        click.option("--choice", type=PATH, help="What stays wide, from flowturbo-calibrate sensitivity."),
        click.option(
            "--gate-images",
            type=click.IntRange(LEAST_IMAGES),
            help=f"Pictures that a quantised build is judged by.  [default: {default.images}]",
        ),
        click.option(
            "--gate-psnr",
            type=click.FloatRange(0),
            help=f"dB that their median must have against the wider twin's.  [default: {default.psnr_db:g}]",
        ),
    )(function)
