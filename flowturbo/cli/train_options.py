"""The options of `flowturbo-train`'s commands, by subject. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flowturbo.training.config import FlowConfig, LoopConfig, RefinerConfig, VaeConfig
from runtime.system.errors import RequestError
from runtime.system.option_fields import REQUIRED, option, split_words

DEFAULT_RESOLUTION, MAX_RESOLUTION = 256, 2048
"""Pixels a side; the largest is more than any VAE here is for, and less than what fills the memory with one image."""


@dataclass(frozen=True)
class DataOptions:
    """Which photographs, or which cached latents, and where the run goes.

    Attributes:
        folder: of class folders, or of latents.
        out: folder of the run.
        given_resolution: pixels a side, if somebody asked for it.
        fraction, classes, seed: which part of the data.
    """

    folder: Path = option(REQUIRED, "--data", help="Folder of class folders, or of cached latents.")
    out: Path = option(REQUIRED, help="Folder of the run.")
    given_resolution: int | None = option(
        None,
        "--resolution",
        help="Pixels a side.",
        minimum=8,
        maximum=MAX_RESOLUTION,
        default_text=str(DEFAULT_RESOLUTION),
    )
    fraction: float = option(1.0, help="Share of every class to use.", advanced=True)
    classes: tuple[str, ...] = option(
        (), help="Folder names or labels to use, separated by commas.", parse=split_words, advanced=True
    )
    seed: int = option(0, help="Of everything drawn.", advanced=True)

    def __post_init__(self) -> None:
        if self.out.resolve().is_relative_to(self.folder.resolve()):  # else the next run would take it for a class
            raise RequestError(
                f"--out {self.out} is in --data {self.folder}",
                allowed="a folder of its own",
                remedy="e.g. --out runs/1",
            )

    @property
    def resolution(self) -> int:
        """Pixels a side."""
        return self.given_resolution or DEFAULT_RESOLUTION


@dataclass(frozen=True)
class RunOptions:
    """How to train, and whether to go on with a run or only to say what would be done."""

    config: LoopConfig = option(REQUIRED, help="Of the loop.")
    resume: bool = option(False, help="Go on from the last checkpoint in --out.")
    dry_run: bool = option(False, help="Print the resolved configuration and stop.")


@dataclass(frozen=True)
class CacheOptions:
    """How latents are cached."""

    vae_name: str | None = option(
        None, "--vae", help="ema, mse, a folder in diffusers layout or a hub id.", default_text="the demo's"
    )
    seed: int = option(0, help="Of --fraction.", minimum=0)
    shard: int = option(2048, help="Photographs per file.", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="auto: the GPU, if any.")
    dry_run: bool = option(False, help="Say what would be encoded and stop.")


@dataclass(frozen=True)
class LatentOptions:
    """How photographs in --data become latents."""

    vae_name: str | None = option(
        None,
        "--vae",
        help="ema, mse, a folder or hub id. Encodes photographs in --data, decodes samples.",
        default_text="the demo's",
    )
    encode: Literal["once", "on-the-fly"] = option(
        "once", help="Photographs in --data: into OUT/latents first, or whenever they are shown.", advanced=True
    )


@dataclass(frozen=True)
class VaeOptions:
    """Shape and losses of an autoencoder."""

    config: VaeConfig = option(VaeConfig(crop=0), help="Of the autoencoder.")
    preset: Literal["ema", "mse"] | None = option(
        None, help="Fine-tune the decoder of --init: its encoder frozen, no --kl, no --equivariance, --loss l1 or mse."
    )
    lpips_files: tuple[Path, ...] = option(
        (),
        "--lpips",
        help="Local weights of the perceptual distance, to add it to the loss: vgg16.pth and vgg.pth, or one of both.",
        advanced=True,
    )
    lpips_weight: float = option(1.0, help="Of the perceptual distance under --lpips.", advanced=True)
    init: Path | None = option(None, help="Start from this VAE (diffusers folder) instead of from scratch.")


@dataclass(frozen=True)
class SitOptions:
    """Shape of a new SiT, what it starts from, and which times and labels it sees."""

    model: str = option("", help="A released size, e.g. SiT-B/2, instead of the four below.")
    width: int = option(256, help="Channels of a token.")
    depth: int = option(8, help="Blocks.")
    heads: int = option(4, help="Attention heads.")
    patch: int = option(2, help="Latents a side of a token.")
    num_classes: int = option(1000, help="Rows of the label table; beside --init, of a fresh one.", advanced=True)
    learned_sigma: bool = option(True, "--learned-sigma/--no-learned-sigma", help="As the released SiT.", advanced=True)
    init: Path | None = option(
        None, help="Start from this checkpoint's weights and shape; latents of another side get fresh positions."
    )
    label_std: float | None = option(
        None, help="Initial size of the label table, 0.02 as released; short runs want 0.5.", advanced=True
    )
    flow: FlowConfig = option(FlowConfig(), help="Times and labels.")


@dataclass(frozen=True)
class RefinerOptions:
    """Which refiner is trained, and for which steps."""

    predictor: Path = option(REQUIRED, help="Checkpoint of the SiT to refine.")
    init: Path | None = option(None, help="Start from this refiner.", advanced=True)
    config: RefinerConfig = option(RefinerConfig(), help="Of the refiner.")
