"""Weights in int8 such that the fastest 8-bit products of every CPU are exact.

An x86 CPU without VNNI multiplies 8-bit numbers by `vpmaddubsw`: an input of 0 … 255 times a weight, and the products
of two neighbours added in 16 bits, where they saturate. ONNX Runtime and OpenVINO both put neighbours along the inner
dimension there, the first with the second, the third with the fourth. The sum of two fits if the weights of one sign
add to 128 at most, since 255 · 128 < 2¹⁵. Few pairs of a trained layer exceed that when its largest weight becomes
127, so each output channel takes the step that loses least once its large pairs have been cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDING_REVISION = "2: pairs fit 16 bits"
"""Changes with what is rounded to: builds and measurements of another are not gone on with."""
MAX_INT8 = 127
MAX_NEIGHBOUR_SUM = 128
"""What two neighbouring weights of one sign may add up to."""
STEP_FACTORS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, MAX_INT8 / (MAX_NEIGHBOUR_SUM // 2))
"""Steps that are tried, over the one which makes a channel's largest weight 127; at the last no pair can be too
large."""
_CHANNELS_PER_PART = 64
"""Channels at a time: what is computed of them stays in the processor's caches."""

Floats = NDArray[np.float32]


def quantise_weight(weight: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """A linear layer's weight on a symmetric int8 scale per output channel.

    Args:
        weight: [in, out], float32 or float16.

    Returns:
        Integers [in, out], of which no two neighbours along `in` overflow 16 bits; steps [out], in the weight's dtype.
    """
    integers = np.empty(weight.shape, np.int8)
    steps = np.empty(weight.shape[1], weight.dtype)
    for start in range(0, weight.shape[1], _CHANNELS_PER_PART):
        part = slice(start, start + _CHANNELS_PER_PART)
        integers[:, part], steps[part] = _quantise_channels(
            np.ascontiguousarray(weight[:, part], np.float32), weight.dtype
        )
    return integers, steps


def has_no_int16_overflow(integers: NDArray[np.int8]) -> bool:
    """Whether no two neighbours along the first dimension overflow 16 bits, whatever their inputs are."""
    return not _measure_excess(*_split_neighbours(integers.astype(np.float32))).any()


def _quantise_channels(weight: Floats, dtype: np.dtype[Any]) -> tuple[Floats, NDArray[Any]]:
    least_errors = np.full(weight.shape[1], np.inf, np.float32)
    best_integers, steps = np.zeros_like(weight), np.ones(weight.shape[1], dtype)
    base_steps = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny * MAX_INT8) / MAX_INT8
    min_step = np.finfo(dtype).smallest_subnormal
    for factor in STEP_FACTORS:
        stored_steps = np.maximum((base_steps * factor).astype(dtype), min_step)
        step = stored_steps.astype(np.float32)
        integers = _cut_neighbours(np.clip(np.rint(weight / step), -MAX_INT8, MAX_INT8))
        errors = np.square(weight - integers * step).sum(axis=0)
        is_better = errors < least_errors
        best_integers[:, is_better], steps[is_better], least_errors[is_better] = (
            integers[:, is_better],
            stored_steps[is_better],
            errors[is_better],
        )
    return best_integers, steps


def _cut_neighbours(integers: Floats) -> Floats:
    """Takes what is too much off both weights of a pair, in place; the first gives the odd one."""
    first, second = _split_neighbours(integers)
    excess = _measure_excess(first, second)
    half = np.ceil(excess / 2)
    first -= np.sign(first) * half
    second -= np.sign(second) * (excess - half)
    return integers


def _split_neighbours(integers: Floats) -> tuple[Floats, Floats]:
    """Views of the weights that are added in pairs; the last of an odd number has no neighbour."""
    num_paired = len(integers) // 2 * 2
    return integers[0:num_paired:2], integers[1:num_paired:2]


def _measure_excess(first: Floats, second: Floats) -> Floats:
    """What pairs of one sign exceed `MAX_NEIGHBOUR_SUM` by."""
    magnitude = np.abs(first + second)
    return np.where(first * second > 0, np.maximum(magnitude - MAX_NEIGHBOUR_SUM, 0), 0)
