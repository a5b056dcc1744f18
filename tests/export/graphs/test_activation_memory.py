"""Memory of intermediate results, known from shapes."""

from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from export.graphs.activation_memory import count_activation_bytes

ROW = 4 * 1000
"""Bytes of a float32 tensor [1, 1000]."""


def model(nodes: list[tuple[str, list[str], str]], dtype: int = TensorProto.FLOAT) -> object:
    """A graph from x [B, 1000] to y, of the nodes (operator, inputs, output)."""
    shape = ["B", 1000]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output]) for op, inputs, output in nodes],
        "g",
        [value("x", dtype, shape)],
        [value("y", dtype, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize(
    ("nodes", "alive"),
    [
        ([("Relu", ["x"], "y")], 0),  # inputs and outputs are the caller's
        ([("Relu", ["x"], "a"), ("Relu", ["a"], "y")], 1),
        ([("Relu", ["x"], "a"), ("Relu", ["a"], "b"), ("Relu", ["b"], "y")], 2),  # a and b while b is made
        ([("Relu", ["x"], "a"), ("Relu", ["a"], "b"), ("Relu", ["b"], "c"), ("Add", ["a", "c"], "y")], 3),
        ([("Relu", ["x"], "unused"), ("Relu", ["x"], "a"), ("Relu", ["a"], "y")], 1),
    ],
)
def test_what_is_alive_together(nodes: list[tuple[str, list[str], str]], alive: int) -> None:
    assert count_activation_bytes(model(nodes)) == alive * ROW  # type: ignore[arg-type]
    assert count_activation_bytes(model(nodes, TensorProto.FLOAT16)) == alive * ROW / 2  # type: ignore[arg-type]
