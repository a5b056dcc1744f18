"""Compute in PyTorch what the low-precision layers of a deployed engine compute: rounded to int8, or to float16.

A quantised layer here and in ONNX Runtime on float32 differ by rounding of float32 alone; a test checks it. So whole
trajectories of any choice of layers are measured without exporting one. Files on float16 have their steps in that type.
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
from calibration.model import find_linear
from export.lowbit.casting import SOFTMAX
from export.lowbit.ranges import Ranges
from export.lowbit.rounding import quantise_weight
from flowturbo.models.sit import Attention, SiT


def fake_quantise(x: Tensor, clip: float) -> Tensor:
    """Round x to a symmetric int8 scale of largest value `clip`."""
    step = clip / LEVELS
    return (x / step).round().clamp(-LEVELS - 1, LEVELS) * step


def fake_quantise_weight(weight: Tensor) -> Tensor:
    """Round a weight [out, in] to the int8 scales of the engine."""
    integers, steps = quantise_weight(weight.numpy().T)
    return torch.from_numpy(np.ascontiguousarray((integers * steps).T))


def round_to_float16(x: Tensor) -> Tensor:
    """Round x to float16; values out of range become infinite."""
    return x.half().float()


class Int8Linear(nn.Module):
    """A layer with int8 weights and inputs.

    Args:
        clip: largest value of the equalised input.
        equaliser: [in] divides the input.
    """

    def __init__(self, layer: nn.Linear, clip: float, equaliser: Tensor) -> None:
        super().__init__()
        self.weight = fake_quantise_weight(layer.weight.detach() * equaliser)
        self.bias, self.clip, self.inverse = layer.bias.detach(), clip, 1 / equaliser

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(fake_quantise(x * self.inverse, self.clip), self.weight, self.bias)


class Float16Linear(nn.Module):
    """A layer whose weights, input and output are rounded to float16; sums are in float32, as on GPUs."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = round_to_float16(layer.weight.detach()), round_to_float16(layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return round_to_float16(F.linear(round_to_float16(x), self.weight, self.bias))


class Float16SoftmaxAttention(Attention):
    """Attention whose scores and softmax are rounded to float16."""

    @classmethod
    def wrap(cls, attention: nn.Module) -> Float16SoftmaxAttention:
        """Share the parameters and layers of an attention."""
        assert isinstance(attention, Attention)
        wrapped = cls.__new__(cls)
        wrapped.__dict__ = {**attention.__dict__, "_modules": attention._modules, "is_unfused": True}
        return wrapped

    def _attend_unfused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = round_to_float16(round_to_float16(q * q.shape[-1] ** -0.5) @ round_to_float16(k).transpose(-2, -1))
        return round_to_float16(round_to_float16(scores.softmax(dim=-1)) @ round_to_float16(v))


def make_int8_layers(
    networks: Mapping[str, SiT], ranges: Ranges, method: str, *, equalised: bool
) -> dict[str, Int8Linear]:
    """Return a quantised layer in place of every layer, by name.

    Layers of networks that are not deployed are left out: a calibration with a refiner serves a model without one.
    """
    layers: dict[str, Int8Linear] = {}
    for name, layer_ranges in ranges.layers.items():
        if name.partition("/")[0] in networks:
            layer = find_linear(networks, name)
            equaliser = torch.from_numpy(layer_ranges.equaliser.copy()) if equalised else torch.ones(layer.in_features)
            layers[name] = Int8Linear(layer, layer_ranges.select_clip(method, equalised=equalised), equaliser)
    return layers


def replace_clips(
    layers: Mapping[str, Int8Linear], ranges: Ranges, method: str, *, equalised: bool
) -> dict[str, Int8Linear]:
    """Return layers of `make_int8_layers` with the clips of another method; they share weights, which stay the same."""
    clipped: dict[str, Int8Linear] = {}
    for name, layer in layers.items():
        clipped[name] = copy.copy(layer)
        clipped[name].clip = ranges.layers[name].select_clip(method, equalised=equalised)
    return clipped


def make_float16_layers(networks: Mapping[str, SiT], names: Iterable[str]) -> dict[str, nn.Module]:
    """Return a float16 layer in place of every layer and softmax, by name."""
    layers: dict[str, nn.Module] = {}
    for name in names:
        role, _, path = name.partition("/")
        if path.endswith(SOFTMAX):
            layers[name] = Float16SoftmaxAttention.wrap(networks[role].get_submodule(path.removesuffix(".softmax")))
        else:
            layers[name] = Float16Linear(find_linear(networks, name))
    return layers


@contextmanager
def replace_layers(networks: Mapping[str, SiT], layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put these layers in place of those of the networks, until the block ends."""
    originals: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        # Softmaxes first: each replaces the whole attention; the layers inside it are replaced after.
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
