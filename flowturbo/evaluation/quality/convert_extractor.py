"""Convert a PyTorch network to a feature extractor: an ONNX file that describes its input. Needs torch and onnx.

This is needed once; evaluation reads the file (`flowturbo.evaluation.quality.features`).
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from flowturbo.checkpoints import read_tensors
from flowturbo.evaluation.quality.features import INCEPTION, METADATA_KEY, ExtractorInfo
from flowturbo.models.inception import INPUT_SIZE, BasicConv2d, InceptionV3
from flowturbo.onnx_tracing import cast_weights_to_float16, trace_module
from runtime.system.errors import CheckpointError
from runtime.system.files import make_folder, write_atomically
from runtime.system.json_codec import to_json

OPSET = 20
OUTPUTS = ("features", "spatial", "probabilities")

INCEPTION_INFO = ExtractorInfo(INCEPTION, "tf-bilinear", -1.0, 255 / 128 - 1, *OUTPUTS)  # (pixel − 128) / 128


def save_extractor(module: nn.Module, path: Path, info: ExtractorInfo, size: int, *, half: bool = False) -> None:
    """Write a module that returns `OUTPUTS` for images [B, 3, size, size], whole or not at all.

    Args:
        half: store weights in fp16; the extractor computes in float32 all the same.
    """
    images = torch.zeros(2, 3, size, size)
    batch = torch.export.Dim("B", min=1, max=512)
    model = trace_module(module, {"images": images}, OUTPUTS, {"images": {0: batch}}, opset=OPSET).model_proto
    if half:
        cast_weights_to_float16(model)
    metadata = model.metadata_props.add()
    metadata.key, metadata.value = METADATA_KEY, json.dumps(to_json(info))
    make_folder(path.absolute().parent)
    with write_atomically(path) as aside:
        onnx.save(model, str(aside))


def convert_inception(weights: Path, out: Path) -> None:
    """Convert the public PyTorch file of the TF-2015 Inception to an extractor.

    Raises:
        CheckpointError: the file holds another network.
    """
    save_extractor(fuse_batch_norms(load_inception(weights)), out, INCEPTION_INFO, INPUT_SIZE)


def load_inception(weights: Path) -> InceptionV3:
    """Load the network with the weights of the public file."""
    state, module = read_tensors(weights), InceptionV3()
    counters = {key for key in module.state_dict() if key.endswith("num_batches_tracked")}
    expected_shapes = {key: value.shape for key, value in module.state_dict().items() if key not in counters}
    shapes = {key: value.shape for key, value in state.items() if key not in counters}
    if expected_shapes != shapes:
        differing = sorted(key for key in expected_shapes | shapes if expected_shapes.get(key) != shapes.get(key))
        raise CheckpointError(
            f"{weights} is not the TF-2015 Inception: {len(differing)} tensors differ, for example "
            f"{', '.join(differing[:3])}",
            allowed="pt_inception-2015-12-05-6726825d.pth, or the same tensors in another file",
            remedy="torchvision's Inception is another network: its FIDs compare with nothing published",
        )
    module.load_state_dict(state, strict=False)
    return module.eval()


def fuse_batch_norms(module: nn.Module) -> nn.Module:
    """Fold normalisations into the convolutions before them, in place."""
    for block in module.modules():
        if isinstance(block, BasicConv2d):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            block.bn = nn.Identity()  # type: ignore[assignment]
    return module
