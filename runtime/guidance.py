"""Classifier-free guidance as a linear map over rows.

A network evaluates N rows, each a (point, label) pair. Rows 0 … B − 1 are the conditional ones, one per image; an
image that is guided has one more row with the null label at the same point. `pair[n]` says whose point row n uses
and `mix[c]` maps the rows' outputs of channel c to guided velocities, so one engine serves guided and unguided
images, a scale per image, and the reference's habit of guiding the first three channels only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError

REFERENCE_CHANNELS = 3
"""Channels that SiT's and FlowTurbo's samplers guide; each branch keeps the fourth of its own velocity."""

MAX_SCALE = 100.0


@dataclass(frozen=True)
class Rows:
    """What one evaluation computes for B images.

    Attributes:
        labels: [N] int32, class of every row.
        pair: [N] int32, the image whose point a row is evaluated at.
        mix: [C, N, N] float32, guided output of channel c = mix[c] @ outputs.
    """

    labels: NDArray[np.int32]
    pair: NDArray[np.int32]
    mix: NDArray[np.float32]


def guided_rows(
    labels: Sequence[int],
    scales: Sequence[float],
    null_label: int,
    channels: int,
    guided_channels: int = REFERENCE_CHANNELS,
    *,
    double: bool = False,
) -> Rows:
    """Rows of one evaluation of B images.

    Args:
        labels, scales: class and guidance scale per image; scale 1 needs no second row.
        null_label: the unconditional class.
        channels: C.
        guided_channels: the first so many channels are guided (3: the reference, C: all).
        double: give every image its null row even where no image needs it (static engines with N = 2B).
    """
    images = len(labels)
    guided = [i for i in range(images) if double or scales[i] != 1.0]
    rows = images + len(guided)
    mix = np.tile(np.eye(rows, dtype=np.float32), (channels, 1, 1))
    for null_row, image in enumerate(guided, start=images):
        w = np.float32(scales[image])
        for row in (image, null_row):  # both branches get the guided velocity, as the reference's do
            mix[:guided_channels, row, :] = 0.0
            mix[:guided_channels, row, image] = w
            mix[:guided_channels, row, null_row] = 1 - w
    return Rows(
        np.asarray([*labels, *[null_label] * len(guided)], dtype=np.int32),
        np.asarray([*range(images), *guided], dtype=np.int32),
        mix,
    )


def check_scale(scale: object) -> float:
    """The scale, if it can be used.

    Raises:
        RequestError: not a number from 0 to `MAX_SCALE`.
    """
    number = scale if isinstance(scale, int | float | np.number) else math.nan
    if not 0.0 <= float(number) <= MAX_SCALE:
        shown = f"{scale:g}" if isinstance(scale, int | float) else repr(scale)
        raise RequestError(f"guidance {shown}", allowed=f"a number from 0 to {MAX_SCALE:g}; 1 is no guidance")
    return float(number)
