"""Layers of a SiT that compute in PyTorch what a deployed engine computes: rounded to int8, or to float16.

What a quantised layer gives here and in ONNX Runtime on float32 differs by rounding of float32 alone (a test holds it;
files on float16 have their steps in that type, too), so whole trajectories of any choice of layers are measured
without exporting one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibration.lowbit.histogram import LEVELS
from export.lowbit.casting import SOFTMAX
from export.lowbit.ranges import Ranges
from export.lowbit.rounding import quantise_weight
from flowturbo.models.sit import Attention, SiT


def fake_quantise(x: Tensor, clip: float) -> Tensor:
    """x on a symmetric int8 scale whose largest step is `clip`."""
    step = clip / LEVELS
    return (x / step).round().clamp(-LEVELS - 1, LEVELS) * step


def fake_quantise_weight(weight: Tensor) -> Tensor:
    """A weight [out, in] on the int8 scales that the engine's has."""
    integers, steps = quantise_weight(weight.numpy().T)
    return torch.from_numpy(np.ascontiguousarray((integers * steps).T))


def round_to_float16(x: Tensor) -> Tensor:
    """x as float16 holds it: what is out of range becomes infinite."""
    return x.half().float()


class Int8Linear(nn.Module):
    """A layer with int8 weights and inputs.

    Args:
        clip: largest input that is kept, of the equalised input.
        equaliser: [in] what the input is divided by.
    """

    def __init__(self, layer: nn.Linear, clip: float, equaliser: Tensor) -> None:
        super().__init__()
        self.weight = fake_quantise_weight(layer.weight.detach() * equaliser)
        self.bias, self.clip, self.inverse = layer.bias.detach(), clip, 1 / equaliser

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(fake_quantise(x * self.inverse, self.clip), self.weight, self.bias)


class Float16Linear(nn.Module):
    """A layer whose weights, input and output are rounded to float16; sums are kept in float32, as GPUs keep them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = round_to_float16(layer.weight.detach()), round_to_float16(layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return round_to_float16(F.linear(round_to_float16(x), self.weight, self.bias))


class Float16SoftmaxAttention(Attention):
    """Attention whose scores and softmax are rounded to float16."""

    def _attend_unfused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = round_to_float16(round_to_float16(q * q.shape[-1] ** -0.5) @ round_to_float16(k).transpose(-2, -1))
        return round_to_float16(round_to_float16(scores.softmax(dim=-1)) @ round_to_float16(v))


def make_int8_layers(
    networks: Mapping[str, SiT], ranges: Ranges, method: str, *, equalised: bool
) -> dict[str, nn.Module]:
    """The quantised twin of every layer, by name."""
    layers: dict[str, nn.Module] = {}
    for name, layer_ranges in ranges.layers.items():
        role, _, path = name.partition("/")
        if role not in networks:
            continue  # a calibration with a refiner serves a deployment without one, as it does a build
        layer = networks[role].get_submodule(path)
        assert isinstance(layer, nn.Linear)
        equaliser = torch.from_numpy(layer_ranges.equaliser.copy()) if equalised else torch.ones(layer.in_features)
        layers[name] = Int8Linear(layer, layer_ranges.select_clip(method, equalised=equalised), equaliser)
    return layers


def replace_clips(
    layers: Mapping[str, nn.Module], ranges: Ranges, method: str, *, equalised: bool
) -> dict[str, nn.Module]:
    """Layers of `make_int8_layers` with another method's clips; they share weights, which do not depend on it."""
    clipped: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        quantised_layer = copy.copy(layer)
        assert isinstance(quantised_layer, Int8Linear)
        quantised_layer.clip = ranges.layers[name].select_clip(method, equalised=equalised)
        clipped[name] = quantised_layer
    return clipped


def make_float16_layers(networks: Mapping[str, SiT], names: Iterable[str]) -> dict[str, nn.Module]:
    """The float16 twin of every layer and softmax, by name."""
    layers: dict[str, nn.Module] = {}
    for name in names:
        role, _, path = name.partition("/")
        if path.endswith(SOFTMAX):
            layers[name] = _make_float16_softmax(networks[role].get_submodule(path.removesuffix(".softmax")))
        else:
            layer = networks[role].get_submodule(path)
            assert isinstance(layer, nn.Linear)
            layers[name] = Float16Linear(layer)
    return layers


def _make_float16_softmax(attention: nn.Module) -> nn.Module:
    assert isinstance(attention, Attention)
    quantised_attention = Float16SoftmaxAttention.__new__(Float16SoftmaxAttention)
    quantised_attention.__dict__ = {**attention.__dict__, "_modules": attention._modules, "is_unfused": True}
    return quantised_attention


@contextmanager
def replace_layers(networks: Mapping[str, SiT], layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The networks with these layers in place of their own, until the block ends."""
    originals: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        # Softmaxes first: their twin is the whole attention, and its layers are then replaced inside it.
        for name, layer in sorted(layers.items(), key=lambda item: not item[0].endswith(SOFTMAX)):
            role, _, path = name.removesuffix(".softmax").partition("/")
            owner, _, child = path.rpartition(".")
            parent = networks[role].get_submodule(owner)
            originals.append((parent, child, parent.get_submodule(child)))
            setattr(parent, child, layer)
        yield
    finally:
        for parent, child, layer in reversed(originals):
            setattr(parent, child, layer)
