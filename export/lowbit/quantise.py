"""Quantise the linear layers of a trunk's ONNX file, and store the weights of other files in 16 bits.

int8 goes through ONNX Runtime's quantiser with the clips of a calibration, in the form that TensorRT's parser takes as
well: weights in int8 per output channel, inputs in int8 per tensor, both symmetric, no quantised bias. The weights are
stored as int8, rounded by `rounding.py`. Quantised weights without quantised inputs go into ONNX Runtime's MatMulNBits
where it runs them, or before a DequantizeLinear.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.graphs.onnx_files import count_tensor_bytes, save_onnx
from export.lowbit.layers import LayerMatMul, find_layer, find_products
from export.lowbit.rounding import quantise_weight
from flowturbo.onnx_tracing import cast_weights_to_float16
from runtime.system.errors import ProofError, RequestError

OPSET_INT4 = 21
"""The first opset with 4-bit integers and blocks in DequantizeLinear."""
NBITS_BLOCK = {"int8-weights": 64, "int4-weights": 32}
"""Weights that share a scale in MatMulNBits."""
DQ_BLOCK = 128
"""Weights that share a scale in a 4-bit DequantizeLinear: TensorRT's kernels support this number."""

Clips = Mapping[str, float]
"""Layer, with its network in front → the largest value of its input; larger ones are cut."""


def quantise_int8(path: Path, role: str, clips: Clips) -> onnx.ModelProto:
    """Rewrite a trunk with int8 weights and inputs for the layers in `clips`; return it without external weights.

    Raises:
        ProofError: the trunk lacks a layer.
        RequestError: a clip is no positive number.
    """
    model = onnx.load(path)
    products = _select_products(model, role, path.name, clips)
    # Two layers never read one tensor in a SiT; if they did, one clip would silently serve both.
    inputs = {product.input for product in products.values()}
    broken = [layer for layer, clip in clips.items() if not (np.isfinite(clip) and clip > 0)]
    if len(inputs) < len(products) or broken:
        raise RequestError(
            f"clips of {', '.join(broken) or 'layers that share an input'}",
            allowed="a positive number for each",
            remedy="measure again: flowturbo-calibrate int8",
        )
    if products:
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        weights = {  # by node: integers and steps
            product.node.name: quantise_weight(numpy_helper.to_array(tensors[product.weight]))
            for product in products.values()
        }
        step_dtype = next(iter(weights.values()))[1].dtype
        range_ends = {product.input: np.asarray(clips[layer], step_dtype) for layer, product in products.items()}
        model = _insert_qdq(model, list(weights), range_ends)
        _replace_weights(model, weights)
    return save_onnx(model, path)


