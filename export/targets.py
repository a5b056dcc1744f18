"""Choose the precision of a target, and refuse what cannot work. Torch-free, for builds on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.system.errors import RequestError

PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8", "int8-weights", "int4-weights")
QUANTISED_PRECISIONS = ("int8", "int8-weights", "int4-weights")
"""int8: weights and activations of the trunks' linear layers. The others: weights alone, to save memory."""

_GRAPH_PRECISIONS = {
    "cpu": {"fp32": "fp32", **{name: name for name in QUANTISED_PRECISIONS}},
    "openvino": {"fp32": "fp32", "bf16": "fp32"},
    "cuda": {"fp32": "fp32", "fp16": "fp16", **{name: f"{name}-fp16" for name in QUANTISED_PRECISIONS}},
    "rtx": {
        "fp32": "fp32",
        "fp16": "fp16",
        "bf16": "bf16",
        "int8-weights": "int8-weights-fp16",
        "int4-weights": "int4-weights-fp16",
    },
    "tensorrt": {
        "fp32": "fp32",
        "fp16": "fp16",
        "bf16": "bf16",
        **{name: f"{name}-fp16" for name in QUANTISED_PRECISIONS},
    },
}
"""Target → precision → name of the ONNX files that it takes (`resolve_graph_precision`).

OpenVINO converts an fp32 file to bf16 itself (its importer refuses bf16 files). Its plug-in refused quantised files in
our test; OpenVINO itself runs them (docs/quantization.md). Everything else runs the types that are written in the
graph. ONNX Runtime's CUDA provider multiplies quantised layers in floating point all the same: those files are for
TensorRT on another device (`--from`).
"""
_REFUSAL_REASONS = {
    ("openvino", "int8"): "OpenVINO's plug-in refused the quantised graphs when they were tried",
    ("rtx", "int8"): "TensorRT-RTX promises int8 for weights only: --precision int8-weights",
}


@dataclass(frozen=True)
class GraphFormat:
    """The number format of a set of ONNX files.

    Attributes:
        base: type in which its networks are traced: fp32, fp16 or bf16.
        quantised: treatment of the trunks' linear layers, one of `QUANTISED_PRECISIONS`, or None.
    """

    base: str
    quantised: str | None = None

    @property
    def has_nbits_operators(self) -> bool:
        """Whether quantised weights go into ONNX Runtime's MatMulNBits (fp32 files) or before a dequantising node."""
        return self.base == "fp32" and self.quantised not in (None, "int8")


def parse_graph_format(file_precision: str) -> GraphFormat:
    """Return the format of a set of ONNX files by its name: "fp16", "int8", "int4-weights-fp16"."""
    for name in sorted(QUANTISED_PRECISIONS, key=len, reverse=True):
        if file_precision in (name, f"{name}-fp16"):
            return GraphFormat("fp16" if file_precision.endswith("-fp16") else "fp32", name)
    return GraphFormat(file_precision)


def resolve_precision(precision: str, target: str, *, amx: bool) -> str:
    """Return the precision that a target is built in.

    Raises:
        RequestError: the target cannot have it.
    """
    if precision == "auto":
        return {"cpu": "fp32", "openvino": "bf16" if amx else "fp32"}.get(target, "fp16")
    if precision not in _GRAPH_PRECISIONS[target]:
        reason = _REFUSAL_REASONS.get((target, "int8" if precision in QUANTISED_PRECISIONS else precision), "")
        raise RequestError(
            f"precision {precision} for target {target}" + (f": {reason}" if reason else ""),
            allowed=f"{', '.join(_GRAPH_PRECISIONS[target])} for {target}",
            remedy="choose another precision, or --precision auto",
        )
    return precision


def select_quantised(precisions: Mapping[str, str]) -> dict[str, str]:
    """Return the targets (→ precision) that are quantised: those that the gate measures."""
    return {target: precision for target, precision in precisions.items() if precision in QUANTISED_PRECISIONS}


def resolve_graph_precision(target: str, precision: str) -> str:
    """Return the name of the ONNX files that a target takes."""
    return _GRAPH_PRECISIONS[target][precision]
