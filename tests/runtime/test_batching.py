"""How many images are evaluated together: what a CPU's caches hold, never other pictures, and decoded as before."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import batching
from runtime.batching import CACHE_SHARE, DEFAULT_CACHE_BYTES, choose_batch_size, group_parts, split_request
from runtime.directory.manifest import read_manifest
from runtime.directory.records import TARGETS, EngineRecord, Manifest
from runtime.pipeline import Pipeline

MB = 1 << 20
OTHERS = ("openvino", "cuda", "tensorrt", "rtx")


def with_activations(manifest: Manifest, activations: int, **changes: Any) -> Manifest:
    """A directory whose predictor needs so much for one picture, for every target that runs ONNX files."""
    graphs = tuple(replace(g, activation_bytes=activations) if g.graph == "predictor" else g for g in manifest.graphs)
    path = next(g.path for g in graphs if g.graph == "predictor")
    engines = tuple(EngineRecord("predictor", 32, target, "fp32", path, True) for target in TARGETS)
    return replace(manifest, graphs=graphs, engines=engines, max_batch=8, **changes)


@pytest.fixture(scope="module")
def manifest(tiny_engines: Path) -> Manifest:
    return read_manifest(tiny_engines)


@pytest.mark.parametrize(
    ("cache", "activations", "expected"),
    [(32, 16, 1), (32, 15, 1), (32, 8, 2), (32, 7, 2), (32, 40, 1), (32, 1, 8), (64, 8, 4), (0, 8, 2), (32, 0, 8)],
)
def test_a_cpu_takes_what_half_its_last_cache_holds(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, cache: int, activations: int, expected: int
) -> None:
    monkeypatch.setattr(batching, "read_cache_bytes", lambda: cache * MB)
    assert (CACHE_SHARE, DEFAULT_CACHE_BYTES) == (0.5, 32 * MB)  # what the cases are made for
    assert choose_batch_size(with_activations(manifest, activations * MB), "cpu", 32) == expected


def test_other_devices_and_fixed_batches_take_max_batch(manifest: Manifest) -> None:
    large = with_activations(manifest, 1000 * MB)
    assert {target: choose_batch_size(large, target, 32) for target in OTHERS} == {
        "openvino": 1, "cuda": 8, "tensorrt": 8, "rtx": 8
    }  # fmt: skip
    assert choose_batch_size(replace(large, static_batch=True), "cpu", 32) == 8
    assert choose_batch_size(large, "cpu", 64) == 8  # no such engine: nothing is known


def request(rows: list[int], *, joint: bool = False) -> Any:
    """Images of so many rows each."""
    images = [SimpleNamespace(count_branches=lambda guided, own=own: own) for own in rows]
    return SimpleNamespace(conditions=images, sampler=SimpleNamespace(adaptive_solver=SimpleNamespace(is_joint=joint)))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.integers(1, 6), st.integers(6, 9))
def test_parts_and_batches_cover_a_request_once_and_in_order(rows: list[int], at_once: int, max_batch: int) -> None:
    parts = list(split_request(request(rows), at_once))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(rows)))
    for part in parts:
        count = part.stop - part.start
        assert count == 1 or (count <= at_once and sum(rows[part]) <= 2 * at_once)
    batches = list(group_parts(parts, max_batch))
    assert [part for batch in batches for part in batch] == parts
    assert all(0 < batch[-1].stop - batch[0].start <= max_batch for batch in batches)
    assert all(a[-1].stop - a[0].start + b[0].stop - b[0].start > max_batch for a, b in pairwise(batches))


def test_images_under_one_norm_stay_together() -> None:
    assert list(split_request(request([2] * 5, joint=True), 1)) == [slice(0, 5)]


@pytest.mark.filterwarnings("ignore:refiner steps")
@pytest.mark.parametrize(
    "sampler",
    [
        {"schedule": "H1P2R2"},
        {"solver": "sde-euler", "steps": 5},
        {"adaptive": "lte", "tolerance": 0.05},
        {"solver": "dopri5-reference", "tolerance": 0.05, "guidance": 1.0},
    ],
    ids=lambda named: next(iter(named.values())),
)
def test_pictures_do_not_depend_on_how_many_go_together(
    tiny_engines: Path, monkeypatch: pytest.MonkeyPatch, sampler: dict[str, Any]
) -> None:
    with Pipeline.load(tiny_engines, backend="onnxruntime", provider="cpu", threads=1) as pipeline:
        asked = pipeline.request([1, 2, 3], seeds=[5, 6, 7], **sampler)
        together = pipeline.run(asked)
        monkeypatch.setattr("runtime.pipeline.choose_batch_size", lambda *given: 1)
        alone = pipeline.run(asked)
    joint = asked.sampler.adaptive_solver is not None and asked.sampler.adaptive_solver.is_joint
    np.testing.assert_allclose(alone.latents, together.latents, atol=2e-5)
    assert len(alone.journals) == len(together.journals)
    assert alone.usage.calls["decoder"] == together.usage.calls["decoder"] == 1
    if asked.sampler.adaptive_solver is None:
        assert alone.usage.calls["predictor"] == 3 * together.usage.calls["predictor"]
    elif joint:
        assert alone.usage.calls["predictor"] == together.usage.calls["predictor"]


def test_a_callback_hears_of_every_part(tiny_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.pipeline.choose_batch_size", lambda *given: 2)
    heard: list[Any] = []
    with Pipeline.load(tiny_engines, backend="fake") as pipeline:
        asked = pipeline.request([1, 2, 3], solver="euler", steps=4)
        pipeline.run(asked, callback=heard.append)
        assert pipeline.split_batches(asked) == [[slice(0, 2), slice(2, 3)]]
    assert len(heard) == 2 * 4
