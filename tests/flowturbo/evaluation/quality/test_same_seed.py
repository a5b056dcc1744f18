"""Same-seed error: its numbers against hand-computed ones, and the kept latents of the fine reference."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_progress import RecordedProgress

from flowturbo.evaluation.quality.same_seed import latent_rms, psnr, same_seed_error, sample_reference_latents, ssim
from flowturbo.evaluation.quality.sampled_latents import SampledLatents, SampleDraw, make_balanced_draw
from runtime.pipeline import Pipeline
from runtime.system.errors import RequestError

FINE = {"solver": "heun", "steps": 3}


def pictures(seed: int, count: int = 1, side: int = 16) -> np.ndarray:
    g = np.random.Generator(np.random.Philox(seed))
    return g.integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def test_rms_and_psnr_by_hand() -> None:
    zero = np.zeros((2, 1, 2, 2), np.float32)
    off = np.array([[[[1, -1], [1, -1]]], [[[0, 0], [0, 4]]]], np.float32)
    np.testing.assert_allclose(latent_rms(off, zero), [1.0, 2.0])
    black, grey = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 51, np.uint8)
    assert psnr(grey, black)[0] == pytest.approx(20 * np.log10(5))  # 255 / 51
    assert psnr(black, black)[0] == np.inf


def test_ssim_of_two_flat_images_is_the_luminance_term() -> None:
    x, y = np.full((1, 11, 11, 3), 100, np.uint8), np.full((1, 11, 11, 3), 150, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(x, y)[0] == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))


def test_ssim_against_the_formula_written_out() -> None:
    """One window: the sums of Wang et al. 2004, eq. 13 to 16, with a two-dimensional window."""
    x, y = pictures(0, side=11), pictures(1, side=11)
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2, found = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for channel in range(3):
        a, b = x[0, :, :, channel].astype(float), y[0, :, :, channel].astype(float)
        ma, mb = (weights * a).sum(), (weights * b).sum()
        va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
        cov = (weights * (a - ma) * (b - mb)).sum()
        found.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert ssim(x, y)[0] == pytest.approx(np.mean(found), rel=1e-9)


@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_ssim_is_symmetric_at_most_one_and_one_for_equals(a: int, b: int) -> None:
    x, y = pictures(a), pictures(b)
    assert ssim(x, y)[0] == pytest.approx(ssim(y, x)[0])
    assert ssim(x, y)[0] <= 1 + 1e-12
    assert ssim(x, x)[0] == pytest.approx(1)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(RequestError, match="one shape"):
        latent_rms(np.zeros((1, 4, 2, 2), np.float32), np.zeros((2, 4, 2, 2), np.float32))
    with pytest.raises(RequestError, match="at least 11"):
        ssim(pictures(0, side=8), pictures(1, side=8))


@pytest.mark.parametrize(("classes", "num"), [([3, 5], 5), (list(range(1000)), 7), ([1, 2, 3], 3)])
def test_a_draw_is_balanced_in_every_part(classes: list[int], num: int) -> None:
    draw = make_balanced_draw(classes, num, first_seed=10)
    counts = [draw.labels.count(label) for label in set(draw.labels)]
    assert max(counts) - min(counts) <= 1
    assert len(set(draw.labels[: len(classes)])) == min(len(classes), num)
    assert draw.seeds == tuple(range(10, 10 + num))


def test_the_reference_is_the_sampler_s_own_latents_and_is_kept(tiny_engines: Path, tmp_path: Path) -> None:
    progress = RecordedProgress()
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        labels, seeds = [1, 2, 3, 1, 2], [5, 6, 7, 8, 9]  # two chunks: max-batch is 3
        asked = {"guidance": 2.0, "sampler": FINE, "cache": tmp_path}
        found = sample_reference_latents(pipeline, labels, seeds, **asked, progress=progress)
        request = pipeline.request(labels, seeds=seeds, guidance=2.0, **FINE)
        np.testing.assert_array_equal(found, pipeline.run(request).latents)
        assert [(done, total) for _, done, total in progress.updates] == [(3, 5), (5, 5)]
        (folder,) = tmp_path.iterdir()
        first = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
        assert len(first) == 2
        np.testing.assert_array_equal(sample_reference_latents(pipeline, labels, seeds, **asked), found)
        assert {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")} == first
        # Anything else asked for is kept apart.
        for other in ({"guidance": 3.0}, {"sampler": {"solver": "euler", "steps": 3}}, {"guidance_channels": 4}):
            before = len(list(tmp_path.iterdir()))
            sample_reference_latents(pipeline, labels, seeds, **{**asked, **other})
            assert len(list(tmp_path.iterdir())) == before + 1
        assert same_seed_error(found, found).latent_rms == 0


def test_a_damaged_or_missing_chunk_is_made_again_and_shards_share_the_work(tiny_engines: Path, tmp_path: Path) -> None:
    draw = SampleDraw((1, 1, 2, 2, 3, 3, 4), tuple(range(7)))
    with Pipeline.load(tiny_engines, threads=1) as pipeline:
        latents = SampledLatents(pipeline, draw, FINE, tmp_path)
        assert [chunk.start for chunk in latents.read_chunks((0, 2))] == [0, 6]
        assert sorted(path.name for path in latents.folder.glob("*.npz")) == ["0000000.npz", "0000006.npz"]
        assert [chunk.start for chunk in latents.read_chunks((1, 2))] == [3]
        whole = latents.read_all()
        (latents.folder / "0000003.npz").write_bytes(b"half a file")
        (latents.folder / "0000006.npz").unlink()
        np.testing.assert_array_equal(SampledLatents(pipeline, draw, FINE, tmp_path).read_all(), whole)
        kept = next(iter(latents.read_chunks()))
        assert kept.nfe == {"predictor": 6, "refiner": 0}
        shutil.rmtree(latents.folder)
        np.testing.assert_array_equal(SampledLatents(pipeline, draw, FINE, None).read_all(), whole)
