"""List what a 16-bit type cannot hold before anything is built in it: weights of networks, constants of graphs.

After a build the proof and the gate look at pictures. A decoder's graph says of each picture whether it is finite, and
one that is not ends the build, so a black picture cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from export.build_request import BuildRequest
from export.graphs.engine_graphs import make_deployable
from export.lowbit.casting import DTYPES, equalise_network
from export.model import CheckpointModel
from export.targets import GraphFormat
from runtime.system.errors import CheckpointError, ProofError

_MAX_LISTED = 12
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_REMEDY_16BIT = (
    "build with --precision bf16 or fp32, or keep them wide: flowturbo-calibrate sensitivity --precision fp16, then "
    "--choice"
)
_REMEDY_QUANTISED = (
    "build with --precision bf16 or fp32, or for --target cpu, whose quantised files stand on float32 (what a --choice "
    "keeps wide is in float16 here)"
)


def check_weight_range(model: CheckpointModel, request: BuildRequest, graph_format: GraphFormat) -> None:
    """Refuse weights that a format's type cannot hold, before anything is written.

    Weights are checked as they are cast: for int8, equalised. Three kinds are left out:
    - what stays in float32, which only an unquantised format has (elsewhere a wide layer is in the format's type);
    - the halves of autoencoders that are not built;
    - everything, if the format is in float32.

    Raises:
        CheckpointError: with a list of all of them.
    """
    recipe, dtype = request.recipe, DTYPES[graph_format.base]
    if dtype == torch.float32:
        return
    networks: dict[str, nn.Module] = {
        role: equalise_network(network.model, role, recipe)
        if graph_format.quantised == "int8"
        else make_deployable(network.model)
        for role, network in model.networks.items()
    }
    networks |= {f"decoder-{variant}": vae.module for variant, vae in model.vaes.items()}
    if request.encoder and model.vaes:
        networks["encoder"] = next(iter(model.vaes.values())).module
    islands = () if graph_format.quantised is not None else recipe.wide
    unused_parts = {"encoder": ("decoder.", "post_quant_conv."), "decoder": ("encoder.", "quant_conv.")}

    def is_excluded(name: str) -> bool:
        role, _, tensor = name.partition("/")
        return tensor.startswith(unused_parts.get(role.partition("-")[0], ())) or any(
            name.startswith((f"{part}.", f"{part}/")) for part in islands
        )

    remedy = _REMEDY_16BIT if graph_format.quantised is None else _REMEDY_QUANTISED
    check_weights(networks, dtype, is_excluded, remedy=remedy)


def check_weights(
    networks: Mapping[str, nn.Module],
    dtype: torch.dtype,
    is_excluded: Callable[[str], bool] = lambda name: False,
    *,
    remedy: str,
) -> None:
    """Refuse weights that `dtype` cannot hold, all of them at once.

    Args:
        networks: by role, in float32 as they will be cast; decoders and encoders are their VAE.
        is_excluded: whether a tensor, by role and name ("predictor/blocks.0.mlp.fc1.weight"), is not cast at all.
        remedy: advice for the error.

    Raises:
        CheckpointError: with a list of them and their largest values.
    """
    broken = []
    for role, network in networks.items():
        for key, tensor in network.state_dict().items():
            if tensor.is_floating_point() and tensor.numel():
                largest = float(tensor.abs().max())
                if not largest <= torch.finfo(dtype).max and not is_excluded(f"{role}/{key}"):
                    broken.append(f"{role}/{key} ({largest:.3g})")
    if broken:
        more = f" and {len(broken) - _MAX_LISTED} more" if len(broken) > _MAX_LISTED else ""
        raise CheckpointError(
            f"weights beyond the range of {str(dtype).removeprefix('torch.')}: {', '.join(broken[:_MAX_LISTED])}{more}",
            allowed=f"at most {torch.finfo(dtype).max:g}",
            remedy=remedy,
        )


def check_constants(model: onnx.ModelProto, name: str) -> None:
    """Refuse a graph with constants that became infinite in 16 bits, or scales of inputs that became zero.

    Large weights that lie beside the file are left out: `check_weights` has checked them.

    Raises:
        ProofError: with their names.
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
