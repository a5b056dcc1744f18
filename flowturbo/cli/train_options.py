"""The options that `flowturbo-train`'s commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from flowturbo.training.config import LoopConfig
from runtime.cli.common import PATH, F, stack


def data_options(function: F) -> F:
    """What to train on, and where the run goes."""
    return stack(
        click.option("--data", required=True, type=PATH, help="Folder of class folders, or of cached latents."),
        click.option("--out", required=True, type=PATH, help="Folder of the run."),
        click.option("--resolution", default=256, show_default=True, type=click.IntRange(8), help="Pixels a side."),
        click.option("--fraction", default=1.0, show_default=True, help="Share of every class to use."),
        click.option("--classes", default="", help="Folder names or labels to use, separated by commas."),
    )(function)


def latent_options(function: F) -> F:
    """How photographs in --data become latents."""
    return stack(
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


def loop_options(*, lr: float, batch_size: int, ema: float, max_steps: int, explode: float = 10.0) -> Callable[[F], F]:
    """The loop's options, with the defaults that suit what is trained."""

    def option(*names: str, default: Any, help: str, **kinds: Any) -> Callable[[F], F]:
        return click.option(*names, default=default, show_default=True, help=help, **kinds)

    schedules = click.Choice(["constant", "cosine", "linear"])
    return stack(
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
        option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="auto: the GPU, if any."),
        option("--compile/--no-compile", default=False, help="torch.compile the networks."),
        option("--checkpoint-every", default=1000, help="Steps between checkpoints."),
        option("--keep", default=3, help="Checkpoints kept."),
        option("--sample-every", default=0, help="Steps between sample grids; 0 for none."),
        option("--seed", default=0, help="Of the weights and of everything drawn."),
        click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out."),
        click.option("--dry-run", is_flag=True, help="Print the resolved configuration and stop."),
    )


_LOOP = tuple(LoopConfig.__dataclass_fields__)


def loop_config(options: dict[str, Any]) -> LoopConfig:
    """Takes the loop's options out of `options`."""
    return LoopConfig(**{name: options.pop(name) for name in _LOOP})


def network_options(function: F) -> F:
    """Shape of a new SiT."""
    return stack(
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
