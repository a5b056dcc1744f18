"""Trace a PyTorch module to an ONNX model, and store its weights in 16 bits: for engines and for feature extractors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

MIN_ELEMENTS = 1024
"""Constants of fewer elements stay as they are: they are shapes and vectors, and need little memory."""


def trace_module(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic_shapes: Mapping[str, dict[int, Any]],
    *,
    opset: int,
) -> torch.onnx.ONNXProgram:
    """Trace `module` to ONNX.

    Args:
        inputs: tensors to trace with, by the names of the arguments of `forward`.
        outputs: names of the outputs.
        dynamic_shapes: per input, the dimensions of any size by axis.
    """
    with _silence_exporter():
        program = torch.onnx.export(
            module.eval(),
            (),
            kwargs=dict(inputs),
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dict(dynamic_shapes),
            verbose=False,
        )
    if program is None:  # only without dynamo
        raise AssertionError("torch.onnx.export returned nothing")
    return program


def cast_weights_to_float16(model: onnx.ModelProto) -> None:
    """Store large float32 weights in float16 and cast them where they are used; this changes `model` in place.

    The file has half its size, and the arithmetic stays: a runtime folds the casts when it loads. Weights that float16
    cannot hold stay in float32.
    """
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < MIN_ELEMENTS:
            continue
        values = numpy_helper.to_array(tensor)
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name, half_name = tensor.name, f"{tensor.name}_fp16"
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), half_name))
        casts.append(helper.make_node("Cast", [half_name], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
    for index, cast in enumerate(casts):
        model.graph.node.insert(index, cast)


@contextmanager
def _silence_exporter() -> Iterator[None]:
    """Hide the exporter's remarks about packages that are not used and names that it does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