def _replace_weights(model: onnx.ModelProto, weights: Mapping[str, tuple[Any, Any]]) -> None:
    """Put our integers and steps, by node, in place of the quantiser's, which rounds in another way."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    nodes = {node.name: node for node in model.graph.node if node.name in weights}
    if missing := sorted(weights.keys() - nodes.keys()):
        raise ProofError(
            f"ONNX Runtime's quantiser renamed {', '.join(missing)}",
            remedy="install the versions that constraints/ pins",
        )
    for product, node in nodes.items():
        stored_names = producers[node.input[1]].input
        for name, values in zip(stored_names[:2], weights[product], strict=True):
            tensors[name].CopyFrom(numpy_helper.from_array(values, name))


def _select_products(model: onnx.ModelProto, role: str, name: str, layers: Iterable[str]) -> dict[str, LayerMatMul]:
    """The products of `layers`; one that is missing is an error, since nobody would see that it stays wide."""
    products = find_products(model, role, name)
    if missing := sorted(set(layers) - set(products)):
        raise ProofError(
            f"{name} holds no product for {', '.join(missing)}",
            remedy="export it again (--rebuild) from the checkpoint that was calibrated",
        )
    return {layer: products[layer] for layer in layers}


def _insert_qdq(
    model: onnx.ModelProto, nodes: Sequence[str], range_ends: Mapping[str, NDArray[Any]]
) -> onnx.ModelProto:
    """Run ONNX Runtime's quantiser with the settings of TensorRT's parser; `range_ends` are of symmetric ranges."""
    with _silence_quantiser():
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import QuantType

        # Tells the quantiser that types and shapes are in the file, as the exporter writes them.
        model.metadata_props.append(onnx.StringStringEntryProto(key="onnx.infer", value="onnxruntime.quant"))
        ranges = {tensor: TensorData(lowest=-end, highest=end) for tensor, end in range_ends.items()}
        quantiser = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8.tensor_type,
            activation_qType=QuantType.QInt8.tensor_type,
            tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
            nodes_to_quantize=list(nodes),
            nodes_to_exclude=[],
            op_types_to_quantize=["MatMul"],
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
            },
        )
        quantiser.quantize_model()
        quantised: onnx.ModelProto = quantiser.model.model
    return quantised


def quantise_weights(
    path: Path, role: str, precision: str, layers: Sequence[str], *, has_nbits_operators: bool
) -> onnx.ModelProto:
    """Rewrite a trunk with the weights of `layers` in int8 or int4; return it without external weights.

    Args:
        has_nbits_operators: as ONNX Runtime's MatMulNBits, else before a DequantizeLinear.

    Raises:
        ProofError: the trunk lacks a layer.
    """
    model = onnx.load(path)
    products = _select_products(model, role, path.name, layers)
    if has_nbits_operators:
        _insert_nbits(model, products, precision)
    else:
        _insert_dequantise(model, products, precision)
    return save_onnx(model, path)


def count_weights_by_kind(model: onnx.ModelProto) -> dict[str, int]:
    """Count the bytes of a quantised trunk's initialisers by kind, external ones included.

    Returns:
        `quantised`: weights of layers in int8 or int4; `scales`: theirs and their inputs', with zero points; `wide`:
        weights of layers that could be quantised and are not; `rest`: first and last layer, biases, positions, shapes.
    """
    kinds: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kinds |= {node.input[1]: "quantised", **dict.fromkeys(node.input[2:], "scales")}
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            kinds |= {node.input[0]: "quantised", **dict.fromkeys(node.input[1:], "scales")}
        elif node.op_type == "MatMul" and find_layer(node) is not None:
            kinds.setdefault(node.input[1], "wide")
    bytes_by_kind = dict.fromkeys(("quantised", "scales", "wide", "rest"), 0)
    for tensor in model.graph.initializer:
        bytes_by_kind[kinds.get(tensor.name, "rest")] += count_tensor_bytes(tensor)
    return bytes_by_kind


def store_float16(path: Path) -> onnx.ModelProto:
    """Rewrite a float32 file so that its large weights are stored in float16; it computes in float32 as before."""
    model = onnx.load(path)
    cast_weights_to_float16(model)
    return save_onnx(model, path)


def _insert_nbits(model: onnx.ModelProto, products: Mapping[str, LayerMatMul], precision: str) -> None:
    """MatMul → com.microsoft MatMulNBits, through ONNX Runtime's quantiser."""
    chosen_nodes = {product.node.name for product in products.values()}
    excluded_nodes = [n.name for n in model.graph.node if n.op_type == "MatMul" and n.name not in chosen_nodes]
    with _silence_quantiser():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        config = DefaultWeightOnlyQuantConfig(
            block_size=NBITS_BLOCK[precision],
            is_symmetric=True,
            accuracy_level=4,
            bits=8 if precision == "int8-weights" else 4,
        )
        quantiser = MatMulNBitsQuantizer(model, nodes_to_exclude=excluded_nodes, algo_config=config)
        quantiser.process()
    model.CopyFrom(quantiser.model.model)


def _insert_dequantise(model: onnx.ModelProto, products: Mapping[str, LayerMatMul], precision: str) -> None:
    """Put quantised weights and a DequantizeLinear in place of each weight; the product stays as it is."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for index, product in enumerate(products.values()):
        name = product.weight
        values: Any = numpy_helper.to_array(tensors[name])  # [in, out]
        weights = values.astype(np.float32)
        if precision == "int8-weights":
            # As they are stored: in float16 the rounding of a tiny scale matters.
            scales = (np.abs(weights).max(axis=0) / 127).astype(values.dtype)
            scales = np.maximum(scales, np.finfo(values.dtype).smallest_subnormal)
            rounded = np.clip(np.rint(weights / scales.astype(np.float32)), -127, 127).astype(np.int8)
            integers, attributes = numpy_helper.from_array(rounded, f"{name}_int8"), {"axis": 1}
        else:
            rows, columns = values.shape
            block = next(size for size in range(min(DQ_BLOCK, rows), 0, -1) if rows % size == 0)
            blocks = weights.reshape(rows // block, block, columns)
            scales = np.maximum(np.abs(blocks).max(axis=1, keepdims=True), 1e-12) / 7
            rounded = np.rint(blocks / scales).astype(np.int8).flatten()
            integers = helper.make_tensor(f"{name}_int4", TensorProto.INT4, values.shape, rounded)
            scales, attributes = scales[:, 0].astype(values.dtype), {"axis": 0, "block_size": block}
        model.graph.initializer.remove(tensors[name])
        model.graph.initializer.extend([integers, numpy_helper.from_array(scales, f"{name}_scale")])
        inputs = [integers.name, f"{name}_scale"]
        node = helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}_DequantizeLinear", **attributes)
        model.graph.node.insert(index, node)
    if precision == "int4-weights":  # none of our ops changed its meaning between opsets 18 and 21
        for entry in model.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = max(entry.version, OPSET_INT4)


@contextmanager
def _silence_quantiser() -> Iterator[None]:
    """Hide the quantiser's logs of every node, and undo the logging setup that its import makes process-wide."""
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)
