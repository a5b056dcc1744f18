"""The options of `flowturbo-train`'s commands, by subject, and what they ask for once they are read. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from flowturbo.training.config import LoopConfig
from runtime.cli.command_base import PATH, F, combine_options
from runtime.system.errors import RequestError

_LABEL_DROPOUT = click.option(
    "--label-dropout", default=0.1, show_default=True, type=click.FloatRange(0, 1), help="Share without a label."
)
MAX_RESOLUTION = 2048
"""Pixels a side: more than any VAE here is for, and less than what fills the memory with a single photograph."""
_DEVICES = click.Choice(["auto", "cpu", "cuda"])


@dataclass(frozen=True)
class DataOptions:
    """Which photographs, or which cached latents.

    Attributes:
        folder: of class folders, or of latents.
        resolution: pixels a side; `is_resolution_explicit` tells whether somebody asked for it or it is the default.
        fraction, classes, seed: which part of what lies there.
    """

    folder: Path
    resolution: int
    is_resolution_explicit: bool
    fraction: float
    classes: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class RunOptions:
    """How to train, where to, and whether to go on with what lies there or only to say what would be done."""

    config: LoopConfig
    out: Path
    resume: bool
    dry_run: bool


def parse_data_options(options: dict[str, Any], out: Path, seed: int) -> DataOptions:
    """What `data_options` ask for, taken out of `options`; `seed` chooses the fraction."""
    _check_out_folder(options["data"], out)
    return DataOptions(
        options.pop("data"),
        options.pop("resolution"),
        "resolution" in list_explicit_options(),
        options.pop("fraction"),
        tuple(split_words(options.pop("classes"))),
        seed,
    )


def _check_out_folder(data: Path, out: Path) -> None:
    """What a run writes would be taken for classes of photographs the next time."""
    if out.resolve().is_relative_to(data.resolve()):
        raise RequestError(
            f"--out {out} is in --data {data}", allowed="a folder of its own", remedy="e.g. --out runs/1"
        )


def parse_run_options(options: dict[str, Any]) -> RunOptions:
    """What `loop_options` and --out ask for, taken out of `options`."""
    config = LoopConfig(**{name: options.pop(name) for name in LoopConfig.__dataclass_fields__})
    return RunOptions(config, options.pop("out"), options.pop("resume"), options.pop("dry_run"))


def list_explicit_options() -> Collection[str]:
    """Options of the command that runs which somebody typed: the others have their defaults."""
    context = click.get_current_context()
    return {name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}


def split_words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def data_options(function: F) -> F:
    """What to train on, and where the run goes."""
    sides = click.IntRange(8, MAX_RESOLUTION)
    return combine_options(
        click.option("--data", required=True, type=PATH, help="Folder of class folders, or of cached latents."),
        click.option("--out", required=True, type=PATH, help="Folder of the run."),
        click.option("--resolution", default=256, show_default=True, type=sides, help="Pixels a side."),
        click.option("--fraction", default=1.0, show_default=True, help="Share of every class to use."),
        click.option("--classes", default="", help="Folder names or labels to use, separated by commas."),
    )(function)


def cache_options(function: F) -> F:
    """How latents are cached."""
    option, vaes = click.option, "ema, mse, a folder in diffusers layout or a hub id; the demo's by default."
    return combine_options(
        option("--vae", "vae_name", help=vaes),
        option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of --fraction."),
        option("--shard", default=2048, show_default=True, type=click.IntRange(1), help="Photographs per file."),
        option("--device", default="auto", show_default=True, type=_DEVICES),
        option("--dry-run", is_flag=True, help="Say what would be encoded and stop."),
    )(function)


def latent_options(function: F) -> F:
    """How photographs in --data become latents."""
    return combine_options(
        click.option(
            "--vae",
            "vae_name",
            help="ema, mse, a folder or hub id; the demo's by default. Encodes photographs in --data, decodes samples.",
        ),
        click.option(
            "--encode",
            default="once",
            show_default=True,
            type=click.Choice(["once", "on-the-fly"]),
            help="Photographs in --data: into OUT/latents first, or whenever they are shown.",
        ),
    )(function)


def vae_options(function: F) -> F:
    """Shape and losses of an autoencoder."""
    option, losses, presets = click.option, click.Choice(["l1", "mse"]), click.Choice(["ema", "mse"])
    crop = "Side of random training crops; 0: whole."
    preset = "Fine-tune the decoder of --init: its encoder frozen, no --kl, no --equivariance, --loss l1 or mse."
    lpips = "Local weights of the perceptual distance, to add it to the loss: vgg16.pth and vgg.pth, or one of both."
    freeze = "Train the decoder only: a second decoder for the same latents."
    return combine_options(
        option("--channels", default="32,64,96", show_default=True, help="Widths from full resolution down."),
        option("--layers", default=1, show_default=True, type=click.IntRange(1), help="Residual blocks per level."),
        option("--latent-channels", default=4, show_default=True, type=click.IntRange(1)),
        option("--crop", default=0, show_default=True, type=click.IntRange(0), help=crop),
        option("--preset", type=presets, help=preset),
        option("--loss", default="l1", show_default=True, type=losses),
        option("--lpips", "lpips_files", multiple=True, type=PATH, help=lpips),
        option("--lpips-weight", default=1.0, show_default=True, help="Of the perceptual distance under --lpips."),
        option("--kl", default=1e-3, show_default=True, help="Weight of the KL divergence per latent element."),
        option("--equivariance", default=0.25, show_default=True, help="Share and weight of half-scale latents."),
        option("--init", type=PATH, help="Start from this VAE (diffusers folder) instead of from scratch."),
        option("--freeze-encoder", is_flag=True, help=freeze),
    )(function)


def network_options(function: F) -> F:
    """Shape of a new SiT."""
    return combine_options(
        click.option("--model", default="", help="A released size, e.g. SiT-B/2, instead of the four below."),
        click.option("--width", default=256, show_default=True),
        click.option("--depth", default=8, show_default=True),
        click.option("--heads", default=4, show_default=True),
        click.option("--patch", default=2, show_default=True),
        click.option("--num-classes", default=1000, show_default=True, help="Rows of the label table."),
        click.option(
            "--learned-sigma/--no-learned-sigma", default=True, show_default=True, help="As the released SiT."
        ),
    )(function)


def flow_options(function: F) -> F:
    """What a SiT starts from, and which times and labels it sees."""
    option, times = click.option, click.Choice(["uniform", "logit-normal"])
    init = "Start from this checkpoint's weights and shape instead of from scratch."
    std = "Initial size of the label table, 0.02 as released; short runs want 0.5."
    mean = "Of the normal number under --times logit-normal."
    return combine_options(
        option("--init", type=PATH, help=init),
        _LABEL_DROPOUT,
        option("--times", default="uniform", show_default=True, type=times),
        option("--label-std", type=float, help=std),
        option("--times-mean", default=0.0, show_default=True, help=mean),
    )(function)


def refiner_options(function: F) -> F:
    """Which refiner is trained, and for which steps."""
    option, calls = click.option, click.Choice(["single", "consistent"])
    steps = 'Draw (t, Δt) from the steps of a saved sampler (JSON with "grid") or of flowturbo-run\'s run.json instead.'
    guidance = "Learn to refine velocities guided at this scale."
    second = "consistent: also train the second call of the consistent block."
    return combine_options(
        option("--predictor", required=True, type=PATH, help="Checkpoint of the SiT to refine."),
        option("--init", type=PATH, help="Start from this refiner."),
        option("--min-dt", default=0.0, show_default=True, help="Step sizes are uniform from this …"),
        option("--max-dt", default=0.12, show_default=True, help="… to this."),
        option("--steps-from", type=PATH, help=steps),
        _LABEL_DROPOUT,
        option("--reference-behaviour", is_flag=True, help="Let t + dt pass 1, as the released code does."),
        option("--teacher-guidance", default=1.0, show_default=True, help=guidance),
        option("--second-call", default="single", show_default=True, type=calls, help=second),
    )(function)


def loop_options(*, lr: float, batch_size: int, ema: float, max_steps: int, explode: float = 10.0) -> Callable[[F], F]:
    """The loop's options, with the defaults that suit what is trained."""

    def option(*names: str, default: Any, help: str, **kinds: Any) -> Callable[[F], F]:
        return click.option(*names, default=default, show_default=True, help=help, **kinds)

    schedules = click.Choice(["constant", "cosine", "linear"])
    return combine_options(
        option("--batch-size", default=batch_size, help="Samples of one forward pass in one process."),
        option("--accumulate", default=1, help="Forward passes of a process in one step."),
        option("--max-steps", default=max_steps, help="Steps in all, resumed ones included."),
        option("--lr", default=lr, help="Peak learning rate."),
        option("--lr-schedule", "schedule", default="constant", type=schedules, help="After the warm-up."),
        option("--warmup", default=0, help="Steps over which the learning rate rises."),
        option("--decay", default=0, help="Last steps over which a constant learning rate falls to 0."),
        option("--optimizer", default="adamw", type=click.Choice(["adamw", "muon"]), help="Of the hidden matrices."),
        option("--beta2", default=0.99, help="Of AdamW; 0.999 in the released code."),
        option("--muon-lr", default=1e-3, help="Peak learning rate of the matrices under --optimizer muon."),
        option("--weight-decay", default=0.0, help="Decoupled weight decay."),
        option("--clip", default=1.0, help="Largest norm of the gradient; 0 for any."),
        option("--explode", default=explode, help="A loss this many times the running median stops the run; 0: never."),
        option("--ema", default=ema, help="Decay of the averaged weights."),
        option("--precision", default="fp32", type=click.Choice(["fp32", "bf16"]), help="bf16: autocast."),
        option("--device", default="auto", type=_DEVICES, help="auto: the GPU, if any."),
        option("--compile/--no-compile", default=False, help="torch.compile the networks."),
        option("--checkpoint-every", default=1000, help="Steps between checkpoints."),
        option("--keep", default=3, help="Checkpoints kept."),
        option("--sample-every", default=0, help="Steps between sample grids; 0 for none."),
        option("--seed", default=0, help="Of the weights and of everything drawn."),
        click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out."),
        click.option("--dry-run", is_flag=True, help="Print the resolved configuration and stop."),
    )
