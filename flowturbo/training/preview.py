"""Sample previews while training, in PyTorch, and decode them.

Letters: B images, C latent channels, H = W latent side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowturbo.data.photographs import Pixels, to_pixels
from flowturbo.models.sit import SiT
from flowturbo.models.vae import Vae
from flowturbo.torch_sampler import make_conditions, sample
from runtime.sampling.blocks import BlockSchedule, plan_flowturbo
from runtime.sampling.grids import build_uniform_grid
from runtime.sampling.guidance import REFERENCE_CHANNELS
from runtime.sampling.solvers import plan_heun


def sample_heun(
    model: SiT, noise: Tensor, y: Tensor, steps: int, scale: float, channels: int = REFERENCE_CHANNELS
) -> Tensor:
    """Return latents [B, C, H, W] after `steps` Heun steps; the first `channels` channels are guided."""
    conditions = make_conditions(y.tolist(), [scale] * len(y), model.config.find_null_label(scale))
    plan = plan_heun(build_uniform_grid(steps))
    return sample({"predictor": model}, plan, conditions, noise, guided_channels=channels)


def sample_flowturbo(
    predictor: SiT, refiner: SiT, noise: Tensor, y: Tensor, schedule: BlockSchedule, scale: float
) -> Tensor:
    """Return latents [B, C, H, W] of a schedule of blocks, both networks guided."""
    conditions = make_conditions(y.tolist(), [scale] * len(y), predictor.config.find_null_label(scale))
    return sample({"predictor": predictor, "refiner": refiner}, plan_flowturbo(schedule), conditions, noise)


@torch.no_grad()
def decode_latents(vae: Vae, latents: Tensor) -> Pixels:
    """Return the 8-bit images [B, R, R, 3] of sampled latents [B, C, H, W]."""
    return to_pixels(vae.decode(latents).cpu().numpy() * 2 - 1)
