"""Large pictures in tiles: how a square is cut, and that the picture is the whole decoder's to less than a grey level."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from golden import HEADS
from hypothesis import given
from hypothesis import strategies as st

from export.build import build
from export.build_request import resolve_request
from export.cli.export import main as export_main
from flowturbo.evaluation.speed.conditions import build_engine_subject
from flowturbo.evaluation.speed.timed_pipeline import TimedPipeline
from runtime.cli.run import main as run_main
from runtime.directory.manifest import read_manifest
from runtime.execution import decoding
from runtime.execution.tiling import TiledDecoder, Tiling
from runtime.pipeline import Pipeline
from runtime.sampling.noise import sample_noise
from runtime.system.errors import NonFiniteError, RequestError

PIXELS, TILE = 128, 64


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    tile = draw(st.integers(8, 40))
    return Tiling.with_default_overlap(draw(st.integers(tile + 1, 4 * tile)), tile)


@given(tilings(), st.sampled_from([1, 2, 8]))
def test_every_feature_is_one_tiles_and_every_pixel_is_seen(tiling: Tiling, factor: int) -> None:
    owned, seen = np.zeros(tiling.side), np.zeros(tiling.side * factor)
    for start in tiling.compute_starts():
        assert 0 <= start <= tiling.side - tiling.tile
        owned[start : start + tiling.tile] += tiling.compute_core_mask(start)
        seen[start * factor : (start + tiling.tile) * factor] += tiling.compute_weight(start, factor)
    np.testing.assert_array_equal(owned, 1)
    assert seen.min() > 0.4
    assert all(
        b - a <= tiling.tile - tiling.overlap
        for a, b in zip(tiling.compute_starts(), tiling.compute_starts()[1:], strict=False)
    )


@pytest.mark.parametrize("numbers", [(16, 16, 4, 1), (16, 8, 2, 1), (16, 8, 8, 1)])
def test_tiles_that_cannot_be_blended_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="tiles of"):
        Tiling(*numbers)


@pytest.fixture(scope="module")
def engines(checkpoints: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory at 128 px with decoders for tiles of 64."""
    out = tmp_path_factory.mktemp("tiled") / "engines"
    request = resolve_request(
        predictor=checkpoints / "golden_nosigma-predictor.pt",
        vaes=[str(vae)],
        heads=HEADS["golden_nosigma"],
        targets=["cpu"],
        resolutions=[PIXELS],
        max_batch=2,
        tile=TILE,
    )
    build(request, out)
    return out


@pytest.fixture(scope="module")
def tiled(engines: Path) -> Iterator[Pipeline]:
    with Pipeline.load(engines, threads=1, decode_tile=TILE) as opened:
        yield opened


def test_a_picture_in_tiles_is_the_whole_decoders(engines: Path, tiled: Pipeline) -> None:
    """Less than one grey level on average, and no seam; tiles with norms of their own are many times further off."""
    side = tiled.manifest.compute_side(PIXELS)
    latents = sample_noise([1, 2], (4, side, side))
    latents[0] += np.linspace(-1.5, 1.5, side, dtype=np.float32)  # a gradient: no tile looks like the whole
    with Pipeline.load(engines, threads=1) as opened:
        whole = opened.decode(latents).astype(np.int32)
    error = np.abs(tiled.decode(latents) - whole)
    assert error.mean(axis=(1, 2, 3)).max() < 1
    assert error.max() <= 8
    spec = tiled.manifest.build_spec("tile-small", TILE)
    decoder = TiledDecoder(tiled._backend, tiled._load_engine("tile-small", TILE), spec, 1, side)
    features = tiled.decoders._run_graph("head-small", latents[:1])["features"]
    alone, _, _ = decoder._run_pass(features, np.zeros(decoder._inputs["moments"].shape, np.float32), has_moments=False)
    apart = np.abs(alone.transpose(0, 2, 3, 1) * 255 - whole[:1]).mean()
    assert apart > 3 * error[0].mean()


