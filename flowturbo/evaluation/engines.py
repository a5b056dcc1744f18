"""Engines as a source of images: latents sampled once, decoded by one VAE, compared with those of a fine sampler."""

from __future__ import annotations

import numpy as np

from flowturbo.evaluation.images import Pixels, Scores
from flowturbo.evaluation.sameseed import latent_rms, psnr, ssim
from flowturbo.evaluation.sampling import SampledLatents
from runtime.files import replacing
from runtime.pipeline import Pipeline


class EngineImages:
    """The pictures of one sampler and decoder.

    Args:
        latents: what is decoded; the same for every decoder.
        vae: decoder variant.
        against: the fine sampler's pictures of the same draw and decoder, for the same-seed scores.
        keep: leave decoded pictures beside the latents, for those that many samplers are compared with.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        latents: SampledLatents,
        vae: str,
        *,
        against: EngineImages | None = None,
        keep: bool = False,
    ) -> None:
        self._pipeline, self.latents, self.vae, self._against = pipeline, latents, vae, against
        self._folder = latents.folder if keep else None
        self.count, self.size = len(latents.draw), latents.size

    @property
    def key(self) -> str:
        against = "" if self._against is None else f"-against-{self._against.latents.key}"
        return f"{self.latents.key}-{self.vae}{against}"

    def read(self, start: int) -> Pixels:
        """The pictures of the chunk that begins at image `start`."""
        path = None if self._folder is None else self._folder / f"{self.vae}-{start:07d}.npy"
        if path is not None and path.exists():
            kept: Pixels = np.load(path, allow_pickle=False)
            return kept
        images = self._pipeline.decode(self.latents.read(start).latents, self.vae)
        if path is not None:
            with replacing(path) as aside, open(aside, "wb") as file:
                np.save(file, images)
        return images

    def scores(self, start: int, images: Pixels) -> dict[str, Scores]:
        """Same-seed error of each image, and the evaluations it took."""
        if self._against is None:
            return {}
        found, fine = self.latents.read(start), self._against.latents.read(start)
        reference = self._against.read(start)
        return {
            "latent_rms": latent_rms(found.latents, fine.latents),
            "psnr_db": psnr(images, reference),
            "ssim": ssim(images, reference),
        }
