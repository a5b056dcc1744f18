"""What a 16-bit type cannot hold, listed before anything is built in it: weights of networks, constants of graphs.

After a build the proof and the gate look at pictures: a decoder's graph says of each whether it is finite, and one
that is not ends the build, so a black picture cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from runtime.system.errors import CheckpointError, ProofError

_NAMED = 12
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def check_weights(
    networks: Mapping[str, nn.Module],
    dtype: torch.dtype,
    left_out: Callable[[str], bool] = lambda name: False,
    *,
    remedy: str,
) -> None:
    """Refuses weights that `dtype` cannot hold, all of them at once.

    Args:
        networks: by role, in float32 as they will be cast; decoders and encoders are their VAE.
        left_out: whether a tensor, by role and name ("predictor/blocks.0.mlp.fc1.weight"), is not cast at all.
        remedy: what to do about them.

    Raises:
        CheckpointError: listing them with their largest value.
    """
    broken = [
        f"{name} ({largest:.3g})"
        for name, largest in _largest(networks)
        if not largest <= torch.finfo(dtype).max and not left_out(name)
    ]
    if broken:
        more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        raise CheckpointError(
            f"weights beyond the range of {str(dtype).removeprefix('torch.')}: {', '.join(broken[:_NAMED])}{more}",
            allowed=f"at most {torch.finfo(dtype).max:g}",
            remedy=remedy,
        )


def _largest(networks: Mapping[str, nn.Module]) -> Iterator[tuple[str, float]]:
    for role, network in networks.items():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point() and tensor.numel():
                yield f"{role}/{name}", float(tensor.abs().max())


def check_constants(model: onnx.ModelProto, name: str) -> None:
    """Refuses a graph with constants that became infinite in 16 bits, or scales of inputs that became zero.

    Large weights that lie beside the file are left out: `check_weights` has seen them.

    Raises:
        ProofError: naming them.
    """
    scales = {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    broken = []
    for tensor in model.graph.initializer:
        if tensor.data_type in _FLOATS and tensor.data_location != TensorProto.EXTERNAL:
            values: Any = numpy_helper.to_array(tensor)
            if not np.isfinite(values).all() or (tensor.name in scales and not (values > 0).all()):
                broken.append(tensor.name)
    if broken:
        raise ProofError(
            f"{name} holds constants that its precision cannot: {', '.join(broken[:_NAMED])}",
            remedy="build in a wider precision (--precision bf16 or fp32)",
        )
