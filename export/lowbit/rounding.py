"""Round weights to int8 such that the fastest 8-bit products of every CPU are exact.

An x86 CPU without VNNI multiplies 8-bit numbers by `vpmaddubsw`: an input of 0 … 255 times a weight, and the products
of two neighbours added in 16 bits, where they saturate. ONNX Runtime and OpenVINO both put neighbours along the inner
dimension there, the first with the second, the third with the fourth. The sum of two fits if the weights of one sign
add to 128 at most, since 255 · 128 < 2¹⁵. Few neighbours of a trained layer exceed that when its largest weight becomes
127, so each output channel takes the step that loses least once the large ones have been cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDING_REVISION = "2: pairs fit 16 bits"
"""Changes with the rounding: builds and measurements of another revision are not continued."""
MAX_INT8 = 127
MAX_NEIGHBOUR_SUM = 128
"""Largest sum of two neighbouring weights of one sign."""
STEP_FACTORS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, MAX_INT8 / (MAX_NEIGHBOUR_SUM // 2))
"""Steps that are tried, over the one that makes a channel's largest weight 127; at the last no sum is too large."""
_CHANNELS_PER_PART = 64
"""Channels at a time: so many stay in the processor's caches."""

Floats = NDArray[np.float32]


def quantise_weight(weight: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Round a linear layer's weight on a symmetric int8 scale per output channel.

    Args:
        weight: [in, out], float32 or float16.

    Returns:
        Integers [in, out], of which no two neighbours along `in` overflow 16 bits; steps [out], in the weight's dtype.
    """
    best_integers = np.zeros(weight.shape, np.int8)
    best_steps = np.ones(weight.shape[1], weight.dtype)
    min_step = np.finfo(weight.dtype).smallest_subnormal
    for start in range(0, weight.shape[1], _CHANNELS_PER_PART):
        part = slice(start, start + _CHANNELS_PER_PART)
        channels = np.ascontiguousarray(weight[:, part], np.float32)
        least_errors = np.full(channels.shape[1], np.inf, np.float32)
        base_steps = np.maximum(np.abs(channels).max(axis=0), np.finfo(np.float32).tiny * MAX_INT8) / MAX_INT8
        for factor in STEP_FACTORS:
            steps = np.maximum((base_steps * factor).astype(weight.dtype), min_step)  # as they are stored
            integers = np.clip(np.rint(channels / steps.astype(np.float32)), -MAX_INT8, MAX_INT8)
            first, second = _split_neighbours(integers)
            excess = _measure_excess(first, second)
            half = np.ceil(excess / 2)  # an odd excess comes off the first
            first -= np.sign(first) * half
            second -= np.sign(second) * (excess - half)
            errors = np.square(channels - integers * steps.astype(np.float32)).sum(axis=0)
            is_better = errors < least_errors
            best_integers[:, part][:, is_better] = integers[:, is_better]
            best_steps[part][is_better] = steps[is_better]
            least_errors[is_better] = errors[is_better]
    return best_integers, best_steps


def has_no_int16_overflow(integers: NDArray[np.int8]) -> bool:
    """Return whether no two neighbours along the first dimension can overflow 16 bits, for any inputs."""
    return not _measure_excess(*_split_neighbours(integers.astype(np.float32))).any()


def _split_neighbours(integers: Floats) -> tuple[Floats, Floats]:
    """Views of the first and second neighbours; the last of an odd number of weights has none."""
    num_paired = len(integers) // 2 * 2
    return integers[0:num_paired:2], integers[1:num_paired:2]


def _measure_excess(first: Floats, second: Floats) -> Floats:
    """The excess of neighbours of one sign over `MAX_NEIGHBOUR_SUM`."""
    magnitude = np.abs(first + second)
    return np.where(first * second > 0, np.maximum(magnitude - MAX_NEIGHBOUR_SUM, 0), 0)
