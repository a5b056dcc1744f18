"""Cast networks to the type of their graphs; in 16 bits some parts stay in float32 ("float32 islands").

A trunk keeps the layers and softmaxes that a search chose, an autoencoder all its normalisations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.graphs.engine_graphs import make_deployable
from export.lowbit.equalise import collect_scales, fold_scales, insert_input_scales
from export.lowbit.recipe import Recipe
from flowturbo.models.sit import Attention, SiT
from flowturbo.models.vae import Vae
from runtime.system.errors import RequestError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SOFTMAX = "attn.softmax"


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever goes in, and returns the type of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight, self.bias).to(input.dtype)


class Float32GroupNorm(nn.GroupNorm):
    """A GroupNorm that computes in float32 whatever goes in: sums of squares leave the range of float16."""

    def forward(self, input: Tensor) -> Tensor:
        normed = F.group_norm(input.float(), self.num_groups, self.weight, self.bias, self.eps)
        return normed.to(input.dtype)


def cast_network(network: SiT, dtype: torch.dtype) -> SiT:
    """Return a deployable copy in `dtype`; `guard.check_weights` checks before that its weights fit."""
    network = make_deployable(network)
    if dtype == torch.float32:
        return network
    with torch.device("meta"):
        cast_copy = make_deployable(SiT(network.config))
    cast_copy.load_state_dict({name: t.to(dtype) for name, t in network.state_dict().items()}, assign=True)
    return cast_copy.requires_grad_(False)


def equalise_network(network: SiT, role: str, recipe: Recipe, dtype: torch.dtype = torch.float32) -> SiT:
    """Return a deployable copy in `dtype`, equalised if the recipe says so: it computes the same either way."""
    if not recipe.is_equalised or recipe.ranges is None:
        return cast_network(network, dtype)
    scales = collect_scales(recipe.ranges, role, recipe.wide)
    return insert_input_scales(cast_network(fold_scales(network, scales), dtype), scales)


def cast_vae(vae: Vae, graph_class: Callable[[Vae, torch.dtype], nn.Module], dtype: torch.dtype) -> nn.Module:
    """Return a graph of an autoencoder in `dtype`, with its normalisations in float32."""
    if dtype == torch.float32:
        return graph_class(vae, dtype)
    module = restore_float32_norms(copy.deepcopy(vae.module).to(dtype))
    return graph_class(replace(vae, module=module), dtype)


def restore_float32_layers(network: SiT, float32_network: SiT, parts: Iterable[str]) -> SiT:
    """Put parts of a network, already cast, back to float32; this changes it in place.

    Args:
        float32_network: the same network in float32, from which the islands take their weights.
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
        island.weight = nn.Parameter(float32_layer.weight.detach().float(), False)
        island.bias = nn.Parameter(float32_layer.bias.detach().float(), False)
        setattr(parent, name, island)
    return network


def restore_float32_norms(module: nn.Module) -> nn.Module:
    """Put every GroupNorm of a module, already cast to 16 bits, back to float32; this changes it in place."""
    for part in list(module.modules()):
        for name, child in part.named_children():
            if type(child) is nn.GroupNorm:
                norm = Float32GroupNorm(child.num_groups, child.num_channels, child.eps, affine=child.affine)
                norm.load_state_dict({key: value.float() for key, value in child.state_dict().items()})
                setattr(part, name, norm.eval().requires_grad_(False))
    return module
