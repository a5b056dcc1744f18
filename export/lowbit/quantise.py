"""Quantises the linear layers of a trunk's ONNX file, and keeps other files' weights in 16 bits.

int8 goes through ONNX Runtime's quantiser with the clips of a calibration, in the form that TensorRT's parser takes as
well: weights in int8 per output channel, inputs in int8 per tensor, both symmetric, no quantised bias. The weights are
stored as int8, rounded by `rounding.py`. Weights alone go into ONNX Runtime's MatMulNBits where it runs them,
or before a DequantizeLinear.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.graphs.onnx_files import EXTERNAL_BYTES, count_initializer_bytes, count_tensor_bytes
from export.lowbit.layers import LayerMatMul, find_layer, find_products
from export.lowbit.rounding import quantise_weight
from runtime.system.errors import ProofError, RequestError
from runtime.system.files import write_atomically

OPSET_INT4 = 21
"""The first with 4-bit integers and blocks in DequantizeLinear."""
NBITS_BLOCK = {"int8-weights": 64, "int4-weights": 32}
"""Weights that share a scale in MatMulNBits."""
DQ_BLOCK = 128
"""Weights that share a scale in a 4-bit DequantizeLinear: what TensorRT's kernels take."""
_MIN_ELEMENTS = 1024
"""Constants of fewer elements are left as they are: they are shapes and vectors, not memory."""

Clips = Mapping[str, float]
"""Layer, with its network in front → the largest value of its input that is kept."""


def quantise_int8(path: Path, role: str, clips: Clips) -> onnx.ModelProto:
    """Rewrites a trunk with int8 weights and inputs for the layers in `clips`; gives it without external weights.

    Raises:
        ProofError: the trunk lacks a layer.
        RequestError: a clip is no number.
    """
    model = onnx.load(path)
    products = _select_products(model, role, path.name, clips)
    _check_clips(products, clips)
    if products:
        quantised_weights = _quantise_initialisers(model, [product.weight for product in products.values()])
        step_dtype = next(iter(quantised_weights.values()))[1].dtype
        range_ends = {product.input: np.asarray(clips[layer], step_dtype) for layer, product in products.items()}
        model = _insert_qdq(model, [product.node.name for product in products.values()], range_ends)
        _replace_weights(model, {product.node.name: quantised_weights[product.weight] for product in products.values()})
    return save_onnx(model, path)


