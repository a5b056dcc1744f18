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

_MAX_LISTED = 12
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def check_weights(
    networks: Mapping[str, nn.Module],
    dtype: torch.dtype,
    is_excluded: Callable[[str], bool] = lambda name: False,
    *,
    remedy: str,
) -> None:
    """Refuses weights that `dtype` cannot hold, all of them at once.

    Args:
        networks: by role, in float32 as they will be cast; decoders and encoders are their VAE.
        is_excluded: whether a tensor, by role and name ("predictor/blocks.0.mlp.fc1.weight"), is not cast at all.
        remedy: what to do about them.

    Raises:
        CheckpointError: listing them with their largest value.
    """
    broken = [
        f"{name} ({largest:.3g})"
        for name, largest in _find_largest(networks)
        if not largest <= torch.finfo(dtype).max and not is_excluded(name)
    ]
    if broken:
        more = f" and {len(broken) - _MAX_LISTED} more" if len(broken) > _MAX_LISTED else ""
        raise CheckpointError(
            f"weights beyond the range of {str(dtype).removeprefix('torch.')}: {', '.join(broken[:_MAX_LISTED])}{more}",
            allowed=f"at most {torch.finfo(dtype).max:g}",
            remedy=remedy,
        )


def _find_largest(networks: Mapping[str, nn.Module]) -> Iterator[tuple[str, float]]:
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
            f"{name} holds constants that its precision cannot: {', '.join(broken[:_MAX_LISTED])}",
            remedy="build in a wider precision (--precision bf16 or fp32)",
        )
