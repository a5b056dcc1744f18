"""A traced module to an ONNX file that keeps the contract, and the checks that every such file passes."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from runtime.directory.contract import GraphSpec
from runtime.system.errors import ProofError
from runtime.system.files import write_atomically

OPSET = 20
OPSET_BF16 = 22  # bf16 convolutions
EXTERNAL_BYTES = 32 << 20
"""Weights above this go to a data file beside the ONNX file; a protobuf ends at 2 GB."""

FORBIDDEN_OPS = {
    "Einsum",
    "Col2Im",
    "Loop",
    "If",
    "Scan",
    "RandomNormal",
    "RandomUniform",
    "Attention",
    "IsInf",
    "IsNaN",
}
"""Ops that some backend of ours does not take, or takes badly (PEERS 1.9), or that hold randomness."""

_EXAMPLE_SIZES = {"B": 2, "N": 3}


def export_onnx(module: nn.Module, spec: GraphSpec, path: Path, *, opset: int = OPSET) -> onnx.ModelProto:
    """Traces `module` and writes `path` (and `path`.data for large weights), whole or not at all.

    Returns:
        The model without its external weights.

    Raises:
        ProofError: the graph does not keep the contract or holds an op that is not allowed.
    """
    with _silence_exporter():
        program = torch.onnx.export(
            module.eval(),
            (),
            kwargs=_make_example_inputs(spec),
            dynamo=True,
            opset_version=opset,
            input_names=list(spec.inputs),
            output_names=list(spec.outputs),
            dynamic_shapes=_make_dynamic_shapes(spec),
            verbose=False,
        )
    assert program is not None
    size = sum(
        value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value is not None
    )
    external = size > EXTERNAL_BYTES
    data_path = path.with_name(path.name + ".data")
    try:
        with write_atomically(path) as aside:
            # Written under its final name first, because the file refers to its data by name.
            data_path.unlink(missing_ok=True)
            program.save(str(path), external_data=external)
            model = onnx.load(str(path), load_external_data=False)
            _declare_shapes(model, spec)
            _drop_stack_traces(model)
            onnx.save(model, str(aside))
    except BaseException:
        path.unlink(missing_ok=True)
        data_path.unlink(missing_ok=True)
        raise
    check_graph(model, spec, path.name)
    return model


def check_graph(model: onnx.ModelProto, spec: GraphSpec, name: str) -> None:
    """Contract and allowed ops.

    Raises:
        ProofError: naming what is wrong.
    """
    names = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    if names != (list(spec.inputs), list(spec.outputs)):
        raise ProofError(
            f"{name} has inputs {names[0]} and outputs {names[1]}", allowed="the engine contract's names in order"
        )
    ops = count_ops(model)
    if forbidden := sorted(FORBIDDEN_OPS & set(ops)):
        raise ProofError(f"{name} holds {', '.join(forbidden)}", allowed="ops that every backend takes")


def count_ops(model: onnx.ModelProto) -> dict[str, int]:
    """Nodes by type, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def count_initializer_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initialisers, external ones included."""
    return sum(map(count_tensor_bytes, model.graph.initializer))


def count_tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of an initialiser by its declared shape and type; two 4-bit values share a byte."""
    elements: int = math.prod(tensor.dims)
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return -(-elements // 2)
    return elements * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _make_example_inputs(spec: GraphSpec) -> dict[str, torch.Tensor]:
    """Inputs to trace with; sizes above one, so that no dimension is specialised."""
    return {
        name: torch.zeros(tensor.resolve_shape(_EXAMPLE_SIZES), dtype=getattr(torch, tensor.dtype))
        for name, tensor in spec.inputs.items()
    }


def _make_dynamic_shapes(spec: GraphSpec) -> dict[str, dict[int, Any]]:
    dims = {"B": torch.export.Dim("B", min=1, max=512), "N": torch.export.Dim("N", min=1, max=1024)}
    return {
        name: {axis: dims[dim] for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)}
        for name, tensor in spec.inputs.items()
    }


def _declare_shapes(model: onnx.ModelProto, spec: GraphSpec) -> None:
    """Writes the contract's shapes on the outputs: the tracer calls B rows of N "Min(N, B)"."""
    for value in model.graph.output:
        for dim, size in zip(value.type.tensor_type.shape.dim, spec.outputs[value.name].shape, strict=True):
            dim.Clear()
            if isinstance(size, str):
                dim.dim_param = size
            else:
                dim.dim_value = size


def _drop_stack_traces(model: onnx.ModelProto) -> None:
    """Remove the tracer's stack traces: they make a file depend on where the sources lie."""
    for node in model.graph.node:
        props = [prop for prop in node.metadata_props if prop.key != "pkg.torch.onnx.stack_trace"]
        if len(props) != len(node.metadata_props):
            del node.metadata_props[:]
            node.metadata_props.extend(props)


@contextmanager
def _silence_exporter() -> Iterator[None]:
    """The exporter's remarks about packages we do not use and names it does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
