"""Which precision a target is built in; pairs that cannot work are refused. Torch-free, for builds on the device."""

from __future__ import annotations

from runtime.errors import RequestError

PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8")

_ALLOWED = {
    "cpu": {"fp32": "fp32"},
    "openvino": {"fp32": "fp32", "bf16": "fp32"},
    "cuda": {"fp32": "fp32", "fp16": "fp16"},
    "rtx": {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"},
    "tensorrt": {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"},
}
"""Target → precision it can be asked for → precision of the ONNX file it takes.

OpenVINO makes bf16 itself from an fp32 file when told to (its importer wants no bf16 file); everything else runs the
types that are written in the graph.
"""


def resolve_precision(precision: str, target: str, *, amx: bool) -> str:
    """The precision a target is built in.

    Raises:
        RequestError: the pair is impossible.
    """
    if precision == "int8":
        raise RequestError(
            "precision int8 is not built yet: it comes with the calibration tools",
            allowed="auto, fp32, fp16, bf16",
        )
    if precision == "auto":
        return {"cpu": "fp32", "openvino": "bf16" if amx else "fp32"}.get(target, "fp16")
    if precision not in _ALLOWED[target]:
        raise RequestError(
            f"precision {precision} for target {target}",
            allowed=f"{', '.join(_ALLOWED[target])} for {target}",
            remedy="choose another pair, or --precision auto",
        )
    return precision


def graph_precision(target: str, precision: str) -> str:
    """The precision of the ONNX file that a target takes."""
    return _ALLOWED[target][precision]
