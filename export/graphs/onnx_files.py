"""Write traced modules as ONNX files that keep the contract, and check them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from torch import nn

from flowturbo.onnx_tracing import MIN_ELEMENTS, trace_module
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
"""Ops that some backend does not support, or supports badly (PEERS 1.9), or that hold randomness."""

_EXAMPLE_SIZES = {"B": 2, "N": 3}


def export_onnx(module: nn.Module, spec: GraphSpec, path: Path, *, opset: int = OPSET) -> onnx.ModelProto:
    """Trace `module` and write `path` (and `path`.data for large weights), whole or not at all.

    Returns:
        The model without its external weights.

    Raises:
        ProofError: the graph does not keep the contract or holds an op that is not allowed.
    """
    # Sizes above one, so that no dimension is specialised.
    inputs = {
        name: torch.zeros(tensor.resolve_shape(_EXAMPLE_SIZES), dtype=getattr(torch, tensor.dtype))
        for name, tensor in spec.inputs.items()
    }
    dims = {"B": torch.export.Dim("B", min=1, max=512), "N": torch.export.Dim("N", min=1, max=1024)}
    dynamic_shapes = {
        name: {axis: dims[dim] for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)}
        for name, tensor in spec.inputs.items()
    }
    program = trace_module(module, inputs, list(spec.outputs), dynamic_shapes, opset=opset)
    size = sum(
        value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value is not None
    )
    with _write_with_data(path) as aside:
        # Written under its final name first, because the file refers to its data by name.
        program.save(str(path), external_data=size > EXTERNAL_BYTES)
        model = onnx.load(str(path), load_external_data=False)
        # The contract's shapes on the outputs: the tracer calls B rows of N "Min(N, B)".
        for value in model.graph.output:
            for dim, expected in zip(value.type.tensor_type.shape.dim, spec.outputs[value.name].shape, strict=True):
                dim.Clear()
                if isinstance(expected, str):
                    dim.dim_param = expected
                else:
                    dim.dim_value = expected
        # The tracer's stack traces would make a file depend on where the sources lie.
        for node in model.graph.node:
            props = [prop for prop in node.metadata_props if prop.key != "pkg.torch.onnx.stack_trace"]
            if len(props) != len(node.metadata_props):
                del node.metadata_props[:]
                node.metadata_props.extend(props)
        onnx.save(model, str(aside))
    check_graph(model, spec, path.name)
    return model


def save_onnx(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Write `path` (and `path`.data for large weights), or leave neither; return the model without such weights."""
    with _write_with_data(path) as aside:
        if count_initializer_bytes(model) <= EXTERNAL_BYTES:
            onnx.save(model, str(aside))
        else:
            onnx.save(
                model, str(aside), save_as_external_data=True, all_tensors_to_one_file=True,
                location=f"{path.name}.data", size_threshold=MIN_ELEMENTS,
            )  # fmt: skip
    return onnx.load(path, load_external_data=False)


@contextmanager
def _write_with_data(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to, and leave neither the file nor its data on any error."""
    data_path = path.with_name(path.name + ".data")
    try:
        with write_atomically(path) as aside:
            data_path.unlink(missing_ok=True)  # data goes under its final name, by which the file refers to it
            yield aside
    except BaseException:
        path.unlink(missing_ok=True)
        data_path.unlink(missing_ok=True)
        raise


def check_graph(model: onnx.ModelProto, spec: GraphSpec, name: str) -> None:
    """Check a graph's inputs and outputs against the contract, and its ops.

    Raises:
        ProofError: with what differs.
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
    """Count the nodes by type, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def count_initializer_bytes(model: onnx.ModelProto) -> int:
    """Count the bytes of all initialisers, external ones included."""
    return sum(map(count_tensor_bytes, model.graph.initializer))


def count_tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Count the bytes of an initialiser by its declared shape and type; two 4-bit values share a byte."""
    elements: int = math.prod(tensor.dims)
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return -(-elements // 2)
    return elements * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
