"""Samples for a look while training, in PyTorch. Deployed sampling is the runtime's business.

Letters: B images, C latent channels, H = W latent side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowturbo.data.photographs import Pixels, to_pixels
from flowturbo.flow import guided_rows
from flowturbo.models.sit import SiT
from flowturbo.models.vae import Vae
from runtime.sampling.blocks import Schedule, flowturbo_plan
from runtime.sampling.guidance import REFERENCE_CHANNELS
from runtime.sampling.plan import integrate


def guided(model: SiT, x: Tensor, t: Tensor, y: Tensor, scale: float, channels: int = REFERENCE_CHANNELS) -> Tensor:
    """Velocity under classifier-free guidance of the first `channels` channels, three as in the reference."""
    if scale == 1:
        plain: Tensor = model(x, t, y)
        return plain
    null = torch.full_like(y, model.config.classes)
    rows = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
    return guided_rows(rows, scale, channels)[: len(x)]


@torch.no_grad()
def heun(model: SiT, noise: Tensor, y: Tensor, steps: int, scale: float, channels: int = REFERENCE_CHANNELS) -> Tensor:
    """Latents [B, C, H, W] after `steps` Heun steps from t = 0 to t = 1."""
    x, h = noise, 1 / steps
    for i in range(steps):
        t = torch.full((len(x),), i * h, device=x.device)
        slope = guided(model, x, t, y, scale, channels)
        end = guided(model, x + h * slope, t + h, y, scale, channels)
        x = x + h / 2 * (slope + end)
    return x


@torch.no_grad()
def flowturbo(predictor: SiT, refiner: SiT, noise: Tensor, y: Tensor, schedule: Schedule, scale: float) -> Tensor:
    """Latents [B, C, H, W] by the deployed sampler's own plan, both networks guided."""
    labels = torch.cat([y, torch.full_like(y, predictor.config.classes)])

    def rows(network: SiT, points: Tensor, t: float) -> Tensor:
        return guided_rows(network(points, torch.full((len(points),), t, device=points.device), labels), scale)

    latents: Tensor = integrate(
        flowturbo_plan(schedule),
        noise,
        lambda x, t: rows(predictor, torch.cat([x, x]), t),
        lambda x, t, v, add: rows(refiner, torch.cat([torch.cat([x, x]), v], dim=1), t) + add,
    )
    return latents


@torch.no_grad()
def decode(vae: Vae, latents: Tensor) -> Pixels:
    """Sampled latents [B, C, H, W] to 8-bit [B, R, R, 3]."""
    return to_pixels(vae.decode(latents).cpu().numpy() * 2 - 1)
