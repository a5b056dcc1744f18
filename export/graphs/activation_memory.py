"""How much memory a graph's intermediate results need at once: known from its shapes, without running it.

A runtime may need less, where it fuses operators, or more, where its allocator leaves gaps; `benchmarks/memory.py`
shows what a process really took.
"""

from __future__ import annotations

import math

import onnx

ONE_PICTURE = {"B": 1, "N": 2}
"""Sizes of the contract for one guided picture."""


def activation_bytes(model: onnx.ModelProto) -> int:
    """Most bytes of intermediate results that are alive together, for one guided picture, node by node in file order.

    Args:
        model: with or without its external weights. Inputs and outputs belong to the caller and are not counted.
    """
    sizes = _sizes(model)
    graph = model.graph
    kept = {value.name for value in (*graph.input, *graph.output)} | {tensor.name for tensor in graph.initializer}
    last_use = {name: place for place, node in enumerate(graph.node) for name in node.input}
    alive, most = 0, 0
    for place, node in enumerate(graph.node):
        made = [name for name in node.output if name not in kept]
        alive += sum(sizes.get(name, 0) for name in made)
        most = max(most, alive)
        ended = {name for name in node.input if name not in kept and last_use[name] == place}
        unused = {name for name in made if name not in last_use}
        alive -= sum(sizes.get(name, 0) for name in ended | unused)
    return most


def _sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of every intermediate result whose shape can be inferred."""
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    del sized.graph.value_info[:]  # the tracer's names for sizes, which would stand against the numbers
    for value in (*sized.graph.input, *sized.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = ONE_PICTURE[dim.dim_param]
    inferred = onnx.shape_inference.infer_shapes(sized, data_prop=True)
    return {value.name: _bytes(value) for value in inferred.graph.value_info}


def _bytes(value: onnx.ValueInfoProto) -> int:
    tensor = value.type.tensor_type
    elements: int = math.prod(dim.dim_value for dim in tensor.shape.dim)  # 0 where a size is unknown
    size: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    return elements * size
