"""Muon: momentum whose update is made orthogonal, for hidden matrices.

Jordan et al. 2024, kellerjordan.github.io/posts/muon.

Unlike torch.optim.Muon this one iterates in float32 (bfloat16 is slower on CPUs without AMX) and on all matrices of
one shape at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Nearly the closest semi-orthogonal matrix to each of [n, rows, columns], by Newton–Schulz iteration."""
    a, b, c = QUINTIC
    is_wide = matrices.shape[1] <= matrices.shape[2]
    x: Tensor = matrices if is_wide else matrices.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x if is_wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, and scaled to the size of AdamW's updates so that rates compare."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                update = orthogonalise(torch.stack([self._update_momentum(p, group["momentum"]) for p in params]))
                scale = -group["lr"] * 0.2 * max(shape) ** 0.5
                for p, u in zip(params, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=scale)

    def _update_momentum(self, p: Tensor, momentum: float) -> Tensor:
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)
