"""Training a SiT: velocity matching on the linear path.

Letters: B images, C latent channels, H = W latent side.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from flowturbo.checkpoints import save_network
from flowturbo.data import Pixels, readable_name
from flowturbo.flow import Velocity, flow_loss
from flowturbo.latents import Latents
from flowturbo.models.sit import SiT
from flowturbo.models.vae import Vae
from flowturbo.training.draws import generator, sample_indices
from flowturbo.training.loop import Losses
from flowturbo.training.preview import decode, heun, noise_of_seeds
from runtime.errors import TrainingError

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


@dataclass(frozen=True)
class Batch:
    """data, noise [B, C, H, W]; t [B]; labels [B] and the same labels after dropout."""

    data: Tensor
    noise: Tensor
    t: Tensor
    labels: Tensor
    dropped: Tensor


def draw(latents: Latents, config: FlowConfig, classes: int, seed: int, where: range) -> Batch:
    """The samples at some positions; each one's randomness depends on (seed, position) alone."""
    indices = sample_indices(seed, where, len(latents))
    mirrored = np.zeros(len(indices), dtype=np.bool_)
    drop = np.zeros(len(indices), dtype=np.bool_)
    t = np.zeros(len(indices), dtype=np.float32)
    normals = np.empty((2, len(indices), *latents.shape), dtype=np.float32)
    for row, position in enumerate(where):
        g = generator(seed, position)
        mirrored[row], drop[row] = g.random() < 0.5, g.random() < config.label_dropout
        t[row] = g.random() if config.times == "uniform" else 1 / (1 + np.exp(-config.times_mean - g.standard_normal()))
        g.standard_normal(dtype=np.float32, out=normals[0, row])
        g.standard_normal(dtype=np.float32, out=normals[1, row])
    labels = latents.labels[indices]
    data = latents.sample(indices, mirrored, torch.from_numpy(normals[0]))
    dropped = np.where(drop, classes, labels)
    return Batch(data, *map(torch.from_numpy, (normals[1], t, labels, dropped)))


def check_fits(model: SiT, latents: Latents) -> None:
    """Raises TrainingError: the network and the latents have different shapes or labels."""
    config, (channels, side, _) = model.config, latents.shape
    if (config.out_channels, config.latent_size) != (channels, side):
        raise TrainingError(
            f"the network takes latents of {config.out_channels} × {config.latent_size}², "
            f"{latents.folder} holds {channels} × {side}²",
            allowed="the same channels and side",
            remedy="make latents at this resolution with this VAE, or change --resolution",
        )
    if int(latents.labels.max()) >= config.classes:
        raise TrainingError(
            f"{latents.folder} has label {int(latents.labels.max())}, the network {config.classes} classes",
            allowed=f"labels 0 to {config.classes - 1}",
            remedy="--num-classes with more classes",
        )


def provenance(latents: Latents) -> dict[str, Any]:
    """What the metadata of a trained network says about the data and the VAE it belongs to."""
    manifest = latents.manifest
    return {
        "classes": {label: readable_name(folder) for label, folder in (manifest.names or {}).items()},
        "vae_factor": manifest.resolution // manifest.shape[1],
        "resolution": manifest.resolution,
        "vae": manifest.vae,
        "scaling_factor": manifest.scaling_factor,
    }


class SitTask:
    """Velocity matching of a SiT on cached latents."""

    def __init__(
        self, model: SiT, latents: Latents, config: FlowConfig, seed: int, vae: Vae | None = None, compile: bool = False
    ) -> None:
        check_fits(model, latents)
        self.model, self.latents, self.config, self.seed, self.vae = model, latents, config, seed, vae
        self.velocity: Velocity = torch.compile(model) if compile else model

    @property
    def network(self) -> nn.Module:
        return self.model

    def describe(self) -> dict[str, Any]:
        return {
            "task": "sit",
            "model": self.model.config.to_json(),
            "flow": asdict(self.config),
            "data": str(self.latents.folder),
            "provenance": provenance(self.latents),
            "latents": asdict(self.latents.manifest),
        }

    def losses(self, where: range) -> Losses:
        batch = draw(self.latents, self.config, self.model.config.classes, self.seed, where)
        return {"loss": flow_loss(self.velocity, batch.data, batch.noise, batch.t, batch.dropped).mean()}

    def pictures(self, ema: nn.Module) -> tuple[Pixels, int] | None:
        """One column per class (the first ten), seeds 0, 1, … downwards."""
        assert isinstance(ema, SiT)
        if self.vae is None:
            return None
        classes = np.unique(self.latents.labels)[:10]
        noise = noise_of_seeds(range(PREVIEW_ROWS), self.latents.shape).repeat_interleave(len(classes), dim=0)
        labels = torch.from_numpy(classes).repeat(PREVIEW_ROWS)
        return decode(self.vae, heun(ema, noise, labels, PREVIEW_STEPS, PREVIEW_GUIDANCE)), len(classes)

    def finish(self, ema: nn.Module, out: Path) -> Path:
        """Saves the averaged weights as `out/final.safetensors`."""
        assert isinstance(ema, SiT)
        save_network(out / "final.safetensors", ema, role="predictor", extra=provenance(self.latents))
        return out / "final.safetensors"
