"""Guided rows in plain PyTorch, as the reference samplers form them: what engines are compared with.

Letters: B images, N rows (B ≤ N ≤ 2B), C latent channels, H = W latent side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.guidance import Rows

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Velocity at x [N, C or 2C, H, W], flow time t [N], labels y [N]: [N, C, H, W]."""


def rows_velocity(network: Network, rows: Rows) -> Callable[[Tensor, Tensor | float, Tensor | None], Tensor]:
    """Guided rows of a network: (x [B, C, H, W], t, v) -> [N, C, H, W].

    v [N, C, H, W] is what a refiner reads, None for a predictor. Differentiable in x, and in t where it is a tensor.
    """
    labels, pair, mix = (
        torch.from_numpy(rows.labels).long(),
        torch.from_numpy(rows.pair).long(),
        torch.from_numpy(rows.mix),
    )

    def evaluate(x: Tensor, t: Tensor | float, v: Tensor | None) -> Tensor:
        points = x[pair.to(x.device)]
        if v is not None:
            points = torch.cat([points, v], dim=1)
        times = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(labels))
        out = network(points, times, labels.to(x.device))
        return torch.einsum("cnm,mchw->nchw", mix.to(x.device), out)

    return evaluate
