"""Same-seed error: the distance between the ends of a sampler and of a very fine one, from the same noise.

It is a sharp measure of a solver: it needs no data set, no feature extractor and few images, and it is zero for a
perfect integration of the same engines. It does not measure the model's quality.

Letters: B images, C latent channels, H = W side, P pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.quality.sampled_latents import SampledLatents, SampleDraw
from runtime.pipeline import Pipeline
from runtime.request import RequestOptions
from runtime.system.errors import RequestError
from runtime.system.progress import SILENT, Progress

Floats = NDArray[np.float32]
Scores = NDArray[np.float64]
Pixels = NDArray[np.uint8]

REFERENCE_STEPS = 250
REFERENCE_SAMPLER: RequestOptions = {"solver": "heun", "steps": REFERENCE_STEPS}
"""Sampler that stands for the exact solution: 500 evaluations of the same engines."""

WINDOW, SIGMA = 11, 1.5
K1, K2, PEAK = 0.01, 0.03, 255.0


def sample_reference_latents(
    pipeline: Pipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    guidance: float | None = None,
    guidance_channels: int | None = None,
    sampler: RequestOptions = REFERENCE_SAMPLER,
    cache: Path | None,
    progress: Progress = SILENT,
) -> Floats:
    """Return latents [B, C, H, W] of a fine sampler, from `cache` where they are there.

    Args:
        labels, seeds: one of each per image.
        guidance, guidance_channels: as in `Pipeline.request`; the directory's if None.
        sampler: further keyword arguments of `Pipeline.request`; Heun with 250 steps.
        cache: folder of latents; a killed call continues there and loses at most max-batch images. None caches nothing.
    """
    all_options = {"guidance": guidance, "guidance_channels": guidance_channels, **sampler}
    options: RequestOptions = {name: value for name, value in all_options.items() if value is not None}  # type: ignore[assignment]
    draw = SampleDraw(tuple(int(label) for label in labels), tuple(int(seed) for seed in seeds))
    return SampledLatents(pipeline, draw, options, cache).read_all(progress, "reference latents")


def latent_rms(latents: Floats, reference: Floats) -> Scores:
    """Return the root mean square of the difference per image, [B], in standard deviations of latents (about 1)."""
    _check_same_shape(latents, reference)
    difference = np.asarray(latents, np.float64) - np.asarray(reference, np.float64)
    return np.asarray(np.sqrt(np.mean(difference**2, axis=tuple(range(1, difference.ndim)))))


def psnr(images: Pixels, reference: Pixels) -> Scores:
    """Return the peak signal-to-noise ratio of 8-bit images [B, P, P, 3] in dB, [B]; infinite for equal images."""
    _check_same_shape(images, reference)
    error = latent_rms(np.asarray(images, np.float32), np.asarray(reference, np.float32))
    with np.errstate(divide="ignore"):
        return np.asarray(20 * np.log10(PEAK / error))


def ssim(images: Pixels, reference: Pixels) -> Scores:
    """Return the structural similarity of 8-bit images [B, P, P, 3], [B], 1 for equal images.

    Wang et al. 2004 (eq. 13): Gaussian window of 11 pixels and σ = 1.5, K1 = 0.01, K2 = 0.03, only where the window
    lies inside the image; the mean over places and colour channels.

    Raises:
        RequestError: images of other shapes, or smaller than the window.
    """
    _check_same_shape(images, reference)
    if min(images.shape[1:3]) < WINDOW:
        raise RequestError(
            f"images of {images.shape[2]} × {images.shape[1]} pixels for SSIM", allowed=f"at least {WINDOW} a side"
        )
    scores, c1, c2 = [], (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    for x8, y8 in zip(images, reference, strict=True):  # one by one, to save memory
        x, y = x8.astype(np.float64), y8.astype(np.float64)
        mean_x, mean_y = _blur(x), _blur(y)
        var_x, var_y = _blur(x**2) - mean_x**2, _blur(y**2) - mean_y**2
        covariance = _blur(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        structure = (2 * covariance + c2) / (var_x + var_y + c2)
        scores.append(float(np.mean(luminance * structure)))
    return np.asarray(scores)


def _blur(image: Scores) -> Scores:
    """Compute the Gaussian mean over every window inside the image: [P, P, 3] -> [P − 10, P − 10, 3]."""
    rows, columns = (_build_window_matrix(side) for side in image.shape[:2])
    return np.moveaxis(rows @ np.moveaxis(image, 2, 0) @ columns.T, 0, 2)


@lru_cache(maxsize=4)
def _build_window_matrix(side: int) -> Scores:
    """Build the matrix [P − 10, P] with a window per row: two matrix products blur an image."""
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    means = np.zeros((side - WINDOW + 1, side))
    for index, window in enumerate(means):
        window[index : index + WINDOW] = weights / weights.sum()
    return means


@dataclass(frozen=True)
class SameSeedError:
    """Means over images; the picture's are None where nothing was decoded.

    Attributes:
        latent_rms: `latent_rms`.
        psnr_db: mean of the per-image PSNR; infinite if every image, or any, is equal to its reference.
        ssim: mean of `ssim`.
    """

    latent_rms: float
    psnr_db: float | None = None
    ssim: float | None = None


def same_seed_error(
    latents: Floats, reference: Floats, images: Pixels | None = None, reference_images: Pixels | None = None
) -> SameSeedError:
    """Compare latents [B, C, H, W] and, where given, their pictures [B, P, P, 3] with those of the reference."""
    rms = float(np.mean(latent_rms(latents, reference)))
    if images is None or reference_images is None:
        return SameSeedError(rms)
    return SameSeedError(
        rms, float(np.mean(psnr(images, reference_images))), float(np.mean(ssim(images, reference_images)))
    )


def _check_same_shape(samples: NDArray[Any], reference: NDArray[Any]) -> None:
    if samples.shape != reference.shape or not len(samples):
        raise RequestError(
            f"shapes {list(samples.shape)} and {list(reference.shape)} to compare",
            allowed="one shape, at least one image",
        )
