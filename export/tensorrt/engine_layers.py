"""Check in which types a parsed TensorRT network computes.

With strong typing the parsed types are the engine's: there are no builder flags left that could lower or raise them.
A build must not call an engine fp16 if its matrix products are fp32 (other projects did when TensorRT 11 dropped a
flag), and it must not normalise in 16 bits.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from runtime.system.errors import ProofError

TENSORRT_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
_PRODUCT_LAYERS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION")
_PASS_THROUGH_LAYERS = ("SHUFFLE", "CAST", "IDENTITY", "DEQUANTIZE", "QUANTIZE", "UNSQUEEZE", "SQUEEZE")
_MAX_LISTED = 8
_CONDITIONING_SHARE = 0.5
"""A conditioning graph keeps its time embedding in float32; of a one-block refiner that is up to a fifth."""


def iterate_layers(network: Any) -> Iterator[Any]:
    """Yield every layer of a parsed network."""
    return (network.get_layer(index) for index in range(network.num_layers))


def count_layer_types(network: Any) -> dict[str, dict[str, int]]:
    """Count the layers by type and element type: layer type → type of its first output → count."""
    report: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for layer in iterate_layers(network):
        if layer.num_outputs:
            report[layer.type.name][layer.get_output(0).dtype.name] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in sorted(report.items())}


def check_types(network: Any, precision: str, graph: str) -> None:
    """Check that weights are multiplied in `precision`, norms are in float32, and quantised layers are there.

    Raises:
        ProofError: something computes in another type; names the layers.
    """
    norms = [layer for layer in iterate_layers(network) if layer.type.name == "NORMALIZATION"]
    if low_norms := [norm.name for norm in norms if _get_input_type(norm) != "FLOAT"]:
        raise _make_mismatch_error(graph, precision, "normalises in less than float32", low_norms)
    if precision.startswith("int"):
        if not any(layer.type.name == "DEQUANTIZE" for layer in iterate_layers(network)):
            raise _make_mismatch_error(graph, precision, "holds no quantised layer", [])
        return
    producers = {
        layer.get_output(index).name: layer for layer in iterate_layers(network) for index in range(layer.num_outputs)
    }
    weight_counts = {}  # of products with a constant operand; the guidance matrix, say, is an input
    for layer in iterate_layers(network):
        if layer.type.name in _PRODUCT_LAYERS:
            elements = max(_count_constant_elements(layer.get_input(i), producers) for i in range(layer.num_inputs))
            if layer.type.name != "MATRIX_MULTIPLY":  # a convolution may hold its kernel itself, not as an input
                elements = max(elements, int(getattr(getattr(layer, "kernel", None), "size", 0)), 1)
            if elements:
                weight_counts[layer] = elements
    wrong_layers = {
        layer: elements
        for layer, elements in weight_counts.items()
        if _get_input_type(layer) != TENSORRT_TYPES[precision]
    }
    allowed = 1 - _CONDITIONING_SHARE if graph.endswith("conditioning") else 0.0
    if sum(wrong_layers.values()) > allowed * sum(weight_counts.values()):
        input_types = sorted({_get_input_type(layer) for layer in wrong_layers})
        raise _make_mismatch_error(
            graph, precision, f"multiplies weights in {', '.join(input_types)}", [layer.name for layer in wrong_layers]
        )


def _make_mismatch_error(graph: str, precision: str, problem: str, names: list[str]) -> ProofError:
    listed = ", ".join(names[:_MAX_LISTED]) + (
        f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    )
    return ProofError(
        f"{graph} was asked for in {precision}, but its network {problem}" + (f": {listed}" if listed else ""),
        allowed=f"weights multiplied in {precision}, norms in float32",
        remedy="export the graph again (--rebuild); the precision is in the ONNX file, no builder flag changes it",
    )


def _get_input_type(layer: Any) -> str:
    name: str = layer.get_input(0).dtype.name
    return name


def _count_constant_elements(tensor: Any, producers: dict[str, Any]) -> int:
    """The number of elements of the constant that a tensor comes from; 0 if it is computed from inputs."""
    while tensor is not None and tensor.name in producers:
        layer = producers[tensor.name]
        if layer.type.name == "CONSTANT":
            return math.prod(max(int(size), 0) for size in layer.get_output(0).shape)
        if layer.type.name not in _PASS_THROUGH_LAYERS:
            return 0
        tensor = layer.get_input(0)
    return 0
