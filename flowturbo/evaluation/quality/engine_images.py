"""Engines as a source of images: latents sampled once, decoded by one VAE, compared with a fine sampler's."""

from __future__ import annotations

from flowturbo.evaluation.quality.image_files import Pixels, Scores
from flowturbo.evaluation.quality.same_seed import latent_rms, psnr, ssim
from flowturbo.evaluation.quality.sampled_latents import SampledLatents
from runtime.pipeline import Pipeline
from runtime.system.array_store import load_arrays, save_arrays


class EngineImages:
    """The pictures of one sampler and decoder.

    Args:
        latents: what is decoded; the same for every decoder.
        vae: decoder variant.
        fine: the fine sampler's pictures of the same draw and decoder, or of its first images, for same-seed scores.
        cache_images: leave decoded pictures beside the latents, where many samplers are compared with them.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        latents: SampledLatents,
        vae: str,
        *,
        fine: EngineImages | None = None,
        cache_images: bool = False,
    ) -> None:
        self._pipeline, self.latents, self.vae, self._fine = pipeline, latents, vae, fine
        self._folder = latents.folder if cache_images else None
        self.count, self.chunk_size = len(latents.draw), latents.chunk_size

    @property
    def key(self) -> str:
        suffix = "" if self._fine is None else f"-against-{self._fine.latents.key}"
        return f"{self.latents.key}-{self.vae}{suffix}"

    def read(self, start: int) -> Pixels:
        """Return the pictures of the chunk that begins at image `start`."""
        path = None if self._folder is None else self._folder / f"{self.vae}-{start:07d}.npz"
        cached = None if path is None else load_arrays(path)
        if cached is not None and "images" in cached:
            return cached["images"]
        images = self._pipeline.decode(self.latents.read(start).latents, self.vae)
        if path is not None:
            save_arrays(path, {"images": images})
        return images

    def compute_scores(self, start: int, images: Pixels) -> dict[str, Scores]:
        """Return the same-seed error of each image that has a fine one."""
        if self._fine is None or start >= self._fine.count:
            return {}
        fine_latents, fine_images = self._fine.latents.read(start).latents, self._fine.read(start)
        compared = slice(len(fine_latents))  # fewer than the chunk has where the fine images end within it
        return {
            "latent_rms": latent_rms(self.latents.read(start).latents[compared], fine_latents),
            "psnr_db": psnr(images[compared], fine_images),
            "ssim": ssim(images[compared], fine_images),
        }
