"""Guided rows in plain PyTorch, as the reference samplers form them: what engines are compared with.

Letters: B images, N rows (B ≤ N ≤ 2B), C latent channels, H = W latent side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.sampling.guidance import BranchBatch

VelocityNetwork = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Velocity at x [N, C or 2C, H, W], flow time t [N], labels y [N]: [N, C, H, W]."""


GuidedVelocity = Callable[[Tensor, Tensor | float, Tensor | None], Tensor]
"""Guided rows [N, C, H, W] at x [B, C, H, W] and t; v [N, C, H, W] is what a refiner reads, None for a predictor."""


def build_guided_velocity(
    network: VelocityNetwork, branches: BranchBatch, device: torch.device | str = "cpu"
) -> GuidedVelocity:
    """Guided rows of a network on `device`; made once for all evaluations. Differentiable in x, and in a tensor t."""
    labels = torch.from_numpy(branches.labels).long().to(device)
    row_image = torch.from_numpy(branches.row_image).long().to(device)
    mix = torch.from_numpy(branches.mix).to(device)

    def evaluate(x: Tensor, t: Tensor | float, v: Tensor | None) -> Tensor:
        points = x[row_image]
        if v is not None:
            points = torch.cat([points, v], dim=1)
        times = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(labels))
        return torch.einsum("cnm,mchw->nchw", mix, network(points, times, labels))

    return evaluate
