"""Convert a PyTorch network to a feature extractor: an ONNX file that describes its input. Needs torch and onnx.

This is needed once; evaluation reads the file (`flowturbo.evaluation.quality.features`).
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from flowturbo.checkpoints import read_tensors
from flowturbo.evaluation.quality.features import INCEPTION, METADATA_KEY, ExtractorInfo
from flowturbo.models.inception import INPUT_SIZE, BasicConv2d, InceptionV3
from runtime.system.errors import CheckpointError
from runtime.system.files import make_folder, write_atomically
from runtime.system.json_codec import to_json

OPSET = 20
OUTPUTS = ("features", "spatial", "probabilities")
MIN_HALVED_BYTES = 1024
"""Weights below this stay float32 in a halved file."""

INCEPTION_INFO = ExtractorInfo(INCEPTION, "tf-bilinear", -1.0, 255 / 128 - 1, *OUTPUTS)  # (pixel − 128) / 128


def save_extractor(module: nn.Module, path: Path, info: ExtractorInfo, size: int, *, half: bool = False) -> None:
    """Write a module that returns `OUTPUTS` for images [B, 3, size, size], whole or not at all.

    Args:
        half: store weights in fp16, and compute in float32.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about packages that are not needed
        program = torch.onnx.export(
            module.eval(),
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_shapes=({0: torch.export.Dim("B", min=1, max=512)},),
            verbose=False,
        )
    model = program.model_proto  # type: ignore[union-attr]  # None only without dynamo
    if half:
        _halve_weights(model)
    metadata = model.metadata_props.add()
    metadata.key, metadata.value = METADATA_KEY, json.dumps(to_json(info))
    make_folder(path.absolute().parent)
    with write_atomically(path) as aside:
        onnx.save(model, str(aside))


def _halve_weights(model: onnx.ModelProto) -> None:
    """Store large weights in fp16 and cast them back where the graph begins; a session folds the casts once."""
    for tensor in list(model.graph.initializer):
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.nbytes < MIN_HALVED_BYTES:
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}_fp16"))
        cast = onnx.helper.make_node("Cast", [f"{name}_fp16"], [name], to=onnx.TensorProto.FLOAT)
        model.graph.node.insert(0, cast)


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
