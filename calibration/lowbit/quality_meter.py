"""How far a network with rounded layers is from the exact one: whole trajectories and pictures from the same seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calibration.lowbit.fake_quantise import replace_layers
from calibration.lowbit.trajectories import Deployment, sample_deployment
from calibration.samplers.search_job import select_loading_inputs
from calibration.samplers.table_search import SELECT_SEED
from export.graphs.engine_graphs import DecoderGraph
from export.lowbit.rounding import ROUNDING_REVISION
from flowturbo import demo
from flowturbo.evaluation.quality.array_cache import hash_json
from flowturbo.evaluation.quality.metrics import Moments, frechet_distance
from flowturbo.evaluation.quality.populations import load_pack
from flowturbo.evaluation.quality.references import ExtractorOptions
from flowturbo.evaluation.quality.same_seed import latent_rms, psnr
from flowturbo.evaluation.quality.sampled_latents import SampleDraw, make_balanced_draw
from runtime.images import convert_to_uint8
from runtime.system.files import write_json
from runtime.system.version import VERSION

Say = Callable[[str], None]
Pixels = NDArray[np.uint8]
MAX_DB = 120.0
"""What equal pictures count as."""


@dataclass(frozen=True)
class Quality:
    """Against the exact model: median distance of the latents, median decibels of the pictures (None: no decoder), and
    FID over the exact model's (None: not asked for)."""

    latent_rms: float
    psnr_db: float | None = None
    fid_ratio: float | None = None


@dataclass(frozen=True)
class QualityTarget:
    """What has to be reached: one of the three.

    Attributes:
        psnr_db: median of the pictures.
        latent_rms: median distance of the latents.
        fid_ratio: FID over the exact model's.
    """

    psnr_db: float | None = None
    latent_rms: float | None = None
    fid_ratio: float | None = None

    def is_met_by(self, quality: Quality) -> bool:
        if self.psnr_db is not None:
            return quality.psnr_db is not None and quality.psnr_db >= self.psnr_db
        if self.fid_ratio is not None:
            return quality.fid_ratio is not None and quality.fid_ratio <= self.fid_ratio
        return self.latent_rms is not None and quality.latent_rms <= self.latent_rms

    @property
    def limits(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}


class QualityMeter:
    """The exact model's latents and pictures, and how far others are from them.

    Args:
        images: seeds that are looked at; calibrations and final reports use others.
        vae: decoder variant; None compares latents alone.
        kept: file of what was measured before.
        key: of everything that a measurement depends on beside its parts.
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
        say: Say,
        *,
        first_seed: int = SELECT_SEED,
        fid: Callable[[Pixels], float] | None = None,
    ) -> None:
        self.deployment, self._batch, self._say, self._cache = deployment, batch, say, cache
        self._draw: SampleDraw = make_balanced_draw(sorted(deployment.networks.classes), images, first_seed)
        self._decoder = None if vae is None else DecoderGraph(deployment.vaes[vae], torch.float32)
        self._key = hash_json(
            [
                key,
                deployment.model,
                select_loading_inputs(deployment.request),
                deployment.settings,
                images,
                first_seed,
                batch,
                vae,
                VERSION,
                ROUNDING_REVISION,
                torch.__version__,
                fid is None,
            ]
        )
        self._qualities: dict[str, Quality] = self._load()
        say(f"the exact model: {images} images")
        self.latents = self._sample()
        self.pictures = self._decode(self.latents)
        self._fid = fid
        self._exact_fid = None if fid is None or self.pictures is None else fid(self.pictures)

    def measure(self, description: str, layers: Mapping[str, nn.Module]) -> Quality:
        """Quality with these layers in place; `description` says which, for what is kept."""
        key = hash_json(description)
        if key not in self._qualities:
            with replace_layers(self.deployment.by_role, layers):
                latents = self._sample()
            self._qualities[key] = self.compare(latents)
            self._save()
        return self._qualities[key]

    def compare(self, latents: NDArray[np.float32]) -> Quality:
        """Of some latents; those that are not finite are infinitely far."""
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

    def _load(self) -> dict[str, Quality]:
        if self._cache is None or not self._cache.is_file():
            return {}
        try:
            data = json.loads(self._cache.read_text(encoding="utf-8"))
            return {n: Quality(**q) for n, q in data["measured"].items()} if data["key"] == self._key else {}
        except (ValueError, KeyError, TypeError):
            return {}  # damaged: measured anew

    def _save(self) -> None:
        if self._cache is not None:
            finite = {name: vars(q) for name, q in self._qualities.items() if np.isfinite(q.latent_rms)}
            write_json(self._cache, {"key": self._key, "measured": finite})


def format_quality(quality: Quality) -> str:
    """In a line of progress."""
    psnr_text = "" if quality.psnr_db is None else f", pictures {quality.psnr_db:.1f} dB"
    fid_text = "" if quality.fid_ratio is None else f", FID {quality.fid_ratio:.3f} ×"
    return f"latents {quality.latent_rms:.4f} apart{psnr_text}{fid_text}"


@contextmanager
def open_demo_fid() -> Iterator[Callable[[Pixels], float]]:
    """The demo's FID of some pictures, by the extractor and reference that come with the package."""
    reference = load_pack(demo.REFERENCE).population.moments
    assert reference is not None
    with ExtractorOptions().open(demo.REFERENCE) as extractor:
        yield lambda pictures: float(
            frechet_distance(Moments.from_features(extractor.extract(pictures).features), reference)
        )
