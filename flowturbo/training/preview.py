"""Samples for a look while training: guided Heun in PyTorch. Deployed sampling is the runtime's business.

Letters: B images, C latent channels, H = W latent side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowturbo.data import Pixels, to_pixels
from flowturbo.models.sit import SiT
from flowturbo.models.vae import Vae


def noise_of_seeds(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """The runtime's convention, one stream per image: [B, C, H, W]."""
    streams = (np.random.Generator(np.random.Philox(seed)) for seed in seeds)
    return torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in streams]))


def guided(model: SiT, x: Tensor, t: Tensor, y: Tensor, scale: float, channels: int = 3) -> Tensor:
    """Velocity under classifier-free guidance of the first `channels` channels, three as in the reference."""
    if scale == 1:
        plain: Tensor = model(x, t, y)
        return plain
    null = torch.full_like(y, model.config.classes)
    with_label, without = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
    mixed = without + scale * (with_label - without)
    return torch.cat([mixed[:, :channels], with_label[:, channels:]], dim=1)


@torch.no_grad()
def heun(model: SiT, noise: Tensor, y: Tensor, steps: int, scale: float, channels: int = 3) -> Tensor:
    """Latents [B, C, H, W] after `steps` Heun steps from t = 0 to t = 1."""
    x, h = noise, 1 / steps
    for i in range(steps):
        t = torch.full((len(x),), i * h)
        slope = guided(model, x, t, y, scale, channels)
        end = guided(model, x + h * slope, t + h, y, scale, channels)
        x = x + h / 2 * (slope + end)
    return x


@torch.no_grad()
def decode(vae: Vae, latents: Tensor) -> Pixels:
    """Sampled latents [B, C, H, W] to 8-bit [B, R, R, 3]."""
    return to_pixels(vae.decode(latents).numpy() * 2 - 1)
