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

REVISION = "2: pairs fit 16 bits"
"""Changes with what is rounded to: builds and measurements of another are not gone on with."""
LARGEST = 127
PAIR = 128
"""What two neighbouring weights of one sign may add up to."""
STEPS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, LARGEST / (PAIR // 2))
"""Steps that are tried, over the one which makes a channel's largest weight 127; at the last no pair can be too
large."""
_COLUMNS = 64
"""Channels at a time: what is computed of them stays in the processor's caches."""

Floats = NDArray[np.float32]


def int8_weight(weight: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """A linear layer's weight on a symmetric int8 scale per output channel.

    Args:
        weight: [in, out], float32 or float16.

    Returns:
        Integers [in, out], of which no two neighbours along `in` overflow 16 bits; steps [out], in the weight's dtype.
    """
    integers = np.empty(weight.shape, np.int8)
    steps = np.empty(weight.shape[1], weight.dtype)
    for start in range(0, weight.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        integers[:, part], steps[part] = _channels(np.ascontiguousarray(weight[:, part], np.float32), weight.dtype)
    return integers, steps


def fits_16bit(integers: NDArray[np.int8]) -> bool:
    """Whether no two neighbours along the first dimension overflow 16 bits, whatever their inputs are."""
    return not _excess(*_neighbours(integers.astype(np.float32))).any()


def _channels(weight: Floats, kind: np.dtype[Any]) -> tuple[Floats, NDArray[Any]]:
    least = np.full(weight.shape[1], np.inf, np.float32)
    best, steps = np.zeros_like(weight), np.ones(weight.shape[1], kind)
    largest = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny * LARGEST) / LARGEST
    smallest = np.finfo(kind).smallest_subnormal
    for factor in STEPS:
        tried = np.maximum((largest * factor).astype(kind), smallest)
        step = tried.astype(np.float32)
        integers = _cut(np.clip(np.rint(weight / step), -LARGEST, LARGEST))
        lost = np.square(weight - integers * step).sum(axis=0)
        better = lost < least
        best[:, better], steps[better], least[better] = integers[:, better], tried[better], lost[better]
    return best, steps


def _cut(integers: Floats) -> Floats:
    """Takes what is too much off both weights of a pair, in place; the first gives the odd one."""
    first, second = _neighbours(integers)
    excess = _excess(first, second)
    half = np.ceil(excess / 2)
    first -= np.sign(first) * half
    second -= np.sign(second) * (excess - half)
    return integers


def _neighbours(integers: Floats) -> tuple[Floats, Floats]:
    """Views of the weights that are added in pairs; the last of an odd number has no neighbour."""
    paired = len(integers) // 2 * 2
    return integers[0:paired:2], integers[1:paired:2]


def _excess(first: Floats, second: Floats) -> Floats:
    """What pairs of one sign exceed `PAIR` by."""
    same = np.abs(first + second)
    return np.where(first * second > 0, np.maximum(same - PAIR, 0), 0)
