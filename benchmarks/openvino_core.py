"""python -m benchmarks.openvino_core FILE.onnx …: whether OpenVINO itself reads, compiles and runs our trunks.

Engines of `--target openvino` use OpenVINO's plug-in for ONNX Runtime, which serves Intel CPUs alone. This script uses
the library under it, which runs on any x86 CPU. It needs a separate environment, since the plug-in has another copy of
the library: python -m venv V && V/bin/pip install openvino onnxruntime click rich. Speed is not measured.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from runtime.cli.command_base import PATH, Command
from runtime.system.errors import BackendError, EngineError

Arrays = Mapping[str, NDArray[Any]]
Report = dict[str, Any]
"""JSON data."""
PRODUCT_LAYERS = ("FullyConnected", "MatMul")
"""OpenVINO's matrix products, as its compiled graph calls them."""
DIM_SIZES = {"B": 1, "N": 2}
"""One guided image."""


def make_inputs(session: Any) -> dict[str, NDArray[Any]]:
    """Make inputs of one guided evaluation at a random point for an ONNX Runtime session."""
    random = np.random.Generator(np.random.Philox(0))
    inputs: dict[str, NDArray[Any]] = {}
    for tensor in session.get_inputs():
        shape = [DIM_SIZES.get(size, size) for size in tensor.shape]
        inputs[tensor.name] = np.zeros(shape, np.int32 if "int32" in tensor.type else np.float32)
        if tensor.name in ("base", "mods", "velocity", "residual"):
            inputs[tensor.name] = random.standard_normal(shape, dtype=np.float32) * np.float32(
                0.5 if tensor.name == "mods" else 1
            )
    inputs["point_coef"][0], inputs["update_coef"][0], inputs["update_coef"][-1], inputs["atol"][:] = 1.0, 1.0, 0.1, 1.0
    inputs["mix"][:] = np.eye(DIM_SIZES["N"])
    return inputs


def open_session(path: Path, *, exact: bool) -> Any:
    """Open ONNX Runtime on the CPU; `exact` sums 8-bit products in 32 bits, as the runtime's sessions do."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure_file(path: Path, core: Any) -> Report:
    """Measure one file: the types of OpenVINO's products, and its distance from ONNX Runtime.

    Args:
        core: an `openvino.Core`.

    Returns:
        `error` alone if OpenVINO refuses it; else `products` by type; `off`: rms of the difference of the velocities
        over theirs; and for files with 8-bit inputs `off_fast`: from ONNX Runtime's fast path, which adds pairs of
        products in 16 bits where the CPU has no VNNI, and saturates.
    """
    int8 = b"QuantizeLinear" in path.read_bytes()  # which is no part of "DequantizeLinear"
    session = open_session(path, exact=int8)
    arrays = make_inputs(session)
    try:
        hints = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(str(path)), "CPU", hints)
        velocities = np.asarray(compiled.create_infer_request().infer(arrays)["velocities"])
    except RuntimeError as error:
        return {"error": str(error).strip().splitlines()[-1]}
    fast_path_error = (
        {"off_fast": _compute_relative_error(velocities, _run_session(open_session(path, exact=False), arrays))}
        if int8
        else {}
    )
    counts: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        node_info = node.get_rt_info()
        if "layerType" in node_info and node_info["layerType"].astype(str) in PRODUCT_LAYERS:
            counts[node_info["runtimePrecision"].astype(str)] += 1
    return {
        "products": dict(counts.most_common()),
        "off": _compute_relative_error(velocities, _run_session(session, arrays)),
        **fast_path_error,
    }


def _run_session(session: Any, arrays: Arrays) -> NDArray[Any]:
    velocities: NDArray[Any] = session.run(["velocities"], dict(arrays))[0]
    return velocities


def _compute_relative_error(values: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def measure_files(files: Sequence[Path]) -> Report:
    """Measure every file, with the versions of the libraries.

    Raises:
        BackendError: OpenVINO is not installed here.
        EngineError: a file is missing.
    """
    for path in files:
        if not path.is_file():
            raise EngineError(f"no ONNX file at {path}", remedy="name predictor.onnx or refiner.onnx of a build")
    try:
        openvino = importlib.import_module("openvino")
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BackendError(
            f"{error.name} is not installed in this environment",
            remedy="python -m venv V && V/bin/pip install openvino onnxruntime click rich; then run V/bin/python",
        ) from error
    core = openvino.Core()
    return {
        "openvino": str(openvino.__version__).partition("-")[0],
        "onnxruntime": onnxruntime.__version__,
        "cpu": str(core.get_property("CPU", "FULL_DEVICE_NAME")),
        "capabilities": list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        "files": [{"file": str(path), **measure_file(path, core)} for path in files],
    }


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True, type=PATH)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON and nothing else on stdout.")
def main(files: tuple[Path, ...], as_json: bool) -> None:
    """Run ONNX files of trunks, quantised or not, in OpenVINO itself."""
    results = measure_files(files)
    if as_json:
        click.echo(json.dumps(results))
        return
    click.echo(f"OpenVINO {results['openvino']} on {results['cpu']}, ONNX Runtime {results['onnxruntime']}")
    for entry in results["files"]:
        if "error" in entry:
            click.echo(f"{entry['file']}: refused: {entry['error']}")
            continue
        products = ", ".join(f"{count} in {kind}" for kind, count in entry["products"].items())
        fast_path = f", {entry['off_fast']:.1e} from its fast path" if "off_fast" in entry else ""
        click.echo(f"{entry['file']}: runs; products: {products}; {entry['off']:.1e} from ONNX Runtime{fast_path}")


if __name__ == "__main__":
    main()
