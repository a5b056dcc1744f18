"""Equalise layers: divide each channel of a layer's input by a constant, and multiply its weight's column by it.

SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, eq. 3) for a SiT: Y = (X / s)·(s·W). The network computes the same;
only its channels have like ranges now, so that one clip fits them all. Where the division goes:

- `attn.qkv` and `mlp.fc1` read norm(x)·(1 + scale) + shift: both vectors are divided where they are made, in the last
  linear layer of the conditioning, and cost nothing in the trunk;
- `attn.proj` reads Σ softmax·v, which is linear in v: into the value rows of `attn.qkv`;
- `mlp.fc2` reads a GELU, through which nothing can be folded: one product per channel stays in the trunk.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.lowbit.ranges import Ranges
from flowturbo.models.sit import Block, SiT

Scales = Mapping[str, Tensor]
"""Layer without its network (`blocks.0.mlp.fc1`) → [C] divisors of its input."""


class ScaledLinear(nn.Linear):
    """A linear layer that divides its input channel by channel first."""

    inverse: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input * self.inverse, self.weight, self.bias)


def collect_scales(ranges: Ranges, role: str, wide: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Return the divisors of a network's layers; those without any, and those that stay wide, are left out."""
    scales = {}
    for layer, layer_ranges in ranges.layers.items():
        network, _, name = layer.partition("/")
        if network == role and layer not in wide and bool((layer_ranges.equaliser != 1).any()):
            scales[name] = torch.from_numpy(layer_ranges.equaliser.copy())  # arrays of a file may be read-only
    return scales


def fold_scales(network: SiT, scales: Scales) -> SiT:
    """Return a copy with the divisions folded into its weights; those of `mlp.fc2` need `insert_input_scales`."""
    folded = copy.deepcopy(network)
    with torch.no_grad():
        for index, block in enumerate(folded.blocks):
            assert isinstance(block, Block)
            divisors = {part: scales.get(f"blocks.{index}.{part}") for part in ("attn.qkv", "attn.proj", "mlp.fc1")}
            if (s := divisors["attn.qkv"]) is not None:
                block.attn.qkv.weight.mul_(s)
                _divide_modulation(block, 0, s)
            if (s := divisors["mlp.fc1"]) is not None:
                block.mlp.fc1.weight.mul_(s)
                _divide_modulation(block, 3, s)
            if (s := divisors["attn.proj"]) is not None:
                block.attn.proj.weight.mul_(s)
                values = slice(2 * len(s), None)  # the rows are queries, keys, values
                block.attn.qkv.weight[values].div_(s[:, None])
                block.attn.qkv.bias[values].div_(s)
            if (s := scales.get(f"blocks.{index}.mlp.fc2")) is not None:
                block.mlp.fc2.weight.mul_(s)
    return folded


def insert_input_scales(network: SiT, scales: Scales) -> SiT:
    """Put the divisions of `mlp.fc2` into a network that is cast and about to be traced; this changes it in place."""
    for index, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        s = scales.get(f"blocks.{index}.mlp.fc2")
        if s is not None:
            plain_linear = block.mlp.fc2
            scaled = ScaledLinear(plain_linear.in_features, plain_linear.out_features, device="meta")
            scaled.weight, scaled.bias = plain_linear.weight, plain_linear.bias
            scaled.register_buffer("inverse", (1 / s).to(plain_linear.weight.dtype))
            block.mlp.fc2 = scaled
    return network


def _divide_modulation(block: Block, first: int, s: Tensor) -> None:
    """Turn the vectors at `first` and `first + 1` of a block's six into shift / s and (1 + scale) / s − 1."""
    linear, width = block.adaLN_modulation[1], len(s)
    assert isinstance(linear, nn.Linear)
    shift, scale = (slice((first + k) * width, (first + k + 1) * width) for k in (0, 1))
    linear.bias[scale].add_(1)
    for rows in (shift, scale):
        linear.weight[rows].div_(s[:, None])
        linear.bias[rows].div_(s)
    linear.bias[scale].sub_(1)
