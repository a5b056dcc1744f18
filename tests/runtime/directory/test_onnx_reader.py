"""What an ONNX file says of its constants, read without the onnx package and compared with it."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.directory.manifest import read_manifest
from runtime.directory.onnx_reader import check_onnx_file, read_onnx_constants
from runtime.system.errors import EngineError

TYPE_NAMES = {TensorProto.FLOAT: "fp32", TensorProto.INT64: "int64", TensorProto.INT8: "int8"}


def list_tensors(graph: onnx.GraphProto) -> list[TensorProto]:
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    return [*graph.initializer, *(attribute.t for attribute in attributes if attribute.HasField("t"))]


def write_model(path: Path, *, location: str = "") -> None:
    """A product with a constant, in a file of its own where `location` names one."""
    weights = numpy_helper.from_array(np.ones((16, 16), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16]) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph([node], "g", tensors[:1], tensors[1:], [weights]))
    external = {"save_as_external_data": True, "location": location, "size_threshold": 1} if location else {}
    onnx.save(model, path, **external)


def test_constants_are_those_of_the_onnx_package(tiny_engines: Path) -> None:
    paths = sorted(tiny_engines.rglob("*.onnx"))
    assert paths
    for path in paths:
        expected: Counter[str] = Counter()
        for tensor in list_tensors(onnx.load(path).graph):
            expected[TYPE_NAMES[tensor.data_type]] += int(np.prod(tensor.dims))
        assert read_onnx_constants(path).elements == expected
        assert not read_onnx_constants(path).locations


def test_external_data_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "m.onnx", location="m.onnx.data")
    constants = read_onnx_constants(tmp_path / "m.onnx")
    assert (constants.locations, constants.elements) == ({"m.onnx.data"}, {"fp32": 256})


def test_weights_that_the_manifest_does_not_name_are_refused(tiny_engines: Path, tmp_path: Path) -> None:
    record = read_manifest(tiny_engines).find_graph("conditioning", 32, "fp32")
    assert record is not None
    record = replace(record, path="m.onnx", data=None)
    write_model(tmp_path / "m.onnx", location="other.data")
    with pytest.raises(EngineError) as caught:
        check_onnx_file(tmp_path, record)
    assert "reads weights from 'other.data', for which the manifest has no hash" in caught.value.given
    assert caught.value.allowed == "the file itself" and caught.value.remedy
    check_onnx_file(tmp_path, replace(record, data="other.data"))


@pytest.mark.parametrize("claim", ["fp16", "bf16", "int8", "int8-weights", "int4-weights", "int8-fp16"])
def test_a_claimed_precision_is_compared_with_the_file(tiny_engines: Path, claim: str) -> None:
    record = read_manifest(tiny_engines).find_graph("predictor", 32, "fp32")
    assert record is not None
    check_onnx_file(tiny_engines, record)
    with pytest.raises(EngineError, match=f"is not {claim}, as the manifest says: it holds fp32"):
        check_onnx_file(tiny_engines, replace(record, precision=claim))


def test_files_that_are_none(tiny_engines: Path, tmp_path: Path) -> None:
    record = read_manifest(tiny_engines).find_graph("predictor", 32, "fp32")
    assert record is not None
    whole = (tiny_engines / record.path).read_bytes()
    record, path = replace(record, path="m.onnx"), tmp_path / "m.onnx"
    nested = b""
    for _ in range(60):  # a graph in an attribute of a node of a graph …
        for key in (0x32, 0x2A, 0x0A):
            size = len(nested)
            nested = bytes([key, *([size] if size < 128 else [size & 127 | 128, size >> 7])]) + nested
    nested = bytes([0x3A, len(nested) & 127 | 128, len(nested) >> 7]) + nested
    for content in (b"", whole[: len(whole) // 2], b"\xff" * 100, b"text", nested):
        path.write_bytes(content)
        with pytest.raises(EngineError, match="cannot be read"):
            check_onnx_file(tmp_path, record)
    path.unlink()
    with pytest.raises(EngineError, match="cannot be read"):
        check_onnx_file(tmp_path, record)
    shutil.copy("/dev/null", path)
    with pytest.raises(EngineError, match="is empty"):
        check_onnx_file(tmp_path, record)
