"""AdamW, or Muon for the hidden matrices beside AdamW for the rest (Jordan et al. 2024)."""

from __future__ import annotations

import torch
from torch import nn

from flowturbo.training.config import LoopConfig
from flowturbo.training.muon import Muon


def make_optimizers(network: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of the parameters that want gradients; each group carries its peak rate as `peak_lr`."""
    hidden, rest = _split_parameters(network) if config.optimizer == "muon" else ([], _list_trainable(network))
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
    """Sets every group to `scale` times its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def _list_trainable(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def _split_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights of the linear layers inside blocks, and everything else.

    The rest: embeddings, biases, the first and last layers, and adaLN, whose matrices start at zero.
    """
    hidden = [
        p
        for name, p in network.named_parameters()
        if p.requires_grad and p.ndim == 2 and name.startswith("blocks.") and "adaLN" not in name
    ]
    hidden_ids = {id(p) for p in hidden}
    return hidden, [p for p in _list_trainable(network) if id(p) not in hidden_ids]
