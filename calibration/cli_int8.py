"""`flowturbo-calibrate int8` and `sensitivity`: what a low-precision build needs to know."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calibration.options import command, guidance_of, guidance_options, say
from runtime.cli.common import PATH, Command, F, echo_json, stack

if TYPE_CHECKING:
    from calibration.trajectories import Deployment


def model_options(function: F) -> F:
    """Which model, and how it will be sampled."""
    return stack(
        click.option("--predictor", type=PATH, help="Checkpoint of the SiT.  [default: the demo's]"),
        click.option("--refiner", type=PATH, help="Checkpoint of its refiner."),
        click.option(
            "--vae", "vaes", multiple=True, help="Decoders that pictures are judged by, as for build-engines."
        ),
        click.option("--heads", type=int, help="Attention heads, for a width that no released model has."),
        click.option("--resolution", type=int, help="Pixels a side, where the checkpoint's own is not wanted."),
        click.option("--schedule", help="Blocks such as H1P5R3.  [default: the model's own]"),
        click.option("--solver", help="A solver with fixed steps in place of a schedule."),
        click.option("--steps", type=click.IntRange(1, 1000), help="Steps of the solver."),
    )(function)


def deployment_of(options: dict[str, Any], *, pictures: bool) -> Deployment:
    """The model and sampler of `model_options` and `guidance_options`, taken out of a command's options."""
    from calibration.solving import Wanted
    from calibration.trajectories import load_deployment

    guidance = guidance_of(*(options.pop(name) for name in ("guidance", "guidance_channels", "guidance_interval")))
    wanted = Wanted(*(options.pop(name) for name in ("predictor", "refiner", "heads", "resolution")), guidance)
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
    from calibration import int8 as job
    from runtime.errors import RequestError
    from runtime.files import make_folder

    if out.suffix != ".npz":
        raise RequestError(f"--out {out}", allowed="a file that ends in .npz")
    settings = job.Settings(samples, seed, batch)
    make_folder(out.absolute().parent)
    deployment = deployment_of(options, pictures=False)
    ranges = job.calibrate(deployment, settings, out, say, command=command(), resume=not restart)
    if as_json:
        echo_json(job.as_json(ranges))
        return
    click.echo(job.overview(ranges))
    click.echo(f"written: {out} (sha256 {ranges.sha256[:12]}…)")
    click.echo(f"use it: flowturbo-export build-engines --precision int8 --calibration {out} --out engines-int8")


@click.command(cls=Command)
def sensitivity() -> None:
    """Not here yet."""
