"""Weights in int8: no pair of neighbours overflows 16 bits, little is lost by that, and engines are exact with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.lowbit.rounding import MAX_INT8, MAX_NEIGHBOUR_SUM, has_no_int16_overflow, quantise_weight
from runtime.backends.base import BackendOptions, EngineFile
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.directory.contract import GraphSpec, TensorSpec

SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, max_side=9)
VALUES = st.floats(-1e4, 1e4, width=32)


def random_weight(rows: int = 256, columns: int = 96) -> NDArray[np.float32]:
    return np.random.Generator(np.random.Philox(0)).standard_normal((rows, columns), dtype=np.float32)


@given(arrays.arrays(np.float32, SHAPES, elements=VALUES))
def test_no_pair_overflows_and_every_weight_is_near(weight: NDArray[np.float32]) -> None:
    integers, steps = quantise_weight(weight)
    assert np.isfinite(steps).all() and (steps > 0).all()
    assert np.abs(integers.astype(int)).max() <= MAX_INT8
    for row in range(0, len(weight) - 1, 2):
        one, other = integers[row].astype(int), integers[row + 1].astype(int)
        for inputs in ((255, 255), (255, 0), (0, 255)):
            total = inputs[0] * one + inputs[1] * other
            assert (total < 2**15).all() and (total >= -(2**15)).all()
    # Seven bits for every weight is among what is tried: no channel may come out worse.
    coarse = np.maximum(np.abs(weight).max(axis=0) / (MAX_NEIGHBOUR_SUM // 2), np.finfo(np.float32).tiny)
    seven = np.square(weight - np.rint(weight / coarse) * coarse).sum(axis=0)
    lost = np.square(weight - integers * steps).sum(axis=0)
    ulp = np.abs(weight).max(axis=0) * np.float32(2**-23)  # integers · steps is itself rounded to float32
    assert (lost <= seven * (1 + 1e-4) + 1e-12 + len(weight) * np.square(ulp)).all()


@given(arrays.arrays(np.int8, SHAPES, elements=st.integers(-MAX_INT8, MAX_INT8)))
def test_what_fits_is_what_the_two_worst_inputs_say(integers: NDArray[np.int8]) -> None:
    paired = integers[: len(integers) // 2 * 2].astype(int).reshape(-1, 2, integers.shape[1])
    worst = 255 * np.abs(np.stack([paired.clip(0).sum(axis=1), paired.clip(max=0).sum(axis=1)])).max(initial=0)
    assert has_no_int16_overflow(integers) == (worst < 2**15)


def test_a_trained_layers_weights_lose_little() -> None:
    weight = random_weight(1152, 64)
    plain = np.abs(weight).max(axis=0) / MAX_INT8
    eight = np.linalg.norm(weight - np.rint(weight / plain) * plain)
    seven = np.linalg.norm(weight - np.rint(weight / plain / 2) * plain * 2)
    integers, steps = quantise_weight(weight)
    assert eight < np.linalg.norm(weight - integers * steps) < 1.5 * eight < 0.8 * seven
    assert np.abs(integers.astype(int)).max() > MAX_NEIGHBOUR_SUM // 2  # single large weights keep all their bits


def test_steps_are_what_a_float16_file_stores() -> None:
    weight = random_weight().astype(np.float16)
    integers, steps = quantise_weight(weight)
    assert steps.dtype == np.float16
    off = np.linalg.norm(integers * steps.astype(np.float32) - weight) / np.linalg.norm(weight)
    wide, widths = quantise_weight(weight.astype(np.float32))
    assert off < 1.01 * np.linalg.norm(wide * widths - weight) / np.linalg.norm(weight)


def test_a_channel_of_zeros_stays_one() -> None:
    for kind in (np.float32, np.float16):
        integers, steps = quantise_weight(np.zeros((4, 3), kind))
        assert not integers.any() and (steps > 0).all()


def product(integers: NDArray[np.int8], path: Path) -> Path:
    """x in steps of one → x @ integers, as a quantised trunk's product."""
    rows, columns = integers.shape
    one = numpy_helper.from_array(np.float32(1), "one")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "steps"], ["wd"], axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, columns])],
        [
            numpy_helper.from_array(integers, "w"),
            numpy_helper.from_array(np.ones(columns, np.float32), "steps"),
            one,
            numpy_helper.from_array(np.int8(0), "zero"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def summed(path: Path, x: NDArray[np.float32], entries: dict[str, str]) -> NDArray[Any]:
    options = ort.SessionOptions()
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    found: NDArray[Any] = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]
    return found


@pytest.mark.parametrize("columns", [16, 33, 96])
@pytest.mark.parametrize("count", [1, 5, 64])
def test_the_fastest_products_are_exact_at_the_largest_inputs(tmp_path: Path, columns: int, count: int) -> None:
    """Inputs at both ends of their range, where sums in 16 bits would saturate, in the order that the kernel adds them."""
    integers, _ = quantise_weight(random_weight(columns=columns))
    random = np.random.Generator(np.random.Philox(1))
    x = random.choice(np.asarray([-128.0, 126.0, 127.0], np.float32), size=(count, len(integers)))
    x[0] = 127
    exact = x.astype(np.int64) @ integers.astype(np.int64)
    np.testing.assert_array_equal(summed(product(integers, tmp_path / "p.onnx"), x, {}), exact)


@pytest.mark.parametrize("fit", [True, False])
def test_engines_of_earlier_builds_still_take_the_slower_exact_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: bool
) -> None:
    """Their weights may overflow; a session of one that says it fits is left to its fastest product."""
    told: list[str] = []
    add = ort.SessionOptions.add_session_config_entry
    monkeypatch.setattr(
        ort.SessionOptions,
        "add_session_config_entry",
        lambda self, key, value: (told.append(key), add(self, key, value)),
    )
    path = product(quantise_weight(random_weight())[0], tmp_path / "p.onnx")
    spec = GraphSpec({"x": TensorSpec("float32", ("B", 256))}, {"y": TensorSpec("float32", ("B", 96))})
    OnnxRuntimeBackend(BackendOptions(provider="cpu", threads=1)).load(
        EngineFile(path, "p", "int8", spec, "", pairs_fit=fit)
    ).close()
    assert ("session.x64quantprecision" in told) == (not fit)
