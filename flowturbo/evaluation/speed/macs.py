"""How much arithmetic and memory traffic networks take, from the description of their shape in a manifest.

MACs (multiply-accumulates, two floating-point operations each) of matrix products and convolutions; norms,
activations and softmax are left out, as they are in the field's tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SIT_FAMILY = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads of the released sizes of SiT."""
FREQUENCIES = 256
"""Size of the sinusoidal time embedding."""


@dataclass(frozen=True)
class NetworkWork:
    """One network at one resolution.

    Attributes:
        trunk_macs, conditioning_macs: of one row.
        trunk_weights, conditioning_weights: numbers that a call reads, whatever its rows.
    """

    trunk_macs: float
    conditioning_macs: float
    trunk_weights: float
    conditioning_weights: float


def sit_config(size: str, patch: int = 2, channels: int = 4, *, refiner: bool = False) -> dict[str, Any]:
    """A released size in the manifest's words; a refiner has one block and reads [x, v]."""
    depth, width, heads = SIT_FAMILY[size]
    return {
        "depth": 1 if refiner else depth,
        "width": width,
        "heads": heads,
        "patch": patch,
        "in_channels": 2 * channels if refiner else channels,
        "out_channels": channels,
        "mlp_width": 4 * width,
        "classes": 1000,
    }


def sit_work(config: Mapping[str, Any], side: int) -> NetworkWork:
    """A SiT on latents of side × side. Its unused variance channels are cut off at export."""
    depth, width, mlp = config["depth"], config["width"], config.get("mlp_width") or 4 * config["width"]
    patch = config["patch"] ** 2
    tokens = (side // config["patch"]) ** 2
    linear = 4 * width * width + 2 * width * mlp
    ends = width * patch * (config["in_channels"] + config["out_channels"])
    adaln = (6 * depth + 2) * width * width
    embedding = FREQUENCIES * width + width * width
    return NetworkWork(
        trunk_macs=tokens * (depth * linear + ends) + depth * 2 * tokens * tokens * width,
        conditioning_macs=adaln + embedding,
        trunk_weights=depth * linear + ends,
        conditioning_weights=adaln + embedding + (config.get("classes", 0) + 1) * width,
    )


SD_DECODER = {"kind": "AutoencoderKL", "channels": [128, 256, 512, 512], "layers": 2, "attention": True}
"""The decoder of both SD VAEs."""


def decoder_macs(decoder: Mapping[str, Any], side: int, latent_channels: int) -> float:
    """MACs of decoding one latent.

    Args:
        decoder: as manifests have it: `kind`, `channels` from the pixels' side to the latents', and of an AutoencoderKL
            `layers` a block and `attention` in the middle, of an AutoencoderTiny the `blocks` of each stage.
    """
    if decoder["kind"] == "AutoencoderTiny":
        return _tiny_macs(decoder, side, latent_channels)
    channels = list(reversed(decoder["channels"]))
    top, area = channels[0], side * side
    macs = area * (latent_channels**2 + 9 * latent_channels * top + 2 * 2 * 9 * top * top)
    if decoder["attention"]:
        macs += area * 4 * top * top + 2 * area * area * top
    before = top
    for place, width in enumerate(channels):
        for layer in range(decoder["layers"] + 1):
            read = before if layer == 0 else width
            macs += area * (9 * read * width + 9 * width * width + (read * width if read != width else 0))
        if place < len(channels) - 1:
            area *= 4
            macs += area * 9 * width * width
        before = width
    return float(macs + area * 9 * channels[-1] * 3)


def _tiny_macs(decoder: Mapping[str, Any], side: int, latent_channels: int) -> float:
    """TAESD: stages of blocks of three convolutions, doubled in size between them."""
    channels, blocks = decoder["channels"], decoder["blocks"]
    area = side * side
    macs = area * 9 * latent_channels * channels[0]
    for place, (width, count) in enumerate(zip(channels, blocks, strict=True)):
        macs += area * 27 * width * width * count
        if place < len(channels) - 1:
            area *= 4
            macs += area * 9 * width * channels[place + 1]
    return float(macs + area * 9 * channels[-1] * 3)