def test_no_norm_waits_for_the_end_with_its_input(engines: Path) -> None:
    """Whatever a tile's share of the moments needs, its picture needs too, so that every order takes it in between."""
    manifest = read_manifest(engines)
    graph = onnx.load(engines / next(g.path for g in manifest.graphs if g.graph == "tile-small")).graph
    made = {name: node for node in graph.node for name in node.output}

    def needed(output: str) -> set[str]:
        found, todo = set(), [output]
        while todo:
            if (node := made.get(todo.pop())) is not None and node.name not in found:
                found.add(node.name)
                todo += node.input
        return found

    assert needed("sums") - needed("images") == {made["sums"].name}


def test_tiles_are_counted_and_said(engines: Path, tiled: Pipeline, tmp_path: Path) -> None:
    command = ["--engine", str(engines), "--class", "1", "--solver", "euler", "--steps", "1", "--tile", str(TILE)]
    done = CliRunner().invoke(run_main, [*command, "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "note: decoded in tiles of 64 pixels" in done.output
    calls = tiled.run(tiled.request(1, solver="euler", steps=1)).usage.calls["decoder"] - 1  # the head
    assert (
        calls
        % len(
            list(
                Tiling.with_default_overlap(
                    tiled.manifest.compute_side(PIXELS), TILE // tiled.manifest.model.factor
                ).list_corners()
            )
        )
        == 0
    )


def test_tiles_stand_in_where_memory_is_short(engines: Path, tiled: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    side = tiled.manifest.compute_side(PIXELS)
    latents = sample_noise([3], (4, side, side))
    expected = tiled.decode(latents)
    monkeypatch.setattr(decoding, "read_memory_bytes", lambda: (0, 1 << 20))
    with Pipeline.load(engines, threads=1) as opened:
        with pytest.warns(UserWarning, match="1 MB are free: decoded in tiles of 64 px"):
            np.testing.assert_array_equal(opened.decode(latents), expected)
        assert opened.decode_tile == TILE
        assert any("not equal" in note for note in opened.decoders.notes)
        monkeypatch.setattr(decoding, "read_memory_bytes", lambda: (0, 1 << 40))
        np.testing.assert_array_equal(opened.decode(latents), expected)  # a pipeline does not change its mind


def test_a_broken_tile_is_said(tiled: Pipeline) -> None:
    latents = np.zeros((1, 4, *[tiled.manifest.compute_side(PIXELS)] * 2), np.float32)
    latents[0, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="would be black"):
        tiled.decode(latents)


@pytest.mark.parametrize("tile", [32, 100, PIXELS, 4096])
def test_tiles_that_were_not_built_are_refused(engines: Path, tile: int) -> None:
    with pytest.raises(RequestError) as caught:
        Pipeline.load(engines, decode_tile=tile)
    assert caught.value.given == f"tiles of {tile} pixels"
    assert caught.value.allowed == "64"
    assert "build-engines --tile" in caught.value.remedy


@pytest.mark.parametrize(("tile", "why"), [(20, "multiples of 16"), (PIXELS, "below 128"), (8, "multiples of 16")])
def test_tiles_that_cannot_be_built_are_refused(
    checkpoints: Path, vae: Path, tmp_path: Path, tile: int, why: str
) -> None:
    options: list[Any] = ["--predictor", checkpoints / "golden_nosigma-predictor.pt", "--vae", vae, "--heads", 4]
    options += ["--resolution", PIXELS, "--target", "cpu", "--tile", tile, "--out", tmp_path / "engines"]
    done = CliRunner().invoke(export_main, ["build-engines", *map(str, options)])
    assert done.exit_code == 1
    assert f"--tile {tile}" in done.output
    assert why in done.output


def test_a_benchmark_times_every_tile(engines: Path) -> None:
    with TimedPipeline.open(engines, threads=1, decode_tile=TILE) as pipeline:
        assert isinstance(pipeline, TimedPipeline)
        subject = build_engine_subject("tiled", pipeline, (), 1, {"schedule": "H1"}, conditioning="fresh")
        sample = subject.sample()
        assert len(sample.calls["decoder"]) > 4  # the head once, and tiles that cover the picture
        assert sample.host_ms >= 0
        assert pipeline.weight_bytes()
        assert subject.condition.vae is not None
        assert subject.condition.vae.endswith(f"in tiles of {TILE} px")
