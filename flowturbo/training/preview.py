"""Samples for a look while training, in PyTorch. Deployed sampling is the runtime's business.

Letters: B images, C latent channels, H = W latent side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowturbo.data.photographs import Pixels, to_pixels
from flowturbo.flow import guide_velocities
from flowturbo.models.sit import SiT
from flowturbo.models.vae import Vae
from runtime.sampling.blocks import BlockSchedule, plan_flowturbo
from runtime.sampling.guidance import REFERENCE_CHANNELS
from runtime.sampling.plan import integrate


def predict_guided_velocity(
    model: SiT, x: Tensor, t: Tensor, y: Tensor, scale: float, channels: int = REFERENCE_CHANNELS
) -> Tensor:
    """Velocity under classifier-free guidance of the first `channels` channels, three as in the reference."""
    if scale == 1:
        velocity: Tensor = model(x, t, y)
        return velocity
    null = torch.full_like(y, model.config.classes)
    velocities = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
    return guide_velocities(velocities, scale, channels)[: len(x)]


@torch.no_grad()
def sample_heun(
    model: SiT, noise: Tensor, y: Tensor, steps: int, scale: float, channels: int = REFERENCE_CHANNELS
) -> Tensor:
    """Latents [B, C, H, W] after `steps` Heun steps from t = 0 to t = 1."""
    x, h = noise, 1 / steps
    for i in range(steps):
        t = torch.full((len(x),), i * h, device=x.device)
        slope = predict_guided_velocity(model, x, t, y, scale, channels)
        end = predict_guided_velocity(model, x + h * slope, t + h, y, scale, channels)
        x = x + h / 2 * (slope + end)
    return x


@torch.no_grad()
def sample_flowturbo(
    predictor: SiT, refiner: SiT, noise: Tensor, y: Tensor, schedule: BlockSchedule, scale: float
) -> Tensor:
    """Latents [B, C, H, W] by the deployed sampler's own plan, both networks guided."""
    labels = torch.cat([y, torch.full_like(y, predictor.config.classes)])

    def evaluate_branches(network: SiT, points: Tensor, t: float) -> Tensor:
        return guide_velocities(network(points, torch.full((len(points),), t, device=points.device), labels), scale)

    latents: Tensor = integrate(
        plan_flowturbo(schedule),
        noise,
        lambda x, t: evaluate_branches(predictor, torch.cat([x, x]), t),
        lambda x, t, v, add: evaluate_branches(refiner, torch.cat([torch.cat([x, x]), v], dim=1), t) + add,
    )
    return latents


@torch.no_grad()
def decode_latents(vae: Vae, latents: Tensor) -> Pixels:
    """Sampled latents [B, C, H, W] to 8-bit [B, R, R, 3]."""
    return to_pixels(vae.decode(latents).cpu().numpy() * 2 - 1)
