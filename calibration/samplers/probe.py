"""Measure samplers of one engine directory against a very fine one that starts at the same noise.

Letters: B images, C latent channels, H = W latent side.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibration.guidance_choice import Guidance
from flowturbo.evaluation.quality.same_seed import REFERENCE_SAMPLER, latent_rms, sample_reference_latents
from flowturbo.evaluation.quality.sampled_latents import make_balanced_draw
from runtime.pipeline import Pipeline
from runtime.request import RequestOptions
from runtime.run_report import count_nfe
from runtime.sampling.controllers import Journal
from runtime.system.hashes import find_cache_folder
from runtime.system.progress import SILENT, Progress

if TYPE_CHECKING:
    from typing_extensions import Unpack  # for Python before 3.11

Floats = NDArray[np.float32]
Scores = NDArray[np.float64]

FIT_SEED, HELD_OUT_SEED = 1_000_000, 0
"""First seeds of the images that a calibration looks at, and of those that decide in the end: they never meet."""


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

    @property
    def nfe(self) -> float:
        """Evaluations of both networks."""
        return self.predictor_nfe + self.refiner_nfe

    @property
    def ms_per_image(self) -> float:
        """Wall time of an image in milliseconds, without decoding."""
        return 1e3 * self.seconds_per_image


def find_latents_cache() -> Path | None:
    """Return the folder in which calibrations store the fine sampler's latents; None if nothing is to be stored."""
    cache = find_cache_folder()
    return None if cache is None else cache / "calibration"


class SamplerMeter:
    """Some seeds of one model, classes taking turns, and where a very fine sampler takes them.

    Args:
        pipeline: an open pipeline.
        images: how many.
        guidance: of all samplers.
        first_seed: `FIT_SEED` or `HELD_OUT_SEED`.
        cache: folder that stores the fine sampler's latents, which cost most; None stores nothing.
        progress: counts the images of the fine sampler.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        images: int,
        guidance: Guidance,
        *,
        first_seed: int = HELD_OUT_SEED,
        cache: Path | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.pipeline, self.guidance = pipeline, guidance
        self.draw = make_balanced_draw(sorted(pipeline.manifest.model.classes), images, first_seed)
        self.reference: Floats = sample_reference_latents(
            pipeline,
            self.draw.labels,
            self.draw.seeds,
            sampler={**REFERENCE_SAMPLER, **guidance.options},
            cache=cache,
            progress=progress,
        )

    def take_first(self, images: int) -> SamplerMeter:
        """Return a meter of the first images only."""
        subset = copy.copy(self)
        subset.draw, subset.reference = self.draw.select(slice(images)), self.reference[:images]
        return subset

    def measure(self, **sampler: Unpack[RequestOptions]) -> SamplerMeasurement:
        """Run a sampler, which keyword arguments of `Pipeline.request` name, and return what it did."""
        options: RequestOptions = {**self.guidance.options, **sampler, "seeds": self.draw.seeds}
        request = replace(self.pipeline.request(list(self.draw.labels), **options), vae=None)
        started = time.perf_counter()
        result = self.pipeline.run(request)
        seconds = time.perf_counter() - started
        errors = latent_rms(result.latents, self.reference)
        nfe = count_nfe(request, result.journals)
        return SamplerMeasurement(
            request.sampler.name,
            float(np.mean(errors)),
            errors,
            nfe["predictor"],
            nfe["refiner"],
            nfe.get("unguided", 0.0),
            seconds / len(self.draw),
            tuple(result.journals),
        )


def summarise_measurement(measurement: SamplerMeasurement) -> dict[str, float]:
    """Return the numbers that a calibrated sampler's file holds."""
    return {
        "error": measurement.error,
        "predictor_nfe": measurement.predictor_nfe,
        "refiner_nfe": measurement.refiner_nfe,
        "images": float(len(measurement.errors)),
    }
