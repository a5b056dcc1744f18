"""What a calibration measures with: samplers of one engine directory against a very fine one from the same noise.

Letters: B images, C latent channels, H = W latent side.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.quality.same_seed import latent_rms, sample_reference_latents
from flowturbo.evaluation.quality.sampled_latents import make_balanced_draw
from runtime.pipeline import Pipeline
from runtime.request import RequestOptions
from runtime.run_report import count_nfe
from runtime.sampling.controllers import Journal
from runtime.system.progress import SILENT, Progress

Floats = NDArray[np.float32]
Scores = NDArray[np.float64]
ImageProgress = Callable[[int, int], None]

FIT_SEED, HELD_OUT_SEED = 1_000_000, 0
"""First seeds of what a calibration looks at, and of what decides in the end: they never meet."""


@dataclass(frozen=True)
class Guidance:
    """How a calibration guides: what the samplers will be deployed with.

    Attributes:
        scale, channels: the directory's own if None.
        interval: flow times in which it acts.
    """

    scale: float | None = None
    channels: int | None = None
    interval: tuple[float, float] = (0.0, 1.0)

    @property
    def options(self) -> RequestOptions:
        """As `Pipeline.request` takes it."""
        options: RequestOptions = {"guidance_interval": self.interval}
        if self.scale is not None:
            options["guidance"] = self.scale
        if self.channels is not None:
            options["guidance_channels"] = self.channels
        return options


@dataclass(frozen=True)
class SamplerMeasurement:
    """What a sampler did.

    Attributes:
        name: of the sampler.
        error: root mean square distance of the latents from the fine sampler's, mean over images.
        errors: the same, per image.
        predictor_nfe, refiner_nfe: evaluations of an image, their mean where images differ.
        unguided_nfe: of a fixed sampler's predictor evaluations, those outside the guidance interval.
        seconds_per_image: wall time of an image, without decoding.
        journals: paths of the images, of samplers that choose their steps.
    """

    name: str
    error: float
    errors: Scores
    predictor_nfe: float
    refiner_nfe: float
    unguided_nfe: float
    seconds_per_image: float
    journals: tuple[Journal, ...] = ()


class SamplerMeter:
    """Some seeds of one model, classes taking turns, and where a very fine sampler takes them.

    Args:
        pipeline: an open pipeline.
        images: how many.
        first_seed: `FIT_SEED` or `HELD_OUT_SEED`.
        cache: folder in which the fine sampler's latents are kept; they cost most.
        report: told of the fine sampler's progress.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        images: int,
        guidance: Guidance,
        *,
        first_seed: int = HELD_OUT_SEED,
        cache: Path | None = None,
        report: ImageProgress | None = None,
    ) -> None:
        self.pipeline, self.guidance = pipeline, guidance
        self.draw = make_balanced_draw(sorted(pipeline.manifest.model.classes), images, first_seed)
        options: dict[str, Any] = dict(guidance.options)
        self.reference: Floats = sample_reference_latents(
            pipeline,
            self.draw.labels,
            self.draw.seeds,
            sampler={"solver": "heun", "steps": 250, **options},  # type: ignore[typeddict-item]
            cache=cache,
            progress=SILENT if report is None else _ImageCallback(report),
        )

    def take_first(self, images: int) -> SamplerMeter:
        """The same probe over its first images only."""
        subset = copy.copy(self)
        subset.draw, subset.reference = self.draw.select(slice(images)), self.reference[:images]
        return subset

    def sample(self, **sampler: Any) -> tuple[Floats, SamplerMeasurement]:
        """Latents [B, C, H, W] of a sampler, named by keyword arguments of `Pipeline.request`, and what it did."""
        options: RequestOptions = {**self.guidance.options, **sampler, "seeds": self.draw.seeds}  # type: ignore[typeddict-item]
        request = replace(self.pipeline.request(list(self.draw.labels), **options), vae=None)
        started = time.perf_counter()
        result = self.pipeline.run(request)
        seconds = time.perf_counter() - started
        errors = latent_rms(result.latents, self.reference)
        nfe = count_nfe(request, result.journals)
        return result.latents, SamplerMeasurement(
            request.sampler.name,
            float(np.mean(errors)),
            errors,
            nfe["predictor"],
            nfe["refiner"],
            nfe.get("unguided", 0.0),
            seconds / len(self.draw),
            tuple(result.journals),
        )

    def measure(self, **sampler: Any) -> SamplerMeasurement:
        """What a sampler did; see `sample`."""
        return self.sample(**sampler)[1]


def summarise_measurement(measurement: SamplerMeasurement) -> dict[str, float]:
    """The numbers that are kept with a saved sampler."""
    return {
        "error": measurement.error,
        "predictor_nfe": measurement.predictor_nfe,
        "refiner_nfe": measurement.refiner_nfe,
        "images": float(len(measurement.errors)),
    }


class _ImageCallback(Progress):
    def __init__(self, report: ImageProgress) -> None:
        self._report = report

    def update(self, task: str, done: int, total: int) -> None:
        self._report(done, total)


def make_tenths_reporter(say: Callable[[str], None]) -> ImageProgress:
    """Progress as a line for every tenth of the images."""
    reported_tenths = 0

    def report(done: int, total: int) -> None:
        nonlocal reported_tenths
        if done * 10 // total > reported_tenths:
            reported_tenths = done * 10 // total
            say(f"  {done}/{total}")

    return report
