"""What changes weights: AdamW, or Muon for the hidden matrices beside AdamW for the rest; and the weights' average."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flowturbo.training.config import LoopConfig

QUINTIC = (3.4445, -4.7750, 2.0315)


class Ema:
    """Exponential moving average of a network's weights.

    The decay rises from 0.1 to `decay` like (1 + n) / (10 + n), so that the random initial weights do not linger in
    short runs.

    Attributes:
        network: a copy with the averaged weights.
        decay: its final decay.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move the average towards the weights after step number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[torch.Tensor] = list(self.network.parameters())
        torch._foreach_lerp_(averages, list(network.parameters()), 1 - decay)
        for average, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(buffer)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Return nearly the closest semi-orthogonal matrix to each of [n, rows, columns], by Newton–Schulz iteration."""
    a, b, c = QUINTIC
    is_wide = matrices.shape[1] <= matrices.shape[2]
    x: Tensor = matrices if is_wide else matrices.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x if is_wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, for hidden matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Updates are scaled to the size of AdamW's, so that learning rates compare. Unlike torch.optim.Muon, this one
    iterates in float32 (bfloat16 is slower on CPUs without AMX) and on all matrices of one shape at once.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, tuple[list[Tensor], list[Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer: Tensor = state["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                params, updates = by_shape.setdefault(p.shape, ([], []))
                params.append(p)
                updates.append(p.grad.lerp(buffer, group["momentum"]))
            for shape, (params, updates) in by_shape.items():
                scale = -group["lr"] * 0.2 * max(shape) ** 0.5
                for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=scale)


def make_optimizers(network: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """Return the optimisers of the parameters that need gradients; each group has its peak rate as `peak_lr`.

    Muon gets the weights of the linear layers inside blocks. AdamW gets embeddings, biases, the first and last layers,
    and adaLN, since its matrices start at zero.
    """
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in network.named_parameters():
        is_hidden = p.ndim == 2 and name.startswith("blocks.") and "adaLN" not in name
        if p.requires_grad:
            (hidden if is_hidden and config.optimizer == "muon" else rest).append(p)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True)
    ]
    if hidden:
        optimizers.append(Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    """Set every group to `scale` times its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
