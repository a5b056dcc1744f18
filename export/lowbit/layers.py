"""The linear layers of a trunk that may be quantised, by name, in a network and in its ONNX file.

A name is what PyTorch calls the module: `blocks.3.mlp.fc1`; with its network in front, `predictor/blocks.3.mlp.fc1`.
Patch embedding, final layer, attention products and all of the conditioning are not among them: they have few weights,
and diffusion transformers lose most by their rounding (docs/quantization.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.system.errors import ProofError

if TYPE_CHECKING:
    import onnx

QUANTISABLE_PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
TRUNKS = ("predictor", "refiner")
_SCOPE = re.compile(r"blocks\.(\d+)\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)$")


def list_layers(role: str, depth: int) -> list[str]:
    """List every quantisable layer of a network, with its network in front."""
    return [f"{role}/blocks.{block}.{part}" for block in range(depth) for part in QUANTISABLE_PARTS]


def find_block(name: str) -> str:
    """Return the block that a layer belongs to: "predictor/blocks.3"."""
    return name.rsplit(".", 2)[0]


@dataclass(frozen=True)
class LayerMatMul:
    """One layer in an ONNX file.

    Attributes:
        node: the MatMul.
        input: name of the tensor that it reads.
        weight: initialiser [in, out].
    """

    node: Any
    input: str
    weight: str


def find_products(model: onnx.ModelProto, role: str, name: str) -> dict[str, LayerMatMul]:
    """Find the products of a traced trunk, by layer.

    Args:
        model: with or without its external weights.
        role: predictor or refiner.
        name: of the file, for messages.

    Raises:
        ProofError: a layer's product is not in the graph as one MatMul with a constant.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    products: dict[str, LayerMatMul] = {}
    for node in model.graph.node:
        layer = find_layer(node)
        if layer is not None and node.op_type == "MatMul" and node.input[1] in constants:
            products[f"{role}/{layer}"] = LayerMatMul(node, node.input[0], node.input[1])
    depth = 1 + max((int(layer_name.split(".")[1]) for layer_name in products), default=-1)
    missing = sorted(set(list_layers(role, depth)) - set(products))
    if missing or not products:
        raise ProofError(
            f"{name} holds no product for {', '.join(missing) or 'any layer'}",
            remedy="export it again (--rebuild) with the versions that constraints/ pins",
        )
    return products


def find_layer(node: Any) -> str | None:
    """Return the layer that a node was traced from, without its network; None where it belongs to none."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            for scope in reversed(re.findall(r"'([^']*)'", entry.value)):
                if match := _SCOPE.search(scope):
                    return match.group(0)
    return None