def _quantise_initialisers(model: onnx.ModelProto, weights: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Integers and steps of some initialisers, by name."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    return {name: quantise_weight(numpy_helper.to_array(tensors[name])) for name in weights}


def _replace_weights(model: onnx.ModelProto, quantised_weights: Mapping[str, tuple[Any, Any]]) -> None:
    """Puts our integers and steps in place of the quantiser's, which cannot be told how to round.

    Args:
        quantised_weights: of products, by the name of their node.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    nodes = {node.name: node for node in model.graph.node if node.name in quantised_weights}
    if missing := sorted(quantised_weights.keys() - nodes.keys()):
        raise ProofError(
            f"ONNX Runtime's quantiser renamed {', '.join(missing)}",
            remedy="install the versions that constraints/ pins",
        )
    for product, node in nodes.items():
        stored_names = producers[node.input[1]].input
        for name, values in zip(stored_names[:2], quantised_weights[product], strict=True):
            tensors[name].CopyFrom(numpy_helper.from_array(values, name))


def _select_products(model: onnx.ModelProto, role: str, name: str, layers: Iterable[str]) -> dict[str, LayerMatMul]:
    """The products of some layers; every one is there, or none is quantised."""
    products = find_products(model, role, name)
    if missing := sorted(set(layers) - set(products)):
        raise ProofError(
            f"{name} holds no product for {', '.join(missing)}",
            remedy="export it again (--rebuild) from the checkpoint that was calibrated",
        )
    return {layer: products[layer] for layer in layers}


def _insert_qdq(model: onnx.ModelProto, nodes: Sequence[str], range_ends: Mapping[str, Any]) -> onnx.ModelProto:
    """ONNX Runtime's quantiser with the settings that TensorRT's parser takes.

    Args:
        nodes: products to quantise, by name.
        range_ends: tensor → end of its symmetric range, in its own type.
    """
    with _silence_quantiser():
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import QuantType

        model.metadata_props.append(_make_inferred_entry())
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
    """Rewrites a trunk with the weights of `layers` in int8 or int4; gives it without external weights.

    Args:
        has_nbits_operators: as ONNX Runtime's MatMulNBits, else before a DequantizeLinear.

    Raises:
        ProofError: the trunk lacks a layer.
    """
    model = onnx.load(path)
    products = _select_products(model, role, path.name, layers)
    if has_nbits_operators:
        _insert_nbits(model, products, precision)
    elif precision == "int8-weights":
        _insert_dequantise(model, products, _quantise_per_channel)
    else:
        _insert_dequantise(model, products, _quantise_in_blocks)
        _raise_opset(model, OPSET_INT4)
    return save_onnx(model, path)


def count_weights_by_kind(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of a quantised trunk's initialisers, external ones included, by what they are.

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
    """Rewrites a float32 file so that its large weights are stored in float16 and cast where they are used.

    Half the file, and the same arithmetic: a runtime folds the casts when it loads. What float16 cannot hold stays.
    """
    model = onnx.load(path)
    max_float16 = float(np.finfo(np.float16).max)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < _MIN_ELEMENTS:
            continue
        values = numpy_helper.to_array(tensor)
        if np.abs(values).max() > max_float16:
            continue
        name, half_name = tensor.name, f"{tensor.name}_fp16"
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), half_name))
        casts.append(helper.make_node("Cast", [half_name], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
    for index, cast in enumerate(casts):
        model.graph.node.insert(index, cast)
    return save_onnx(model, path)


def save_onnx(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Writes `path` (and `path`.data for large weights), or leaves neither; gives the model without such weights."""
    data_path = path.with_name(path.name + ".data")
    # The data goes under its final name, by which the file refers to it: the earlier one is lost from here on.
    data_path.unlink(missing_ok=True)
    external = count_initializer_bytes(model) > EXTERNAL_BYTES
    try:
        with write_atomically(path) as aside:
            if not external:
                onnx.save(model, str(aside))
            else:
                onnx.save(
                    model, str(aside), save_as_external_data=True, all_tensors_to_one_file=True,
                    location=data_path.name,
                    size_threshold=_MIN_ELEMENTS,
                )  # fmt: skip
    except BaseException:
        path.unlink(missing_ok=True)
        data_path.unlink(missing_ok=True)
        raise
    return onnx.load(path, load_external_data=False)


def _insert_nbits(model: onnx.ModelProto, products: Mapping[str, LayerMatMul], precision: str) -> None:
    """MatMul → com.microsoft MatMulNBits, through ONNX Runtime's quantiser."""
    with _silence_quantiser():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    chosen_nodes = {product.node.name for product in products.values()}
    excluded_nodes = [n.name for n in model.graph.node if n.op_type == "MatMul" and n.name not in chosen_nodes]
    config = DefaultWeightOnlyQuantConfig(
        block_size=NBITS_BLOCK[precision],
        is_symmetric=True,
        accuracy_level=4,
        bits=8 if precision == "int8-weights" else 4,
    )
    with _silence_quantiser():
        quantiser = MatMulNBitsQuantizer(model, nodes_to_exclude=excluded_nodes, algo_config=config)
        quantiser.process()
    model.CopyFrom(quantiser.model.model)


QuantisedWeight = tuple[TensorProto, TensorProto, dict[str, int]]
"""Integers, scales, and the attributes of their DequantizeLinear."""


def _insert_dequantise(
    model: onnx.ModelProto, products: Mapping[str, LayerMatMul], quantise: Callable[[str, Any], QuantisedWeight]
) -> None:
    """Puts quantised weights and a DequantizeLinear in place of each weight; the product stays as it is."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for product in products.values():
        values = numpy_helper.to_array(tensors[product.weight])
        integers, scales, attributes = quantise(product.weight, values)
        model.graph.initializer.remove(tensors[product.weight])
        model.graph.initializer.extend([integers, scales])
        nodes.append(
            helper.make_node(
                "DequantizeLinear",
                [integers.name, scales.name],
                [product.weight],
                name=f"{product.weight}_DequantizeLinear",
                **attributes,
            )
        )
    for index, node in enumerate(nodes):
        model.graph.node.insert(index, node)


def _quantise_per_channel(name: str, values: Any) -> QuantisedWeight:
    weights = values.astype(np.float32)
    # As they are stored: in float16, what a tiny scale is rounded to matters.
    scales = np.maximum(
        (np.abs(weights).max(axis=0) / 127).astype(values.dtype), np.finfo(values.dtype).smallest_subnormal
    )
    integers = np.clip(np.rint(weights / scales.astype(np.float32)), -127, 127).astype(np.int8)
    return (
        numpy_helper.from_array(integers, f"{name}_int8"),
        numpy_helper.from_array(scales, f"{name}_scale"),
        {"axis": 1},
    )


def _quantise_in_blocks(name: str, values: Any) -> QuantisedWeight:
    """Blocks along the inner dimension [in, out]; the largest divisor of it up to `DQ_BLOCK`."""
    rows, columns = values.shape
    block = next(size for size in range(min(DQ_BLOCK, rows), 0, -1) if rows % size == 0)
    blocks = values.astype(np.float32).reshape(rows // block, block, columns)
    scales = np.maximum(np.abs(blocks).max(axis=1, keepdims=True), 1e-12) / 7
    integers = np.rint(blocks / scales).astype(np.int8).reshape(rows, columns)
    return (
        helper.make_tensor(f"{name}_int4", TensorProto.INT4, integers.shape, integers.flatten()),
        numpy_helper.from_array(scales[:, 0].astype(values.dtype), f"{name}_scale"),
        {"axis": 0, "block_size": block},
    )


def _raise_opset(model: onnx.ModelProto, version: int) -> None:
    """Raises the default opset; none of our ops changed its meaning between 18 and 21."""
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, version)


def _check_clips(products: Mapping[str, LayerMatMul], clips: Clips) -> None:
    """Two layers never read one tensor in a SiT; if they did, one clip would silently serve both.

    Raises:
        RequestError: they do, or a clip is no number.
    """
    inputs = [product.input for product in products.values()]
    broken = [layer for layer, clip in clips.items() if not (np.isfinite(clip) and clip > 0)]
    if len(set(inputs)) < len(inputs) or broken:
        raise RequestError(
            f"clips of {', '.join(broken) or 'layers that share an input'}",
            allowed="a positive number for each",
            remedy="measure again: flowturbo-calibrate int8",
        )


def _make_inferred_entry() -> Any:
    """Tells ONNX Runtime's quantiser that types and shapes are in the file, as the exporter writes them."""
    return onnx.StringStringEntryProto(key="onnx.infer", value="onnxruntime.quant")


@contextmanager
def _silence_quantiser() -> Iterator[None]:
    """The quantiser logs every node, and importing it sets up logging for the whole process, which is not its to do."""
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)
