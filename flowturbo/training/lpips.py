"""LPIPS, the learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924), from local weight files.

Written out in plain PyTorch because torchvision, which the reference implementation needs, has no CPU build here. It
reads what both publish: torchvision's VGG-16 (`features.0.weight` …) and LPIPS's linear weights
(`lin0.model.1.weight` …), in two files or in one state dict of the whole (`net.slice1.0.weight` …).

Letters: B images, R resolution.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowturbo.checkpoints import State, read_tensors
from runtime.system.errors import CheckpointError

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Convolutions of VGG-16 by stage; the distance reads the last of each, after its ReLU."""
LEAST_SIDE = 16
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation for images in −1 … 1, as LPIPS rounds them."""


def _conv_indices() -> list[list[int]]:
    """Where the convolutions stand in torchvision's `features`: each has a ReLU after it, each stage a pool."""
    found, index = [], 0
    for stage in WIDTHS:
        found.append([index + 2 * i for i in range(len(stage))])
        index += 2 * len(stage) + 1
    return found


class Lpips(nn.Module):
    """Perceptual distance of image pairs [B, 3, R, R] in −1 … 1, R ≥ 16: [B]. Its weights stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        channels, stages = 3, []
        for widths in WIDTHS:
            convolutions = nn.ModuleList()
            for width in widths:
                convolutions.append(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            stages.append(convolutions)
        self.stages = nn.ModuleList(stages)
        self.linear = nn.ParameterList(torch.zeros(widths[-1]) for widths in WIDTHS)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        shift, scale = self.get_buffer("shift"), self.get_buffer("scale")
        x, both = (torch.cat([a, b]) - shift) / scale, len(a)
        total = a.new_zeros(both, dtype=torch.float32)
        for i, convolutions in enumerate(self.stages):
            x = F.max_pool2d(x, 2) if i else x
            for convolution in convolutions:  # type: ignore[attr-defined]  # a ModuleList
                x = F.relu(convolution(x))
            features = x.float()
            unit = features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
            difference = (unit[:both] - unit[both:]).square()
            total = total + (difference * self.linear[i].view(1, -1, 1, 1)).sum(dim=1).mean(dim=(1, 2))
        return total


def load_lpips(paths: Sequence[Path]) -> Lpips:
    """The distance with the weights in these files.

    Raises:
        CheckpointError: a file cannot be read, or together they do not hold all that is needed.
    """
    state: State = {}
    for path in paths:
        state |= read_tensors(path)
    named = ", ".join(map(str, paths))
    model, wanted = Lpips(), _by_our_names(state)
    missing = [name for name, parameter in model.named_parameters() if name not in wanted]
    if missing:
        raise CheckpointError(
            f"--lpips {named} lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}",
            allowed="torchvision's vgg16 state dict and LPIPS's linear weights (vgg.pth), or the whole in one file",
            remedy="name both: --lpips vgg16.pth --lpips vgg.pth",
        )
    for name, parameter in model.named_parameters():
        if wanted[name].shape != parameter.shape:
            raise CheckpointError(
                f"--lpips {named}: {name} is {list(wanted[name].shape)}, not {list(parameter.shape)}",
                allowed="VGG-16's weights and their linear layers",
            )
        parameter.copy_(wanted[name])
    return model


def _by_our_names(state: State) -> State:
    """Tensors of VGG's convolutions and LPIPS's linear layers under `Lpips`' own names."""
    places = {index: (i, j) for i, stage in enumerate(_conv_indices()) for j, index in enumerate(stage)}
    found: State = {}
    for key, value in state.items():
        # features.10.weight; in the whole: net.slice3.10.weight; lin0.model.1.weight or lins.0.model.1.weight
        if match := re.fullmatch(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)", key):
            if int(match[1]) in places:
                i, j = places[int(match[1])]
                found[f"stages.{i}.{j}.{match[2]}"] = value.float()
        elif match := re.fullmatch(r"lins?\.?(\d)\.model\.1\.weight", key):
            found[f"linear.{match[1]}"] = value.float().flatten()
    return found
