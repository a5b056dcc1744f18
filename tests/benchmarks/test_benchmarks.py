"""The benchmarks run; what they find on this machine is no test."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from benchmarks import openvino_core
from benchmarks.openvino_core import make_inputs, measure_file, open_session
from benchmarks.quantization_files import measure_selected
from benchmarks.quantization_page import write_quantization_page
from benchmarks.training import TrainingSetup, measure_speed
from export.lowbit.layers import find_products
from export.lowbit.quantise import quantise_int8
from flowturbo.models.sit import SiTConfig
from runtime.directory.manifest import read_manifest
from runtime.system.errors import RequestError


def test_the_training_benchmark_compares_the_loops(tmp_path: Path) -> None:
    setting = TrainingSetup(SiTConfig(1, 16, 2, 2, 4), 4, "cpu", "fp32", block=2, blocks=3)
    found = measure_speed(setting, tmp_path)
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert (tmp_path / "run" / "final.safetensors").exists()


def test_the_page_of_low_precision_says_what_its_numbers_say(tmp_path: Path) -> None:
    """It is written by `python -m benchmarks.quantization`, and by `--again` from the numbers beside it."""
    docs = Path(__file__).parents[2] / "docs"
    numbers = json.loads((docs / "quantization.json").read_text(encoding="utf-8"))
    write_quantization_page(tmp_path / "page.md", numbers)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == (docs / "quantization.md").read_text(encoding="utf-8")
    gate = numbers["builds"]["int8"]["gate"]
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert f"{gate['twin_ms'] / gate['evaluation_ms']:.2f} ×" in page
    kinds = numbers["weights"]["demo"]["int8"]
    assert f"{100 * kinds['quantised'] / sum(kinds.values()):.1f} % (the demo)" in page and "80 % is met" in page
    kinds |= {"rest": 10**9}
    numbers["openvino"] = {"skipped": "it was not there"}
    write_quantization_page(tmp_path / "page.md", numbers)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "80 % is missed" in page and "| OpenVINO itself | it was not there |" in page


def test_numbers_are_added_only_to_a_run_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="without the builds of an earlier run"):
        measure_selected(("weights",), tmp_path, None)


class Said:
    """What OpenVINO says of a node."""

    def __init__(self, text: str) -> None:
        self._text = text

    def astype(self, kind: type) -> str:
        return self._text


class Core:
    """`openvino.Core` as far as it is asked, over ONNX Runtime's fast path; refuses what it is told to."""

    def __init__(self, refuses: str = "") -> None:
        self._refuses = refuses

    def read_model(self, path: str) -> str:
        if self._refuses:
            raise RuntimeError(f"Exception from somewhere\n{self._refuses}\n")
        return path

    def compile_model(self, path: str, device: str, hints: Any) -> Any:
        assert (device, hints) == ("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        session = open_session(Path(path), exact=False)
        nodes = [{"layerType": Said(kind), "runtimePrecision": Said("i8")} for kind in ("MatMul", "Softmax", "MatMul")]
        graph = SimpleNamespace(get_ordered_ops=lambda: [SimpleNamespace(get_rt_info=lambda n=n: n) for n in nodes])
        request = SimpleNamespace(infer=lambda arrays: {"velocities": session.run(["velocities"], arrays)[0]})
        return SimpleNamespace(create_infer_request=lambda: request, get_runtime_model=lambda: graph)


def test_openvino_is_compared_with_both_ways_of_summing(nosigma_engines: Path, tmp_path: Path) -> None:
    record = read_manifest(nosigma_engines).find_graph("predictor", 64, "fp32")
    assert record is not None
    path = nosigma_engines / record.path
    arrays = make_inputs(open_session(path, exact=False))
    assert {name: len(arrays[name]) for name in ("base", "mods")} == {"base": 1, "mods": 2}
    found = measure_file(path, Core())
    assert found == {"products": {"i8": 2}, "off": 0.0}
    assert measure_file(path, Core("the last line says why")) == {"error": "the last line says why"}
    int8 = tmp_path / "predictor.onnx"
    shutil.copy(path, int8)
    quantise_int8(int8, "predictor", dict.fromkeys(find_products(onnx.load(int8), "predictor", "it"), 4.0))
    found = measure_file(int8, Core())
    assert found["off_fast"] == 0.0 and 0 <= found["off"] < 0.5  # exact sums are others where the CPU saturates


def test_openvino_that_is_not_there_is_named(nosigma_engines: Path, tmp_path: Path) -> None:
    path = next(nosigma_engines.rglob("predictor.onnx"))
    if importlib.util.find_spec("openvino") is None:
        result = CliRunner().invoke(openvino_core.main, [str(path)])
        assert result.exit_code == 1 and "openvino is not installed" in result.output and "Do:" in result.output
    result = CliRunner().invoke(openvino_core.main, [str(tmp_path / "none.onnx")])
    assert result.exit_code == 1 and "no ONNX file at" in result.output
