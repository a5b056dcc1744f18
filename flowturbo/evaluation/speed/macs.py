"""Estimate arithmetic and memory traffic of networks from the description of their shape in a manifest.

MACs (multiply-accumulates, two floating-point operations each) of matrix products and convolutions; norms,
activations and softmax are left out, as in published tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads of the released sizes of SiT."""
TIME_EMBEDDING_SIZE = 256
"""Size of the sinusoidal time embedding."""


@dataclass(frozen=True)
class NetworkCost:
    """One network at one resolution.

    Attributes:
        trunk_macs, conditioning_macs: of one row.
        trunk_weights, conditioning_weights: numbers that a call reads, for any number of rows.
    """

    trunk_macs: float
    conditioning_macs: float
    trunk_weights: float
    conditioning_weights: float


def describe_sit_size(size: str, patch: int = 2, channels: int = 4, *, refiner: bool = False) -> dict[str, Any]:
    """Describe a released size as a manifest does; a refiner has one block and reads [x, v]."""
    depth, width, heads = SIT_SIZES[size]
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


def estimate_sit_cost(config: Mapping[str, Any], side: int) -> NetworkCost:
    """Estimate a SiT on latents of side × side. Export cuts off its unused variance channels."""
    depth, width, mlp_width = config["depth"], config["width"], config.get("mlp_width") or 4 * config["width"]
    patch_area = config["patch"] ** 2
    tokens = (side // config["patch"]) ** 2
    block_weights = 4 * width * width + 2 * width * mlp_width
    end_weights = width * patch_area * (config["in_channels"] + config["out_channels"])
    adaln = (6 * depth + 2) * width * width
    embedding = TIME_EMBEDDING_SIZE * width + width * width
    return NetworkCost(
        trunk_macs=tokens * (depth * block_weights + end_weights) + depth * 2 * tokens * tokens * width,
        conditioning_macs=adaln + embedding,
        trunk_weights=depth * block_weights + end_weights,
        conditioning_weights=adaln + embedding + (config.get("classes", 0) + 1) * width,
    )


SD_DECODER = {"kind": "AutoencoderKL", "channels": [128, 256, 512, 512], "layers": 2, "attention": True}
"""The decoder of both SD VAEs."""


def count_decoder_macs(decoder: Mapping[str, Any], side: int, latent_channels: int) -> float:
    """Count the MACs of decoding one latent.

    Args:
        decoder: as in a manifest: `kind`, `channels` from the pixels' side to the latents', and of an AutoencoderKL
            `layers` a block and `attention` in the middle, of an AutoencoderTiny the `blocks` of each stage.
    """
    if decoder["kind"] == "AutoencoderTiny":
        return _count_tiny_macs(decoder, side, latent_channels)
    channels = list(reversed(decoder["channels"]))
    first_width, area = channels[0], side * side
    macs = area * (latent_channels**2 + 9 * latent_channels * first_width + 2 * 2 * 9 * first_width * first_width)
    if decoder["attention"]:
        macs += area * 4 * first_width * first_width + 2 * area * area * first_width
    input_width = first_width
    for stage, width in enumerate(channels):
        for layer in range(decoder["layers"] + 1):
            layer_input_width = input_width if layer == 0 else width
            macs += area * (
                9 * layer_input_width * width
                + 9 * width * width
                + (layer_input_width * width if layer_input_width != width else 0)
            )
        if stage < len(channels) - 1:
            area *= 4
            macs += area * 9 * width * width
        input_width = width
    return float(macs + area * 9 * channels[-1] * 3)


def _count_tiny_macs(decoder: Mapping[str, Any], side: int, latent_channels: int) -> float:
    """Count TAESD: stages of blocks of three convolutions, doubled in size between them."""
    channels, blocks = decoder["channels"], decoder["blocks"]
    area = side * side
    macs = area * 9 * latent_channels * channels[0]
    for stage, (width, count) in enumerate(zip(channels, blocks, strict=True)):
        macs += area * 27 * width * width * count
        if stage < len(channels) - 1:
            area *= 4
            macs += area * 9 * width * channels[stage + 1]
    return float(macs + area * 9 * channels[-1] * 3)
