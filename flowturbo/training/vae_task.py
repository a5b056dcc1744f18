"""Training a small KL autoencoder from scratch, or a second decoder for the latents of a trained one.

Letters: B images, R resolution, K side of the training crop, C latent channels, H = W latent side.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from flowturbo.checkpoints import read_tensors, save_weights
from flowturbo.data.photographs import Photographs, Pixels, normalise_pixels, to_pixels
from flowturbo.models.vae import load_vae
from flowturbo.training.config import MIN_LPIPS_SIDE, VaeConfig
from flowturbo.training.loop import Losses
from flowturbo.training.lpips import Lpips
from flowturbo.training.random_draws import Microbatch, make_generator, sample_indices
from flowturbo.training.run_log import describe_file, read_run_config
from flowturbo.training.training_state import list_checkpoints
from runtime.system.errors import CheckpointError, TrainingError
from runtime.system.files import report_write_errors

INITIAL_LOG_VARIANCE = -6.0  # latents that start with unit variance leave the decoder at the mean image for long
PREVIEW_COUNT = 16


def build_vae(config: VaeConfig, resolution: int) -> AutoencoderKL:
    """Return an untrained autoencoder without attention, so that crops teach it all it needs.

    Args:
        config: its shape.
        resolution: pixels a side of the photographs, for its configuration.

    Raises:
        TrainingError: widths that its normalisation groups do not divide.
    """
    if not config.channels or any(width < 1 or width % config.groups for width in config.channels):
        raise TrainingError(
            f"--channels {','.join(map(str, config.channels))}",
            allowed=f"one or more multiples of {config.groups}, from full resolution down",
            remedy="e.g. --channels 32,64,96",
        )
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
        vae.quant_conv.bias[config.latent_channels :].fill_(INITIAL_LOG_VARIANCE)
        vae.quant_conv.weight[config.latent_channels :].mul_(0.1)
    return vae


def load_trainable_vae(folder: Path) -> AutoencoderKL:
    """Load a trained autoencoder to train it on: a folder in diffusers layout, or a hub id.

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


def load_average(run: Path) -> AutoencoderKL:
    """Load the averaged autoencoder of the last checkpoint of a run.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
    """
    checkpoints, content = list_checkpoints(run), read_run_config(run)
    if not checkpoints or content.get("task") != "vae":
        raise CheckpointError(
            f"{run} is no run of flowturbo-train vae",
            allowed="a folder with config.json and a checkpoint",
            remedy="check the path, or wait for the first checkpoint",
        )
    config = {**content["vae"], "channels": tuple(content["vae"]["channels"])}
    vae = build_vae(VaeConfig(**config), content["resolution"])
    vae.load_state_dict(read_tensors(checkpoints[-1][1]))
    return vae


class VaeBatch(NamedTuple):
    """Photographs [B, 3, K, K] in −1 … 1, noise of their latents [B, C, H, W], and rows that are also at half scale."""

    images: Tensor
    noise: Tensor
    half_scale_indices: Tensor


