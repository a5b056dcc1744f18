"""Training a small KL autoencoder from scratch, or a second decoder for the latents of a trained one.

Letters: B images, R resolution, K side of the training crop, C latent channels, H = W latent side.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from flowturbo.data import Photographs, Pixels, to_pixels, to_unit
from flowturbo.models.vae import load_vae
from flowturbo.training.draws import generator, sample_indices
from flowturbo.training.loop import Losses
from runtime.errors import CheckpointError, TrainingError

FIRST_LOG_VARIANCE = -6.0  # latents that start with unit variance leave the decoder at the mean image for long
SHOWN = 16


@dataclass(frozen=True)
class VaeConfig:
    """What the autoencoder is and what it minimises.

    Attributes:
        channels: widths from full resolution down; each further one halves the side.
        layers: residual blocks per level.
        crop: side of the random squares it trains on (it is fully convolutional); 0 for whole photographs.
        loss: "l1", or "mse" for mostly squared error, which gives smoother pictures.
        kl: weight of the KL divergence, averaged over latent elements, beside a loss averaged over pixels.
        equivariance: share of every batch whose latents are halved in size and must decode to the halved image.
            Latents then vary with scale as images do, and a diffusion model learns them faster (Kouzelis et al.
            2025, arXiv 2502.09509; Skorokhodov et al. 2025, arXiv 2502.14831).
        freeze_encoder: trains the decoder only.
    """

    channels: tuple[int, ...] = (32, 64, 96)
    layers: int = 1
    latent_channels: int = 4
    groups: int = 16
    crop: int = 32
    loss: Literal["l1", "mse"] = "l1"
    kl: float = 1e-3
    equivariance: float = 0.25
    freeze_encoder: bool = False


def new_vae(config: VaeConfig, resolution: int) -> AutoencoderKL:
    """An untrained autoencoder without attention, so that crops teach it all it needs."""
    levels = len(config.channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        sample_size=resolution,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.quant_conv.bias[config.latent_channels :].fill_(FIRST_LOG_VARIANCE)
        vae.quant_conv.weight[config.latent_channels :].mul_(0.1)
    return vae


def open_vae(folder: Path) -> AutoencoderKL:
    """A trained autoencoder, to be trained on.

    Raises:
        CheckpointError: it is no KL autoencoder, or cannot be read.
    """
    vae = load_vae(str(folder)).module
    if not isinstance(vae, AutoencoderKL):
        raise CheckpointError(
            f"{folder} is a {type(vae).__name__}", allowed="an AutoencoderKL", remedy="name another VAE with --init"
        )
    vae.requires_grad_(True).train()
    return vae


class VaeTask:
    """Reconstruction, KL and scale equivariance of an autoencoder on photographs."""

    def __init__(self, vae: AutoencoderKL, photographs: Photographs, config: VaeConfig, seed: int) -> None:
        if config.crop > photographs.resolution:
            raise TrainingError(
                f"--crop {config.crop} is larger than the photographs ({photographs.resolution})",
                allowed=f"0 to {photographs.resolution}",
                remedy=f"--crop {photographs.resolution // 2}",
            )
        self.vae, self.photographs, self.config, self.seed = vae, photographs, config, seed
        self.vae.to(memory_format=torch.channels_last)
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(not config.freeze_encoder)

    @property
    def network(self) -> nn.Module:
        module: nn.Module = self.vae
        return module

    def describe(self) -> dict[str, Any]:
        return {
            "task": "vae",
            "vae": asdict(self.config),
            "data": str(self.photographs.listing.root),
            "photographs": len(self.photographs),
            "resolution": self.photographs.resolution,
        }

    def _samples(self, where: range) -> tuple[Tensor, Tensor]:
        """Cropped, perhaps mirrored photographs [B, 3, K, K] and the noise of their latents [B, C, H, W]."""
        pixels, _ = self.photographs.batch(sample_indices(self.seed, where, len(self.photographs)))
        side = self.config.crop or self.photographs.resolution
        latent = side // 2 ** (len(self.config.channels) - 1)
        crops, noise = [], []
        for image, position in zip(pixels, where, strict=True):
            g = generator(self.seed, position)
            top, left = g.integers(0, image.shape[0] - side + 1, size=2)
            crop = image[top : top + side, left : left + side]
            crops.append(crop[:, ::-1] if g.random() < 0.5 else crop)
            noise.append(g.standard_normal((self.config.latent_channels, latent, latent), dtype=np.float32))
        images = torch.from_numpy(to_unit(np.stack(crops))).contiguous(memory_format=torch.channels_last)
        return images, torch.from_numpy(np.stack(noise))

    def losses(self, where: range) -> Losses:
        images, noise = self._samples(where)
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        error = self._error(self.vae.decode(latents).sample, images)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = error + self.config.kl * kl
        found: Losses = {"error": error.detach(), "kl": kl.detach(), "latent_std": posterior.mean.detach().std()}
        halved = round(self.config.equivariance * len(where))
        if halved:
            small = self.vae.decode(F.avg_pool2d(latents[:halved], 2)).sample
            scale_error = self._error(small, F.avg_pool2d(images[:halved], 2))
            loss = loss + self.config.equivariance * scale_error
            found["scale_error"] = scale_error.detach()
        return {"loss": loss, **found}

    def _error(self, decoded: Tensor, images: Tensor) -> Tensor:
        difference = (decoded - images).float()
        if self.config.loss == "l1":
            return difference.abs().mean()
        # As sd-vae-ft-mse: mostly squared error. The small L1 keeps edges from washing out altogether.
        return 10 * difference.square().mean() + 0.1 * difference.abs().mean()

    @torch.no_grad()
    def pictures(self, ema: nn.Module) -> tuple[Pixels, int]:
        """Rows of originals above their reconstructions."""
        step = max(1, len(self.photographs) // SHOWN)
        pixels, _ = self.photographs.batch(range(0, len(self.photographs), step)[:SHOWN])
        rebuilt = reconstruct(ema, torch.from_numpy(to_unit(pixels)))
        return np.concatenate([pixels, to_pixels(rebuilt.numpy())]), len(pixels)

    def finish(self, ema: nn.Module, out: Path) -> Path:
        """Saves `out/vae` in diffusers' layout with the measured scaling factor (unless the encoder was frozen)."""
        assert isinstance(ema, AutoencoderKL)
        if not self.config.freeze_encoder:
            ema.register_to_config(scaling_factor=scaling_factor(ema, self.photographs))
        ema.save_pretrained(out / "vae")
        return out / "vae"


@torch.no_grad()
def reconstruct(vae: Any, images: Tensor) -> Tensor:
    """Through the posterior's mean and back: [B, 3, R, R] in −1 … 1."""
    rebuilt: Tensor = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return rebuilt


@torch.no_grad()
def scaling_factor(vae: Any, photographs: Photographs, count: int = 1024) -> float:
    """1 / standard deviation of the sampled latents of up to `count` photographs, spread over the classes."""
    chosen = np.linspace(0, len(photographs) - 1, min(count, len(photographs))).astype(np.int64)
    total = square = number = 0.0
    for first in range(0, len(chosen), 64):
        pixels, _ = photographs.batch(chosen[first : first + 64])
        posterior = vae.encode(torch.from_numpy(to_unit(pixels))).latent_dist
        total += float(posterior.mean.sum())
        square += float((posterior.mean.square() + posterior.var).sum())
        number += posterior.mean.numel()
    return float(number / (number * square - total**2) ** 0.5)
