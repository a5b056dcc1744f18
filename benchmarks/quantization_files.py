"""What the files of a run of `benchmarks.quantization` hold, and what OpenVINO makes of them; nothing is timed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from export.lowbit.layers import TRUNKS
from export.lowbit.quantise import weights_by_kind
from export.targets import QUANTISED
from runtime.directory.manifest import read_manifest
from runtime.system.errors import BackendError, RequestError

Numbers = dict[str, Any]
LATER = ("weights", "openvino")
"""Measurements of files that lie in the work folder: nothing is timed, so they may be added to an earlier run's."""


def added(names: Sequence[str], work: Path | None, python: Path | None) -> Numbers:
    """The measurements of `LATER` that were asked for.

    Raises:
        RequestError: `work` does not hold an earlier run.
        BackendError: OpenVINO could not be asked.
    """
    if work is None or not (work / "fp32").is_dir():
        raise RequestError(
            f"--add without the builds of an earlier run in {work or '--work'}", remedy="name its --work folder"
        )
    found: Numbers = {}
    if "weights" in names:
        found["weights"] = measure_weights(work)
    if "openvino" in names:
        found["openvino"] = measure_openvino(work, python)
    return found


def folder_of(work: Path, name: str) -> Path:
    """Where a build of the demo lies."""
    return work / name.replace(", ", "-")


def measure_weights(work: Path) -> Numbers:
    """What the constants of every quantised trunk are, in bytes by kind: of the demo's builds, and of the large SiT."""
    found: Numbers = {"demo": {}, "large": {}}
    for name in ("int8", "int8, searched", *QUANTISED[1:]):
        folder = folder_of(work, name)
        graphs = [graph for graph in read_manifest(folder).graphs if graph.graph in TRUNKS]
        found["demo"][name] = _by_kind([folder / graph.path for graph in graphs])
    for precision in QUANTISED:
        path = work / "large" / "256" / precision / "predictor.onnx"
        if path.is_file():
            found["large"][precision] = _by_kind([path])
    return found


def _by_kind(paths: Sequence[Path]) -> dict[str, int]:
    held = [weights_by_kind(onnx.load(path, load_external_data=False)) for path in paths]
    return {kind: sum(one[kind] for one in held) for kind in held[0]}


def measure_openvino(work: Path, python: Path | None) -> Numbers:
    """What OpenVINO itself makes of the demo's trunk in every form for the CPU (`benchmarks.openvino_core`).

    Args:
        python: of an environment that has OpenVINO; this one's if None.

    Raises:
        BackendError: it fails.
    """
    if python is None and importlib.util.find_spec("openvino") is None:
        return {"skipped": "OpenVINO itself is not installed here (--openvino-python)"}
    forms = ("fp32", *QUANTISED)
    files = [str((work / form / "64" / form / "predictor.onnx").absolute()) for form in forms]
    words = [str(python or sys.executable), "-m", "benchmarks.openvino_core", "--json", *files]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode:
        raise BackendError(
            f"OpenVINO could not be asked: {done.stderr.strip() or done.returncode}",
            remedy="--openvino-python names the Python of an environment with openvino, onnxruntime, click and rich",
        )
    report: Numbers = json.loads(done.stdout)
    for form, one in zip(forms, report["files"], strict=True):
        one["file"] = form
    return report
