"""Compute from its shapes how much memory a graph's intermediate results need at once.

A runtime may need less, where it fuses operators, or more, where its allocator leaves gaps; `benchmarks/memory.py`
measures what a process really takes.
"""

from __future__ import annotations

import math

import onnx

ONE_PICTURE_SIZES = {"B": 1, "N": 2}
"""Sizes of the contract for one guided picture."""


def count_activation_bytes(model: onnx.ModelProto) -> int:
    """Count the most bytes of intermediate results that are alive together, for one guided picture, in file order.

    Args:
        model: with or without its external weights. Inputs and outputs belong to the caller and are not counted.
    """
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    del sized.graph.value_info[:]  # the tracer's names for sizes, which would stand against the numbers
    for value in (*sized.graph.input, *sized.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = ONE_PICTURE_SIZES[dim.dim_param]
    sizes = {}
    for value in onnx.shape_inference.infer_shapes(sized, data_prop=True).graph.value_info:
        tensor = value.type.tensor_type
        elements = math.prod(dim.dim_value for dim in tensor.shape.dim)  # 0 where a size is unknown
        sizes[value.name] = elements * onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    graph = model.graph
    external_names = {value.name for value in (*graph.input, *graph.output)} | {
        tensor.name for tensor in graph.initializer
    }
    last_use = {name: index for index, node in enumerate(graph.node) for name in node.input}
    live_bytes, peak_bytes = 0, 0
    for index, node in enumerate(graph.node):
        outputs = [name for name in node.output if name not in external_names]
        live_bytes += sum(sizes.get(name, 0) for name in outputs)
        peak_bytes = max(peak_bytes, live_bytes)
        last_used = {name for name in node.input if name not in external_names and last_use[name] == index}
        unused = {name for name in outputs if name not in last_use}
        live_bytes -= sum(sizes.get(name, 0) for name in last_used | unused)
    return peak_bytes