class VaeTask:
    """Reconstruction, KL and scale equivariance of an autoencoder on photographs."""

    def __init__(
        self,
        vae: AutoencoderKL,
        photographs: Photographs,
        config: VaeConfig,
        seed: int,
        perceptual: Lpips | None = None,
        init: Path | None = None,
    ) -> None:
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        side = config.crop or photographs.resolution
        if side > photographs.resolution or side % (2 * factor if config.equivariance else factor):
            raise TrainingError(
                f"training squares of {side} pixels from photographs of {photographs.resolution}",
                allowed=f"--crop up to {photographs.resolution}, a multiple of {factor} (the VAE's pixels per latent), "
                "and of twice that with --equivariance",
                remedy=f"e.g. --crop {4 * factor}",
            )
        self.vae, self.photographs, self.config, self.seed = vae, photographs, config, seed
        self.perceptual, self.factor, self.side, self.init = perceptual, factor, side, init
        self.vae.to(memory_format=torch.channels_last)
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(not config.freeze_encoder)

    @property
    def network(self) -> nn.Module:
        """The module that is trained."""
        module: nn.Module = self.vae
        return module

    def to(self, device: torch.device) -> None:
        """Move the network and all that its losses need."""
        self.vae.to(device)
        if self.perceptual is not None:
            self.perceptual.to(device)

    def describe(self) -> dict[str, object]:
        """Return everything beside the loop's options that is needed to repeat the run."""
        files: dict[str, dict[str, str]] = {}
        if self.init:  # a folder's weights by hash, a hub's VAE by name
            weights = sorted(self.init.glob("diffusion_pytorch_model.*"))
            files["init"] = describe_file(weights[-1]) if weights else {"name": str(self.init)}
        return {
            "task": "vae",
            "vae": asdict(self.config),
            "data": self.photographs.listing.describe(),
            "resolution": self.photographs.resolution,
            "files": files,
        }

    def list_unreadable(self) -> dict[str, str]:
        """Return the files that could not be read so far, and why."""
        return self.photographs.list_unreadable()

    def load_batch(self, microbatch: Microbatch) -> VaeBatch:
        """Return random squares, half of them mirrored; every 1/equivariance-th is also shown at half scale."""
        pixels, _ = self.photographs.read_batch(sample_indices(self.seed, microbatch.positions, len(self.photographs)))
        side, latent_side, channels = self.side, self.side // self.factor, self.vae.config.latent_channels
        crops, noise = [], []
        for image, position in zip(pixels, microbatch.positions, strict=True):
            g = make_generator(self.seed, position)
            top, left = g.integers(0, image.shape[0] - side + 1, size=2)
            crop = image[top : top + side, left : left + side]
            crops.append(crop[:, ::-1] if g.random() < 0.5 else crop)
            noise.append(g.standard_normal((channels, latent_side, latent_side), dtype=np.float32))
        images = torch.from_numpy(normalise_pixels(np.stack(crops))).contiguous(memory_format=torch.channels_last)
        fraction = self.config.equivariance
        half_scale_indices = [
            row for row, p in enumerate(microbatch.positions) if int((p + 1) * fraction) > int(p * fraction)
        ]
        return VaeBatch(images, torch.from_numpy(np.stack(noise)), torch.tensor(half_scale_indices, dtype=torch.int64))

    def compute_losses(self, batch: VaeBatch) -> Losses:
        """Return the loss and its parts: reconstruction error, KL divergence, error at half scale."""
        images = batch.images
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * batch.noise
        error = self._compute_error(self.vae.decode(latents).sample, images).mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = error + self.config.kl * kl
        metrics: Losses = {"error": error.detach(), "kl": kl.detach(), "latent_std": posterior.mean.detach().std()}
        if self.config.equivariance:
            metrics["scale_error"] = torch.zeros_like(error.detach())
            if len(batch.half_scale_indices):
                small = self.vae.decode(F.avg_pool2d(latents[batch.half_scale_indices], 2)).sample
                # A sum over the rows that have one, over the size of the batch: so a split batch gives the same.
                scale_error = self._compute_error(small, F.avg_pool2d(images[batch.half_scale_indices], 2)).sum() / len(
                    images
                )
                loss = loss + scale_error
                metrics["scale_error"] = scale_error.detach() / self.config.equivariance
        return {"loss": loss, **metrics}

    def _compute_error(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Return the reconstruction error of each image: [B]."""
        difference = (decoded - images).float().flatten(1)
        absolute = difference.abs().mean(dim=1)
        # As sd-vae-ft-mse: mostly squared error. The small L1 keeps edges from washing out altogether.
        error = absolute if self.config.loss == "l1" else 10 * difference.square().mean(dim=1) + 0.1 * absolute
        if self.perceptual is not None and decoded.shape[-1] >= MIN_LPIPS_SIDE:
            error = error + self.config.lpips * self.perceptual(decoded, images)
        return error

    @torch.no_grad()
    def render_preview(self, ema: nn.Module) -> tuple[Pixels, int]:
        """Return rows of originals above their reconstructions."""
        step = max(1, len(self.photographs) // PREVIEW_COUNT)
        pixels, _ = self.photographs.read_batch(range(0, len(self.photographs), step)[:PREVIEW_COUNT])
        reconstructions = reconstruct(ema, torch.from_numpy(normalise_pixels(pixels)).to(next(ema.parameters()).device))
        return np.concatenate([pixels, to_pixels(reconstructions.cpu().numpy())]), len(pixels)

    def save_result(self, ema: nn.Module, out: Path) -> Path:
        """Save `out/vae` in diffusers' layout, and the same weights as `out/final.safetensors`.

        The scaling factor is measured unless the encoder is frozen.
        """
        assert isinstance(ema, AutoencoderKL)
        if not self.config.freeze_encoder:
            # It is measured on the encoder's own latents: statistics of an --init no longer hold.
            scaling = measure_scaling_factor(ema, self.photographs)
            ema.register_to_config(scaling_factor=scaling, latents_mean=None, latents_std=None)
        with report_write_errors(out / "vae"):
            ema.save_pretrained(out / "vae")
        config = {key: value for key, value in ema.config.items() if not key.startswith("_")}
        save_weights(out / "final.safetensors", ema, {"role": "vae", "config": config})
        return out / "vae"


@torch.no_grad()
def reconstruct(vae: Any, images: Tensor) -> Tensor:
    """Return images through the posterior's mean and back: [B, 3, R, R] in −1 … 1."""
    reconstructions: Tensor = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return reconstructions


@torch.no_grad()
def measure_scaling_factor(vae: Any, photographs: Photographs, count: int = 1024) -> float:
    """Return 1 / standard deviation of the sampled latents of up to `count` photographs, spread over the classes."""
    indices = np.linspace(0, len(photographs) - 1, min(count, len(photographs))).astype(np.int64)
    value_sum = square_sum = num_elements = 0.0
    for first in range(0, len(indices), 64):
        pixels, _ = photographs.read_batch(indices[first : first + 64])
        posterior = vae.encode(torch.from_numpy(normalise_pixels(pixels)).to(vae.device)).latent_dist
        value_sum += float(posterior.mean.sum())
        square_sum += float((posterior.mean.square() + posterior.var).sum())
        num_elements += posterior.mean.numel()
    return float(num_elements / (num_elements * square_sum - value_sum**2) ** 0.5)
