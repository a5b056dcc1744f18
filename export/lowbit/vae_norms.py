"""Float32 islands for autoencoders: a network cast to 16 bits keeps its normalisations in float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Float32GroupNorm(nn.GroupNorm):
    """A GroupNorm that computes in float32 whatever goes in: sums of squares leave the range of float16."""

    def forward(self, input: Tensor) -> Tensor:
        normed = F.group_norm(input.float(), self.num_groups, self.weight, self.bias, self.eps)
        return normed.to(input.dtype)


def restore_float32_norms(module: nn.Module) -> nn.Module:
    """Puts every GroupNorm of a module, already cast to 16 bits, back to float32; changes it in place."""
    for part in list(module.modules()):
        for name, child in part.named_children():
            if type(child) is nn.GroupNorm:
                norm = Float32GroupNorm(child.num_groups, child.num_channels, child.eps, affine=child.affine)
                norm.load_state_dict({key: value.float() for key, value in child.state_dict().items()})
                setattr(part, name, norm.eval().requires_grad_(False))
    return module
