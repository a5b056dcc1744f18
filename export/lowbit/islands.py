"""Float32 islands of a trunk in 16 bits: layers and softmaxes that a search chose to keep wide."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from flowturbo.models.sit import Attention, SiT
from runtime.system.errors import RequestError

SOFTMAX = "attn.softmax"


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever goes in, and gives back the type that it was given."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight, self.bias).to(input.dtype)


def restore_float32_layers(network: SiT, float32_network: SiT, parts: Iterable[str]) -> SiT:
    """Puts parts of a network, already cast, back to float32; changes it in place.

    Args:
        float32_network: the same network in float32, whose weights the islands take.
        parts: `blocks.0.mlp.fc1`, `blocks.0.attn.softmax`, …

    Raises:
        RequestError: a part is not in the network.
    """
    for part in parts:
        owner, _, name = part.rpartition(".")
        try:
            parent = network.get_submodule(owner)
            if part.endswith(SOFTMAX) and isinstance(parent, Attention):
                parent.float32_softmax = True
                continue
            float32_layer = float32_network.get_submodule(part)
            assert isinstance(float32_layer, nn.Linear)
        except (AttributeError, AssertionError) as error:
            raise RequestError(
                f"the choice keeps {part}, which the network lacks",
                remedy="search again: flowturbo-calibrate sensitivity",
            ) from error
        island = Float32Linear(float32_layer.in_features, float32_layer.out_features, device="meta")
        island.weight, island.bias = (
            nn.Parameter(float32_layer.weight.detach().float(), False),
            nn.Parameter(float32_layer.bias.detach().float(), False),
        )
        setattr(parent, name, island)
    return network
