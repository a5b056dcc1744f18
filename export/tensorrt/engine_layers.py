"""In which types a parsed TensorRT network computes, and whether that is what was asked for.

With strong typing the parsed types are the engine's: there are no builder flags left that could lower or raise them.
What a build must not do is call an engine fp16 whose matrix products are fp32 (it happened to others when TensorRT 11
dropped a flag), or normalise in 16 bits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from runtime.system.errors import ProofError

TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
_PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION")
_PASSING_ON = ("SHUFFLE", "CAST", "IDENTITY", "DEQUANTIZE", "QUANTIZE", "UNSQUEEZE", "SQUEEZE")
_NAMED = 8
_CONDITIONING_SHARE = 0.5
"""A conditioning graph keeps its time embedding in float32; of a one-block refiner that is up to a fifth."""


def layers(network: Any) -> Iterator[Any]:
    """Every layer of a parsed network."""
    return (network.get_layer(index) for index in range(network.num_layers))


def layer_report(network: Any) -> dict[str, dict[str, int]]:
    """Layer type → type of its first output → count."""
    report: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for layer in layers(network):
        if layer.num_outputs:
            report[layer.type.name][layer.get_output(0).dtype.name] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in sorted(report.items())}


def check_types(network: Any, precision: str, graph: str) -> None:
    """Holds the network to its precision: products with weights in it, norms in float32, integers really there.

    Raises:
        ProofError: something computes in another type; names the layers.
    """
    norms = [layer for layer in layers(network) if layer.type.name == "NORMALIZATION"]
    if low := [norm.name for norm in norms if _input_type(norm) != "FLOAT"]:
        raise _mismatch(graph, precision, "normalises in less than float32", low)
    if precision.startswith("int"):
        if not any(layer.type.name == "DEQUANTIZE" for layer in layers(network)):
            raise _mismatch(graph, precision, "holds no quantised layer", [])
        return
    weighted = {layer: elements for layer, elements in _weighted_products(network)}
    wrong = {layer: elements for layer, elements in weighted.items() if _input_type(layer) != TYPES[precision]}
    allowed = 1 - _CONDITIONING_SHARE if graph.endswith("conditioning") else 0.0
    if sum(wrong.values()) > allowed * sum(weighted.values()):
        found = sorted({_input_type(layer) for layer in wrong})
        raise _mismatch(graph, precision, f"multiplies weights in {', '.join(found)}", [layer.name for layer in wrong])


def _mismatch(graph: str, precision: str, what: str, names: list[str]) -> ProofError:
    listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    return ProofError(
        f"{graph} was asked for in {precision}, but its network {what}" + (f": {listed}" if listed else ""),
        allowed=f"weights multiplied in {precision}, norms in float32",
        remedy="export the graph again (--rebuild); the precision is in the ONNX file, no builder flag changes it",
    )


def _input_type(layer: Any) -> str:
    name: str = layer.get_input(0).dtype.name
    return name


def _weighted_products(network: Any) -> Iterator[tuple[Any, int]]:
    """Products with a constant operand, and how many weights it has; the guidance matrix, say, is an input."""
    producers = {layer.get_output(index).name: layer for layer in layers(network) for index in range(layer.num_outputs)}
    for layer in layers(network):
        if layer.type.name in _PRODUCTS:
            elements = max(_constant_elements(layer.get_input(i), producers) for i in range(layer.num_inputs))
            if layer.type.name != "MATRIX_MULTIPLY":  # a convolution may hold its kernel itself, not as an input
                elements = max(elements, int(getattr(getattr(layer, "kernel", None), "size", 0)), 1)
            if elements:
                yield layer, elements


def _constant_elements(tensor: Any, producers: dict[str, Any]) -> int:
    """Elements of the constant a tensor comes from; 0 if it is computed from inputs."""
    while tensor is not None and tensor.name in producers:
        layer = producers[tensor.name]
        if layer.type.name == "CONSTANT":
            count = 1
            for size in layer.get_output(0).shape:
                count *= max(int(size), 0)
            return count
        if layer.type.name not in _PASSING_ON:
            return 0
        tensor = layer.get_input(0)
    return 0
