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

from flowturbo.checkpoint_search import StateDict
from flowturbo.checkpoints import read_tensors
from runtime.system.errors import CheckpointError

VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Convolutions of VGG-16 by stage; the distance reads the last of each, after its ReLU."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation for images in −1 … 1, as LPIPS rounds them."""


class Lpips(nn.Module):
    """Perceptual distance of image pairs [B, 3, R, R] in −1 … 1, R ≥ 16: [B]. Its weights stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        channels, stages = 3, []
        for widths in VGG_WIDTHS:
            convolutions = nn.ModuleList()
            for width in widths:
                convolutions.append(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            stages.append(convolutions)
        self.stages = nn.ModuleList(stages)
        self.linear = nn.ParameterList(torch.zeros(widths[-1]) for widths in VGG_WIDTHS)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        shift, scale = self.get_buffer("shift"), self.get_buffer("scale")
        x, count = (torch.cat([a, b]) - shift) / scale, len(a)
        total = a.new_zeros(count, dtype=torch.float32)
        for i, convolutions in enumerate(self.stages):
            x = F.max_pool2d(x, 2) if i else x
            for convolution in convolutions:  # type: ignore[attr-defined]  # a ModuleList
                x = F.relu(convolution(x))
            features = x.float()
            unit = features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
            difference = (unit[:count] - unit[count:]).square()
            total = total + (difference * self.linear[i].view(1, -1, 1, 1)).sum(dim=1).mean(dim=(1, 2))
        return total


def load_lpips(paths: Sequence[Path]) -> Lpips:
    """Load the distance with the weights in these files.

    Raises:
        CheckpointError: a file cannot be read, or together they do not hold all that is needed.
    """
    state: StateDict = {}
    for path in paths:
        state |= read_tensors(path)
    file_names = ", ".join(map(str, paths))
    model, tensors = Lpips(), _rename_tensors(state)
    missing = [name for name, parameter in model.named_parameters() if name not in tensors]
    if missing:
        raise CheckpointError(
            f"--lpips {file_names} lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}",
            allowed="torchvision's vgg16 state dict and LPIPS's linear weights (vgg.pth), or the whole in one file",
            remedy="name both: --lpips vgg16.pth --lpips vgg.pth",
        )
    for name, parameter in model.named_parameters():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(
                f"--lpips {file_names}: {name} is {list(tensors[name].shape)}, not {list(parameter.shape)}",
                allowed="VGG-16's weights and their linear layers",
            )
        parameter.copy_(tensors[name])
    return model


def _rename_tensors(state: StateDict) -> StateDict:
    """Return the tensors of VGG's convolutions and LPIPS's linear layers under the names in `Lpips`."""
    # In torchvision's `features` each convolution has a ReLU after it, and each stage a pool.
    conv_positions: dict[int, tuple[int, int]] = {}
    index = 0
    for i, widths in enumerate(VGG_WIDTHS):
        conv_positions |= {index + 2 * j: (i, j) for j in range(len(widths))}
        index += 2 * len(widths) + 1
    renamed: StateDict = {}
    for key, value in state.items():
        # features.10.weight; in the whole: net.slice3.10.weight; lin0.model.1.weight or lins.0.model.1.weight
        if match := re.fullmatch(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)", key):
            if int(match[1]) in conv_positions:
                i, j = conv_positions[int(match[1])]
                renamed[f"stages.{i}.{j}.{match[2]}"] = value.float()
        elif match := re.fullmatch(r"lins?\.?(\d)\.model\.1\.weight", key):
            renamed[f"linear.{match[1]}"] = value.float().flatten()
    return renamed
