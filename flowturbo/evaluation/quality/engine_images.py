"""Engines as a source of images: latents sampled once, decoded by one VAE, compared with those of a fine sampler."""

from __future__ import annotations

from flowturbo.evaluation.quality.array_cache import read_kept, write_kept
from flowturbo.evaluation.quality.image_files import Pixels, Scores
from flowturbo.evaluation.quality.same_seed import latent_rms, psnr, ssim
from flowturbo.evaluation.quality.sampled_latents import SampledLatents
from runtime.pipeline import Pipeline


class EngineImages:
    """The pictures of one sampler and decoder.

    Args:
        latents: what is decoded; the same for every decoder.
        vae: decoder variant.
        against: the fine sampler's pictures of the same draw and decoder, or of its first images, for the same-seed
            scores.
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
        path = None if self._folder is None else self._folder / f"{self.vae}-{start:07d}.npz"
        kept = None if path is None else read_kept(path)
        if kept is not None and "images" in kept:
            return kept["images"]
        images = self._pipeline.decode(self.latents.read(start).latents, self.vae)
        if path is not None:
            write_kept(path, {"images": images})
        return images

    def scores(self, start: int, images: Pixels) -> dict[str, Scores]:
        """Same-seed error of each image that there is a fine one of."""
        if self._against is None or start >= self._against.count:
            return {}
        fine, reference = self._against.latents.read(start).latents, self._against.read(start)
        compared = slice(len(fine))  # fewer than the chunk has where the fine images end within it
        return {
            "latent_rms": latent_rms(self.latents.read(start).latents[compared], fine),
            "psnr_db": psnr(images[compared], reference),
            "ssim": ssim(images[compared], reference),
        }
