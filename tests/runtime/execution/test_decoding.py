"""How latents are decoded: as many together as memory has room for, in tiles where it has none, and it is said."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from runtime.cli.run import main as run_main
from runtime.directory.records import EngineRecord, GraphRecord, Manifest, ModelRecord
from runtime.execution import decoding
from runtime.execution.decoding import ALLOCATOR_OVERHEAD, DECODE_BATCH, MEMORY_SHARE, DecodePlan, plan_decoding
from runtime.pipeline import Pipeline
from runtime.sampling.noise import sample_noise

MB = 1 << 20
WEIGHTS, PICTURE, TILE_PICTURE = 200 * MB, 1000 * MB, 250 * MB


def graph(name: str, resolution: int, activations: int, precision: str = "fp32") -> GraphRecord:
    path = f"{resolution}/{precision}/{name}.onnx"
    return GraphRecord(name, resolution, precision, path, None, 20, {}, WEIGHTS, None, activations)


@pytest.fixture(scope="module")
def manifest(tiny_engines: Path) -> Manifest:
    """A directory at 512 px with decoders of 1 GB a picture, and tiles of 128 and 256 px."""
    from runtime.directory.manifest import read_manifest

    graphs = (
        graph("decoder-ema", 512, PICTURE),
        graph("head-ema", 512, MB),
        graph("tile-ema", 128, TILE_PICTURE // 4),
        graph("tile-ema", 256, TILE_PICTURE),
    )
    engines = tuple(EngineRecord(g.graph, g.resolution, "cpu", "fp32", g.path, True) for g in graphs)
    own = read_manifest(tiny_engines)
    model: ModelRecord = replace(own.model, factor=8)
    return replace(own, model=model, resolutions=(512,), graphs=graphs, engines=engines, max_batch=8)


def without_tiles(manifest: Manifest) -> Manifest:
    return replace(manifest, engines=tuple(e for e in manifest.engines if not e.graph.startswith("tile")))


def plan(manifest: Manifest, free: int, tile: decoding.TileChoice = "auto", target: str = "cpu") -> DecodePlan:
    return plan_decoding(manifest, target, 512, "ema", tile, free)


@given(free=st.integers(1, 20_000 * MB))
def test_as_many_together_as_there_is_room_for(manifest: Manifest, free: int) -> None:
    found = plan(manifest, free)
    if found.tile is None:
        assert WEIGHTS + found.batch_size * ALLOCATOR_OVERHEAD * PICTURE <= MEMORY_SHARE * free + 1
        assert (
            found.batch_size == DECODE_BATCH
            or WEIGHTS + (found.batch_size + 1) * ALLOCATOR_OVERHEAD * PICTURE > MEMORY_SHARE * free - 1
        )
        assert found.warning == ""
    else:
        assert MEMORY_SHARE * free < WEIGHTS + ALLOCATOR_OVERHEAD * PICTURE + 1
        assert found.tile == 256 and "of memory" in found.warning and "decoded in tiles of 256 px" in found.warning


def test_whole_pictures_where_nobody_knows_or_asks(manifest: Manifest) -> None:
    assert plan(manifest, 0) == plan(manifest, 0, None) == DecodePlan()
    assert plan(manifest, MB, None) == DecodePlan(1)  # whole all the same, and fewer together change nothing
    unknown = replace(manifest, graphs=tuple(replace(g, activation_bytes=0) for g in manifest.graphs))
    assert plan(unknown, MB) == DecodePlan()  # a directory of an older version
    assert plan(manifest, 100_000 * MB, 128) == DecodePlan(1, 128)  # tiles that were asked for need no reason


def test_no_tiles_to_turn_to(manifest: Manifest) -> None:
    found = plan(without_tiles(manifest), 600 * MB)
    assert (found.batch_size, found.tile) == (1, None)
    assert "needs about 1.8 GB of memory, 629 MB are free" in found.warning and "build-engines" in found.warning


def test_a_fixed_batch_is_never_taken_apart(manifest: Manifest) -> None:
    fixed = replace(without_tiles(manifest), static_batch=True)
    assert plan(fixed, 600 * MB).batch_size == plan(fixed, 600 * MB, None).batch_size == fixed.max_batch


def test_tensorrt_takes_memory_for_its_largest_batch(manifest: Manifest) -> None:
    built = tuple(
        EngineRecord(g.graph, g.resolution, "tensorrt", "fp32", g.path.replace(".onnx", ".engine"), True)
        for g in manifest.graphs
    )
    jetson = replace(manifest, engines=built)
    largest = int((WEIGHTS + 8 * ALLOCATOR_OVERHEAD * PICTURE) / MEMORY_SHARE)
    assert plan(jetson, largest + MB, target="tensorrt") == DecodePlan()
    short = plan(jetson, largest - MB, target="tensorrt")
    assert (
        short.tile == 256
        and f"needs about {(WEIGHTS + 8 * ALLOCATOR_OVERHEAD * PICTURE) / 1e9:.1f} GB" in short.warning
    )


def test_only_memory_that_engines_share_with_the_host_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "read_memory_bytes", lambda: (8, 3))
    for tegra, expected in ((False, (3, 3, 0, 0)), (True, (3, 3, 3, 3))):
        monkeypatch.setattr(decoding, "is_tegra", lambda tegra=tegra: tegra)
        targets = ("cpu", "openvino", "cuda", "tensorrt")
        assert tuple(decoding.read_free_memory(target) for target in targets) == expected


def test_a_machine_short_of_memory_decodes_one_by_one_and_gets_the_same(
    tiny_engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        latents = sample_noise(range(3), pipeline._latent_shape)
        expected = pipeline.decode(latents)
        record = pipeline.manifest.find_graph("decoder-small", 32, "fp32")
        assert record is not None and record.activation_bytes > 0
    need = record.weight_bytes + ALLOCATOR_OVERHEAD * record.activation_bytes
    monkeypatch.setattr(decoding, "read_memory_bytes", lambda: (0, int(need / MEMORY_SHARE) + 1))
    with Pipeline.load(tiny_engines, threads=1) as pipeline, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pipeline.decode(latents)
        result = pipeline.run(pipeline.request([1, 2, 3], solver="euler", steps=1))
        assert result.usage.calls["decoder"] == 3 and pipeline.decoders.notes == []
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.filterwarnings("default:a decoder of")
def test_a_user_hears_that_memory_is_short(tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "read_memory_bytes", lambda: (1, 1))
    words = ["--engine", str(tiny_engines), "--class", "1", "--solver", "euler", "--steps", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(run_main, words)
    assert done.exit_code == 0
    assert "a decoder of 32 px needs about" in done.stderr and "no decoder of tiles was built" in done.stderr
    notes = json.loads((tmp_path / "run.json").read_text())["ran"]["notes"]
    assert any("needs about" in note for note in notes)
    assert "needs about" not in CliRunner().invoke(run_main, [*words, "--tile", "none"]).stderr
    done = CliRunner().invoke(run_main, [*words, "--tile", "big"])
    assert done.exit_code == 2 and "'big' is not auto, none, or a number of pixels" in done.stderr
