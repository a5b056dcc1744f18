"""python -m benchmarks.models SiT-B/2 --out FOLDER: random networks of released sizes and their engines.

Speed and memory do not depend on the values of weights. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import nn

from export.build import build
from export.build_request import resolve_request
from flowturbo.checkpoints import save_network
from flowturbo.models.sit import MODEL_NAMES, SiT, build_refiner_config, build_sit_config
from runtime.cli.command_base import PATH, Command
from runtime.cli.progress_display import show_progress

SD_CHANNELS = (128, 256, 512, 512)
"""Widths of the SD VAEs' levels."""


@dataclass(frozen=True)
class CheckpointFiles:
    """Files of one model; `vae` is a folder in diffusers' layout."""

    predictor: Path
    refiner: Path
    vae: Path


def make_random_network(name: str, *, refiner: bool = False, latent_size: int = 32) -> SiT:
    """Make a network of a released size with adaLN and output weights that are not zero, as they are initialised."""
    torch.manual_seed(1 if refiner else 0)
    config = build_sit_config(name, latent_size)
    model = SiT(build_refiner_config(config) if refiner else config)
    for part in [*model.blocks, model.final_layer]:
        nn.init.normal_(part.adaLN_modulation[1].weight, std=0.02)
    nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    return model.eval().requires_grad_(False)


def write_random_checkpoints(folder: Path, name: str) -> CheckpointFiles:
    """Write predictor, refiner and an SD-size VAE with random weights; existing files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = name.replace("/", "-")
    files = CheckpointFiles(folder / f"{stem}.safetensors", folder / f"{stem}-refiner.safetensors", folder / "sd-vae")
    if not files.predictor.exists():
        save_network(files.predictor, make_random_network(name), role="predictor")
    if not files.refiner.exists():
        save_network(files.refiner, make_random_network(name, refiner=True), role="refiner")
    if not files.vae.exists():
        write_random_vae(files.vae)
    return files


def write_random_vae(folder: Path, channels: tuple[int, ...] = SD_CHANNELS) -> Path:
    """Write an AutoencoderKL of the SD VAEs' shape with random weights, in diffusers' layout."""
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        sample_size=256,
    ).save_pretrained(folder)
    return folder


def build_random_engines(folder: Path, name: str) -> Path:
    """Build an engine directory for the CPU at 256 px, unless nothing changed."""
    files = write_random_checkpoints(folder, name)
    request = resolve_request(
        predictor=files.predictor,
        refiner=str(files.refiner),
        vaes=[str(files.vae)],
        targets=["cpu"],
        precision="fp32",
    )
    out = folder / f"engines-{name.replace('/', '-')}"
    with show_progress() as progress:
        build(request, out, progress=progress)
    return out


@click.command(cls=Command)
@click.argument("name", type=click.Choice(MODEL_NAMES))
@click.option("--out", required=True, type=PATH, help="Folder for checkpoints and engines.")
def main(name: str, out: Path) -> None:
    """Write a model of a released size with random weights and build its engines for the CPU."""
    click.echo(build_random_engines(out, name))


if __name__ == "__main__":
    main()
