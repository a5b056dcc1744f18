"""Autoencoders through diffusers: names, folders and hub ids to one small wrapper.

Both SD VAEs share the encoder and the latent space and differ in the decoder: `ema` for distribution metrics, `mse`
(smoother) where pixels matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.system.errors import CheckpointError

HUB_IDS = {
    "ema": "stabilityai/sd-vae-ft-ema",
    "mse": "stabilityai/sd-vae-ft-mse",
    "taesd": "madebyollin/taesd",
}


@dataclass(frozen=True)
class Vae:
    """An autoencoder and its conventions.

    Attributes:
        module: diffusers' AutoencoderKL or AutoencoderTiny, float32, evaluation mode.
        factor: pixels per latent along a side.
        channels: latent channels.
        scaling: the sampler's latents are the encoder's times this; from the VAE's own configuration.
        shift: subtracted before scaling (0 for the SD VAEs).
    """

    module: nn.Module
    factor: int
    channels: int
    scaling: float
    shift: float

    @property
    def has_posterior(self) -> bool:
        """Whether encoding gives a distribution (AutoencoderKL) or a point (AutoencoderTiny)."""
        return type(self.module).__name__ != "AutoencoderTiny"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def decoder_shape(self) -> dict[str, Any]:
        """Shape of the decoder, for `macs.decoder_macs`: its channels stand from the pixels' side to the latents'."""
        config: Any = self.module.config
        if not self.has_posterior:
            stages = {"channels": config.decoder_block_out_channels, "blocks": config.num_decoder_blocks}
            return {"kind": "AutoencoderTiny", **{name: list(value) for name, value in stages.items()}}
        attention = bool(getattr(config, "mid_block_add_attention", True))
        channels, layers = list(config.block_out_channels), int(config.layers_per_block)
        return {"kind": "AutoencoderKL", "channels": channels, "layers": layers, "attention": attention}

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures [B, 3, P, P] in [0, 1] of the sampler's latents [B, C, H, W]."""
        module: Any = self.module
        pixels = module.decode(latents / self.scaling + self.shift, return_dict=False)[0]
        scaled: Tensor = (pixels.float() / 2 + 0.5).clamp(0, 1)
        return scaled

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [B, C, H, W] of the scaled latents of pictures [B, 3, P, P] in [0, 1]."""
        module: Any = self.module
        encoded = module.encode(images * 2 - 1, return_dict=False)[0]
        if not self.has_posterior:
            return (encoded - self.shift) * self.scaling, torch.zeros_like(encoded)
        return (encoded.mean - self.shift) * self.scaling, encoded.std * self.scaling


def load_vae(name: str) -> Vae:
    """Load an autoencoder.

    Args:
        name: `ema`, `mse` or `taesd` (their hub ids), a folder in diffusers layout, or a hub id. A download is only
            tried only for something that is not a folder.

    Raises:
        CheckpointError: not found, not an autoencoder, or not available offline.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it advises about half precision while we cast on purpose

    source = HUB_IDS.get(name, name)
    is_folder = Path(source).is_dir()
    if not is_folder and (Path(source).exists() or source.startswith((".", "/")) or source.count("/") != 1):
        raise CheckpointError(
            f"VAE {name!r}",
            allowed="ema, mse, taesd, a folder in diffusers layout, or a hub id like owner/name",
            remedy="check the path: it must be the folder that holds config.json",
        )
    try:
        config = AutoencoderKL.load_config(source, local_files_only=is_folder)
        vae_class = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}[config["_class_name"]]
        module = vae_class.from_pretrained(source, local_files_only=is_folder, torch_dtype=torch.float32)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        origin = f"the folder {source}" if is_folder else f"{source} from the Hugging Face hub"
        reason = "the hub cannot be reached" if _is_network_missing(error) else str(error).splitlines()[0]
        raise CheckpointError(
            f"VAE {name!r} could not be loaded from {origin}: {reason}",
            allowed="config.json and diffusion_pytorch_model.safetensors of an AutoencoderKL or AutoencoderTiny",
            remedy="without a network, name a local folder (--vae DIR), or build for latents only (--vae none)",
        ) from error
    return wrap_vae(module)


def _is_network_missing(error: BaseException | None) -> bool:
    """Return whether a missing network caused an error; the hub's client reports it as a missing file."""
    while error is not None:
        if any(word in type(error).__name__ for word in ("Connect", "LocalEntryNotFound", "Offline", "Timeout")):
            return True
        error = error.__cause__ or error.__context__
    return False


def wrap_vae(module: nn.Module) -> Vae:
    """Return a diffusers autoencoder in float32 and evaluation mode, with the conventions in its configuration."""
    config: Any = module.config
    is_tiny = type(module).__name__ == "AutoencoderTiny"
    blocks = config.encoder_block_out_channels if is_tiny else config.block_out_channels
    return Vae(
        module=module.float().eval().requires_grad_(False),
        factor=2 ** (len(blocks) - 1),
        channels=config.latent_channels,
        scaling=float(config.scaling_factor),
        shift=float(getattr(config, "shift_factor", None) or 0.0),
    )
