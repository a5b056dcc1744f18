"""Training a SiT: velocity matching on the linear path.

Letters: B images, C latent channels, H = W latent side.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flowturbo.checkpoints import save_network
from flowturbo.data.latents import LatentSource, Raw
from flowturbo.data.photographs import Pixels, readable_name
from flowturbo.flow import Velocity, flow_loss
from flowturbo.models.sit import SiT
from flowturbo.models.vae import Vae
from flowturbo.training.loop import Losses
from flowturbo.training.preview import decode, heun
from flowturbo.training.random_draws import Share, generator, sample_indices
from flowturbo.training.run_log import describe_file
from runtime.sampling.noise import noise_of_seeds
from runtime.system.errors import TrainingError

PREVIEW_ROWS, PREVIEW_STEPS, PREVIEW_GUIDANCE = 8, 12, 3.0


@dataclass(frozen=True)
class FlowConfig:
    """Attributes:
    label_dropout: share of samples trained with the null label, for guidance.
    times: distribution of t: uniform (SiT), or the sigmoid of a normal number (Esser et al. 2024), which
        spends more samples on the middle of the path.
    times_mean: mean of that normal number.
    """

    label_dropout: float = 0.1
    times: Literal["uniform", "logit-normal"] = "uniform"
    times_mean: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.times_mean):
            raise TrainingError(
                f"--times-mean is {self.times_mean}", allowed="a finite number", remedy="e.g. --times-mean 0"
            )


class Batch(NamedTuple):
    """What some samples are made of.

    Attributes:
        raw: what the source reads of their data.
        posterior: [B, C, H, W] noise that draws latents from their posteriors.
        noise: [B, C, H, W] the path's other end.
        t: [B].
        labels, dropped: [B] classes, and the same after label dropout.
    """

    raw: Raw
    posterior: Tensor
    noise: Tensor
    t: Tensor
    labels: Tensor
    dropped: Tensor


def draw(source: LatentSource, config: FlowConfig, classes: int, seed: int, where: range) -> Batch:
    """The samples at some positions; each one's randomness depends on (seed, position) alone."""
    indices = sample_indices(seed, where, len(source))
    mirrored = np.zeros(len(indices), dtype=np.bool_)
    drop = np.zeros(len(indices), dtype=np.bool_)
    t = np.zeros(len(indices), dtype=np.float32)
    normals = np.empty((2, len(indices), *source.manifest.shape), dtype=np.float32)
    for row, position in enumerate(where):
        g = generator(seed, position)
        mirrored[row], drop[row] = g.random() < 0.5, g.random() < config.label_dropout
        t[row] = g.random() if config.times == "uniform" else 1 / (1 + np.exp(-config.times_mean - g.standard_normal()))
        g.standard_normal(dtype=np.float32, out=normals[0, row])
        g.standard_normal(dtype=np.float32, out=normals[1, row])
    raw, labels = source.read(indices, mirrored)
    dropped = np.where(drop, classes, labels)
    return Batch(raw, *map(torch.from_numpy, (normals[0], normals[1], t, labels, dropped)))


def check_fits(model: SiT, source: LatentSource) -> None:
    """Raises TrainingError: the network and the latents have different shapes or labels."""
    config, (channels, side, _) = model.config, source.manifest.shape
    if (config.out_channels, config.latent_size) != (channels, side):
        raise TrainingError(
            f"the network takes latents of {config.out_channels} × {config.latent_size}², "
            f"the data are {channels} × {side}²",
            allowed="the same channels and side",
            remedy="make latents at this resolution with this VAE, or change --resolution",
        )
    if int(source.labels.max()) >= config.classes:
        raise TrainingError(
            f"the data have label {int(source.labels.max())}, the network {config.classes} classes",
            allowed=f"labels 0 to {config.classes - 1}",
            remedy="--num-classes with more classes",
        )


def provenance(source: LatentSource) -> dict[str, Any]:
    """What the metadata of a trained network says about the data and the VAE it belongs to."""
    manifest, shown = source.manifest, {str(label) for label in np.unique(source.labels)}
    return {
        "classes": {label: readable_name(folder) for label, folder in (manifest.names or {}).items() if label in shown},
        "vae_factor": manifest.resolution // manifest.shape[1],
        "resolution": manifest.resolution,
        "vae": manifest.vae,
        "scaling_factor": manifest.scaling_factor,
    }


class SitTask:
    """Velocity matching of a SiT on latents."""

    def __init__(
        self,
        model: SiT,
        source: LatentSource,
        config: FlowConfig,
        seed: int,
        vae: Vae | None = None,
        compile: bool = False,
        init: Path | None = None,
    ) -> None:
        check_fits(model, source)
        self.files = {"init": init} if init else {}
        self.model, self.source, self.config, self.seed, self.vae = model, source, config, seed, vae
        self.velocity: Velocity = torch.compile(model) if compile else model

    @property
    def network(self) -> nn.Module:
        return self.model

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.source.to(device)
        if self.vae is not None:
            self.vae.module.to(device)

    def describe(self) -> dict[str, Any]:
        return {
            "task": "sit",
            "model": self.model.config.to_json(),
            "flow": asdict(self.config),
            "provenance": provenance(self.source),
            "data": self.source.describe(),
            "files": {name: describe_file(path) for name, path in self.files.items()},
        }

    def skipped(self) -> dict[str, str]:
        return self.source.skipped()

    def draw(self, share: Share) -> Batch:
        return draw(self.source, self.config, self.model.config.classes, self.seed, share.where)

    def losses(self, batch: Batch) -> Losses:
        data = self.source.sample(batch.raw, batch.posterior)
        return {"loss": flow_loss(self.velocity, data, batch.noise, batch.t, batch.dropped).mean()}

    def pictures(self, ema: nn.Module) -> tuple[Pixels, int] | None:
        """One column per class (the first ten), seeds 0, 1, … downwards."""
        assert isinstance(ema, SiT)
        if self.vae is None:
            return None
        noise, labels, columns = preview_grid(self.source, self.vae.device)
        return decode(self.vae, heun(ema, noise, labels, PREVIEW_STEPS, PREVIEW_GUIDANCE)), columns

    def finish(self, ema: nn.Module, out: Path) -> Path:
        """Saves the averaged weights as `out/final.safetensors`."""
        assert isinstance(ema, SiT)
        save_network(out / "final.safetensors", ema, role="predictor", extra=provenance(self.source))
        return out / "final.safetensors"


def preview_grid(source: LatentSource, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Noise [B, C, H, W] and labels [B] of a grid with a column per class (the first ten), and its columns."""
    classes = np.unique(source.labels)[:10]
    channels, side, _ = source.manifest.shape
    noise = torch.from_numpy(noise_of_seeds(range(PREVIEW_ROWS), (channels, side, side)))
    return (
        noise.repeat_interleave(len(classes), dim=0).to(device),
        torch.from_numpy(classes).repeat(PREVIEW_ROWS).to(device),
        len(classes),
    )
