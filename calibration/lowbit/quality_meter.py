"""Measure how far a network with rounded layers is from the exact one: trajectories and pictures of the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calibration.lowbit.fake_quantise import replace_layers
from calibration.lowbit.trajectories import Deployment, sample_deployment
from calibration.model import select_loading_inputs
from calibration.samplers.table_search import SELECT_SEED
from export.graphs.engine_graphs import DecoderGraph
from export.lowbit.rounding import ROUNDING_REVISION
from flowturbo import demo
from flowturbo.evaluation.quality.metrics import Moments, frechet_distance
from flowturbo.evaluation.quality.populations import load_pack
from flowturbo.evaluation.quality.references import ExtractorOptions
from flowturbo.evaluation.quality.same_seed import latent_rms, psnr
from flowturbo.evaluation.quality.sampled_latents import make_balanced_draw
from runtime.images import convert_to_uint8
from runtime.system.array_store import KeyedStore, hash_json
from runtime.system.progress import SILENT, Progress
from runtime.system.version import VERSION

Pixels = NDArray[np.uint8]
MAX_DB = 120.0
"""Of equal pictures."""


@dataclass(frozen=True)
class Quality:
    """Quality of a model against the exact one.

    Attributes:
        latent_rms: median distance of the latents.
        psnr_db: median of the pictures; None without a decoder.
        fid_ratio: FID over that of the exact model; None if it is not measured.
    """

    latent_rms: float
    psnr_db: float | None = None
    fid_ratio: float | None = None


@dataclass(frozen=True)
class QualityTarget:
    """The quality that has to be reached: one of the fields of `Quality`."""

    psnr_db: float | None = None
    latent_rms: float | None = None
    fid_ratio: float | None = None

    def is_met_by(self, quality: Quality) -> bool:
        """Say whether a quality reaches the target."""
        ((name, limit),) = self.limits.items()
        value: float | None = getattr(quality, name)
        return value is not None and (value >= limit if name == "psnr_db" else value <= limit)

    @property
    def limits(self) -> dict[str, float]:
        """The target by its name."""
        return {name: value for name, value in vars(self).items() if value is not None}


class QualityMeter:
    """The latents and pictures of the exact model, and how far others are from them.

    Args:
        images: seeds to measure on; calibrations and final reports use others.
        batch: images at once.
        vae: decoder variant; None compares latents alone.
        cache: .npz file of earlier measurements; None stores none.
        key: of everything that a measurement depends on beside its layers.
        first_seed: of the images.
        fid: of some pictures; None leaves it out.
    """

    def __init__(
        self,
        deployment: Deployment,
        images: int,
        batch: int,
        vae: str | None,
        cache: Path | None,
        key: Any,
        progress: Progress = SILENT,
        *,
        first_seed: int = SELECT_SEED,
        fid: Callable[[Pixels], float] | None = None,
    ) -> None:
        self.deployment, self._batch = deployment, batch
        self._draw = make_balanced_draw(sorted(deployment.networks.classes), images, first_seed)
        self._decoder = None if vae is None else DecoderGraph(deployment.vaes[vae], torch.float32)
        model = [deployment.model, select_loading_inputs(deployment.request), deployment.settings]
        versions = [VERSION, ROUNDING_REVISION, torch.__version__]
        store_key = hash_json([key, *model, images, first_seed, batch, vae, *versions, fid is None])
        self._store = KeyedStore(cache, store_key)
        self._qualities = {
            name: Quality(float(values[0]), *(None if np.isnan(value) else float(value) for value in values[1:]))
            for name, values in (self._store.load(progress=progress) or {}).items()
        }
        progress.stage(f"the exact model: {images} images")
        self.latents = self._sample()
        self.pictures = self._decode(self.latents)
        self._fid = fid
        self._exact_fid = None if fid is None or self.pictures is None else fid(self.pictures)

    def measure(self, description: str, layers: Mapping[str, nn.Module]) -> Quality:
        """Return the quality with these layers in place; `description` names them in the cache."""
        key = hash_json(description)
        if key not in self._qualities:
            with replace_layers(self.deployment.networks.by_role, layers):
                latents = self._sample()
            self._qualities[key] = self.compare(latents)
            finite = {name: quality for name, quality in self._qualities.items() if np.isfinite(quality.latent_rms)}
            self._store.save({name: np.asarray(astuple(quality), np.float64) for name, quality in finite.items()})
        return self._qualities[key]

    def compare(self, latents: NDArray[np.float32]) -> Quality:
        """Return the quality of some latents; those that are not finite are infinitely far."""
        if not np.isfinite(latents).all():
            return Quality(float("inf"), None if self.pictures is None else 0.0)
        pictures = self._decode(latents)
        rms = float(np.median(latent_rms(latents, self.latents)))
        if pictures is None or self.pictures is None:
            return Quality(rms)
        ratio = None if self._fid is None or not self._exact_fid else self._fid(pictures) / self._exact_fid
        return Quality(rms, min(float(np.median(psnr(pictures, self.pictures))), MAX_DB), ratio)

    def _sample(self) -> NDArray[np.float32]:
        starts = range(0, len(self._draw), self._batch)
        batches = [self._draw.select(slice(start, start + self._batch)) for start in starts]
        return np.concatenate(
            [sample_deployment(self.deployment, batch.labels, batch.seeds).numpy() for batch in batches]
        )

    def _decode(self, latents: NDArray[np.float32]) -> Pixels | None:
        if self._decoder is None:
            return None
        pictures = []
        with torch.inference_mode():
            for start in range(0, len(latents), self._batch):
                images, _ = self._decoder(torch.from_numpy(latents[start : start + self._batch]))
                pictures.append(convert_to_uint8(images.numpy()))
        return np.concatenate(pictures)


def format_quality(quality: Quality) -> str:
    """Return a quality as text."""
    psnr_text = "" if quality.psnr_db is None else f", pictures {quality.psnr_db:.1f} dB"
    fid_text = "" if quality.fid_ratio is None else f", FID {quality.fid_ratio:.3f} ×"
    return f"latents {quality.latent_rms:.4f} apart{psnr_text}{fid_text}"


@contextmanager
def open_demo_fid() -> Iterator[Callable[[Pixels], float]]:
    """Give the demo's FID of some pictures, by the extractor and the reference of the package."""
    reference = load_pack(demo.REFERENCE).population.moments
    assert reference is not None
    with ExtractorOptions().open(demo.REFERENCE) as extractor:
        yield lambda pictures: float(
            frechet_distance(Moments.from_features(extractor.extract(pictures).features), reference)
        )
