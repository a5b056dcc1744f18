"""What the calibration commands share: how the calibrated model is guided, and the command for the record."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from runtime.cli.command_base import F, combine_options

if TYPE_CHECKING:
    from calibration.guidance_choice import Guidance


def guidance_options(function: F) -> F:
    """How the calibrated sampler will be guided."""
    return combine_options(
        click.option("--guidance", type=float, help="Guidance scale.  [default: the directory's]"),
        click.option("--guidance-channels", type=int, help="Latent channels that are guided."),
        click.option("--guidance-interval", help="Flow times A,B between which guidance acts.  [default: 0,1]"),
    )(function)


def parse_guidance(scale: float | None, channels: int | None, interval: str | None) -> Guidance:
    """The guidance options as one."""
    from calibration.guidance_choice import Guidance
    from runtime.cli.sampler_options import parse_numbers

    start, end = parse_numbers("--guidance-interval", interval, 2) if interval else (0.0, 1.0)
    return Guidance(scale, channels, (start, end))


def format_command() -> str:
    """What the user typed, for the record."""
    return " ".join(["flowturbo-calibrate", *sys.argv[1:]])
