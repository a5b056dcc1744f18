"""Measure the files of a run of `benchmarks.quantization`, also in OpenVINO. Nothing is timed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import onnx

from benchmarks.quantization_page import Numbers
from export.lowbit.layers import TRUNKS
from export.lowbit.quantise import count_weights_by_kind
from export.targets import QUANTISED_PRECISIONS
from runtime.directory.manifest import read_manifest
from runtime.system.errors import BackendError, RequestError

FILE_MEASUREMENTS = ("weights", "openvino")
"""Measurements of files in the work folder: nothing is timed, so they may be added to an earlier run."""


def measure_selected(names: Sequence[str], work: Path | None, python: Path | None) -> Numbers:
    """Make the requested measurements of `FILE_MEASUREMENTS`.

    Raises:
        RequestError: `work` does not hold an earlier run.
        BackendError: OpenVINO failed.
    """
    if work is None or not (work / "fp32").is_dir():
        raise RequestError(
            f"--add without the builds of an earlier run in {work or '--work'}", remedy="name its --work folder"
        )
    results: Numbers = {}
    if "weights" in names:
        results["weights"] = measure_weights(work)
    if "openvino" in names:
        results["openvino"] = measure_openvino(work, python)
    return results


def get_build_folder(work: Path, name: str) -> Path:
    """Return the folder of a build of the demo."""
    return work / name.replace(", ", "-")


def measure_weights(work: Path) -> Numbers:
    """Count the bytes of constants by kind in every quantised trunk, of the demo's builds and of the large SiT."""
    results: Numbers = {"demo": {}, "large": {}}
    for name in ("int8", "int8, searched", *QUANTISED_PRECISIONS[1:]):
        folder = get_build_folder(work, name)
        graphs = [graph for graph in read_manifest(folder).graphs if graph.graph in TRUNKS]
        results["demo"][name] = _sum_weights_by_kind([folder / graph.path for graph in graphs])
    for precision in QUANTISED_PRECISIONS:
        path = work / "large" / "256" / precision / "predictor.onnx"
        if path.is_file():
            results["large"][precision] = _sum_weights_by_kind([path])
    return results


def _sum_weights_by_kind(paths: Sequence[Path]) -> dict[str, int]:
    weights_by_file = [count_weights_by_kind(onnx.load(path, load_external_data=False)) for path in paths]
    return {kind: sum(file_weights[kind] for file_weights in weights_by_file) for kind in weights_by_file[0]}


def measure_openvino(work: Path, python: Path | None) -> Numbers:
    """Run the demo's trunk in every form for the CPU in OpenVINO itself (`benchmarks.openvino_core`).

    Args:
        python: of an environment that has OpenVINO; this one's if None.

    Raises:
        BackendError: it fails.
    """
    if python is None and importlib.util.find_spec("openvino") is None:
        return {"skipped": "OpenVINO itself is not installed here (--openvino-python)"}
    forms = ("fp32", *QUANTISED_PRECISIONS)
    files = [str((work / form / "64" / form / "predictor.onnx").absolute()) for form in forms]
    command = [str(python or sys.executable), "-m", "benchmarks.openvino_core", "--json", *files]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if process.returncode:
        raise BackendError(
            f"OpenVINO could not be asked: {process.stderr.strip() or process.returncode}",
            remedy="--openvino-python names the Python of an environment with openvino, onnxruntime, click and rich",
        )
    report: Numbers = json.loads(process.stdout)
    for form, entry in zip(forms, report["files"], strict=True):
        entry["file"] = form
    return report
