"""Autoencoders through diffusers: names, folders and hub ids to one small wrapper.

Both SD VAEs share the encoder and the latent space and differ in the decoder: `ema` for distribution metrics, `mse`
(smoother) where pixels matter.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.system.errors import CheckpointError, FlowTurboError

HUB_IDS = {
    "ema": "stabilityai/sd-vae-ft-ema",
    "mse": "stabilityai/sd-vae-ft-mse",
    "taesd": "madebyollin/taesd",
}

_USUAL_WEIGHTS = re.compile(r"diffusion_pytorch_model\.(safetensors|bin)(\.index\.json)?")
_VARIANT_WEIGHTS = re.compile(r"diffusion_pytorch_model\.([^.]+)\.(?:safetensors|bin)")


@dataclass(frozen=True)
class Vae:
    """An autoencoder and its conventions.

    Attributes:
        module: diffusers' AutoencoderKL or AutoencoderTiny, float32, evaluation mode.
        factor: pixels per latent along a side.
        channels: latent channels.
        scaling: the sampler's latents are the encoder's times this; from the VAE's own configuration.
        shift: subtracted before scaling (0 for the SD VAEs).
        mean, std: of each channel of the encoder's latents, which are normalised by them before scaling; empty for
            most VAEs.
    """

    module: nn.Module
    factor: int
    channels: int
    scaling: float
    shift: float
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

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
        pixels = module.decode(self.undo_scaling(latents), return_dict=False)[0]
        scaled: Tensor = (pixels.float() / 2 + 0.5).clamp(0, 1)
        return scaled

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [B, C, H, W] of the scaled latents of pictures [B, 3, P, P] in [0, 1]."""
        module: Any = self.module
        encoded = module.encode(images * 2 - 1, return_dict=False)[0]
        mean, std = (encoded.mean, encoded.std) if self.has_posterior else (encoded, torch.zeros_like(encoded))
        if self.std:
            channel_std = _reshape_to_channels(self.std, mean)
            mean, std = (mean - _reshape_to_channels(self.mean, mean)) / channel_std, std / channel_std
        return (mean - self.shift) * self.scaling, std * self.scaling

    def undo_scaling(self, latents: Tensor) -> Tensor:
        """Return what the decoder reads of the sampler's latents, both [B, C, H, W]: the inverse of encoding's end."""
        unscaled = latents / self.scaling + self.shift
        if self.std:
            unscaled = unscaled * _reshape_to_channels(self.std, unscaled) + _reshape_to_channels(self.mean, unscaled)
        return unscaled


def _reshape_to_channels(values: tuple[float, ...], latents: Tensor) -> Tensor:
    """Return a number of each channel as [1, C, 1, 1], of the type and on the device of `latents`."""
    return torch.tensor(values, dtype=latents.dtype, device=latents.device).reshape(1, -1, 1, 1)


def load_vae(name: str) -> Vae:
    """Load an autoencoder.

    Args:
        name: `ema`, `mse` or `taesd` (their hub ids), a folder in diffusers layout, or a hub id. A download is tried
            only for something that is not a folder. Of a folder that holds only a variant (fp16), that is read.

    Raises:
        CheckpointError: not found, not an autoencoder, its configuration is not possible, or not available offline.
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
        names = [path.name for path in Path(source).iterdir()] if is_folder else []
        variants = sorted({match[1] for file in names if (match := _VARIANT_WEIGHTS.fullmatch(file))})
        if any(map(_USUAL_WEIGHTS.fullmatch, names)):
            variants = []
        if len(variants) > 1:
            raise CheckpointError(
                f"VAE {name!r}: {source} holds the variants {', '.join(variants)} and no usual file",
                allowed="diffusion_pytorch_model.safetensors, or one variant of it",
                remedy="copy one of them to a folder of its own, with config.json",
            )
        module = vae_class.from_pretrained(
            source, local_files_only=is_folder, torch_dtype=torch.float32, variant=variants[0] if variants else None
        )
    except FlowTurboError:
        raise
    except Exception as error:  # diffusers and its readers raise whatever they stumble on
        origin = f"the folder {source}" if is_folder else f"{source} from the Hugging Face hub"
        reason = "the hub cannot be reached" if _is_network_missing(error) else f"{error or type(error).__name__}"
        raise CheckpointError(
            f"VAE {name!r} could not be loaded from {origin}: {reason.splitlines()[0]}",
            allowed="config.json and diffusion_pytorch_model.safetensors of an AutoencoderKL or AutoencoderTiny",
            remedy="without a network, name a local folder (--vae DIR), or build for latents only (--vae none)",
        ) from error
    return wrap_vae(module, name)


def _is_network_missing(error: BaseException | None) -> bool:
    """Return whether a missing network caused an error; the hub's client reports it as a missing file."""
    while error is not None:
        if any(word in type(error).__name__ for word in ("Connect", "LocalEntryNotFound", "Offline", "Timeout")):
            return True
        error = error.__cause__ or error.__context__
    return False


def wrap_vae(module: nn.Module, name: str = "") -> Vae:
    """Return a diffusers autoencoder in float32 and evaluation mode, with the conventions in its configuration.

    Args:
        module: diffusers' AutoencoderKL or AutoencoderTiny.
        name: of the VAE, for messages.

    Raises:
        CheckpointError: its scaling, shift or statistics are no numbers that latents can be scaled by.
    """
    config: Any = module.config
    is_tiny = type(module).__name__ == "AutoencoderTiny"
    blocks = config.encoder_block_out_channels if is_tiny else config.block_out_channels
    shift, mean, std = (getattr(config, key, None) for key in ("shift_factor", "latents_mean", "latents_std"))

    def check(key: str, is_valid: bool, allowed: str, remedy: str = "") -> None:
        if not is_valid:
            raise CheckpointError(
                f"VAE {name or type(module).__name__!r}: its config.json has {key} {getattr(config, key, None)!r}",
                allowed=allowed,
                remedy=remedy or f"write the {key} of whoever trained it into its config.json",
            )

    is_scaling = _is_number(config.scaling_factor) and config.scaling_factor > 0
    check("scaling_factor", is_scaling, "a finite number above 0; 0.18215 for the SD VAEs")
    check("shift_factor", shift is None or _is_number(shift), "a finite number, or null")
    if mean is not None or std is not None:
        count = config.latent_channels
        for key, values, suffix in (("latents_mean", mean, ""), ("latents_std", std, " above 0")):
            numbers = values if isinstance(values, (list, tuple)) and all(map(_is_number, values)) else ()
            is_valid = len(numbers) == count and (not suffix or min(numbers) > 0)
            check(key, is_valid, f"{count} finite numbers{suffix}; the mean and the deviation go together")
        check("shift_factor", not shift, "null or 0 beside latents_mean", "leave out the one of another training")
    return Vae(
        module=module.float().eval().requires_grad_(False),
        factor=2 ** (len(blocks) - 1),
        channels=config.latent_channels,
        scaling=float(config.scaling_factor),
        shift=float(shift or 0.0),
        mean=tuple(map(float, mean or ())),
        std=tuple(map(float, std or ())),
    )


def _is_number(value: object) -> bool:
    """Return whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
