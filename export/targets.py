"""Which precision a target is built in; pairs that cannot work are refused. Torch-free, for builds on the device."""

from __future__ import annotations

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
"""Target → precision it can be asked for → name of the ONNX files it takes (`form_of`).

OpenVINO makes bf16 itself from an fp32 file when told to (its importer wants no bf16 file). Its plug-in refused
quantised files when it was tried; OpenVINO itself runs them (docs/quantization.md). Everything else runs the types that
are written in the graph. ONNX Runtime's CUDA provider multiplies quantised layers in floating point all the same: those
sets are for TensorRT on another device (`--from`).
"""
_REFUSAL_REASONS = {
    ("openvino", "int8"): "OpenVINO's plug-in refused the quantised graphs when they were tried",
    ("rtx", "int8"): "TensorRT-RTX promises int8 for weights only: --precision int8-weights",
}


@dataclass(frozen=True)
class GraphFormat:
    """How a set of ONNX files is written.

    Attributes:
        base: what its networks are traced in: fp32, fp16 or bf16.
        quantised: what is done to the trunks' linear layers, one of `QUANTISED_PRECISIONS`, or None.
    """

    base: str
    quantised: str | None = None

    @property
    def has_nbits_operators(self) -> bool:
        """Weights alone go into ONNX Runtime's own operator (fp32 files) or are dequantised by a node (16-bit ones)."""
        return self.base == "fp32" and self.quantised not in (None, "int8")


def parse_graph_format(file_precision: str) -> GraphFormat:
    """The form of a set of ONNX files by its name: "fp16", "int8", "int4-weights-fp16"."""
    for name in sorted(QUANTISED_PRECISIONS, key=len, reverse=True):
        if file_precision in (name, f"{name}-fp16"):
            return GraphFormat("fp16" if file_precision.endswith("-fp16") else "fp32", name)
    return GraphFormat(file_precision)


def resolve_precision(precision: str, target: str, *, amx: bool) -> str:
    """The precision a target is built in.

    Raises:
        RequestError: the pair is impossible.
    """
    if precision == "auto":
        return {"cpu": "fp32", "openvino": "bf16" if amx else "fp32"}.get(target, "fp16")
    if precision not in _GRAPH_PRECISIONS[target]:
        reason = _REFUSAL_REASONS.get((target, "int8" if precision in QUANTISED_PRECISIONS else precision), "")
        raise RequestError(
            f"precision {precision} for target {target}" + (f": {reason}" if reason else ""),
            allowed=f"{', '.join(_GRAPH_PRECISIONS[target])} for {target}",
            remedy="choose another pair, or --precision auto",
        )
    return precision


def resolve_graph_precision(target: str, precision: str) -> str:
    """The name of the ONNX files that a target takes."""
    return _GRAPH_PRECISIONS[target][precision]
