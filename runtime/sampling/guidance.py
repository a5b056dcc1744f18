"""Classifier-free guidance as a linear map over rows.

A network evaluates N rows, each a (point, label) pair. Rows 0 … B − 1 are the conditional ones, one per image; an
image that is guided has one more row with the null label at the same point. `row_image[n]` is the image of the point
of row n, and `mix[c]` maps the rows' outputs of channel c to guided velocities. So one engine serves guided and
unguided images, a scale per image, and the reference, which guides only the first three channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from runtime.system.errors import RequestError

REFERENCE_CHANNELS = 3
"""Channels that SiT's and FlowTurbo's samplers guide; each branch keeps the fourth of its own velocity."""

MAX_SCALE = 100.0


@dataclass(frozen=True)
class BranchBatch:
    """The rows of one evaluation of B images.

    Attributes:
        labels: [N] int32, class of every row.
        row_image: [N] int32, image of the point at which a row is evaluated.
        mix: [C, N, N] float32, guided output of channel c = mix[c] @ outputs.
    """

    labels: NDArray[np.int32]
    row_image: NDArray[np.int32]
    mix: NDArray[np.float32]


@dataclass(frozen=True)
class GuidanceInterval:
    """Flow times in which guidance acts (Kynkäänniemi et al. 2024): from `start`, included, to `end`, excluded.

    An `end` of 1 includes the end of the trajectory.
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.start < self.end <= 1.0:
            raise RequestError(
                f"guidance interval {self.start:g},{self.end:g}", allowed="two rising flow times from 0 to 1"
            )

    def is_active(self, t: float) -> bool:
        return self.start <= t < self.end or t == self.end == 1.0

    def split_segments(self, *, backwards: bool = False) -> list[GuidanceSegment]:
        """Cut the trajectory at the edges of the interval, from noise to data or backwards."""
        edges = sorted({0.0, self.start, self.end, 1.0})
        segments = [GuidanceSegment(a, b, self.start <= a and b <= self.end) for a, b in pairwise(edges)]
        return [GuidanceSegment(s.end, s.start, s.guided) for s in reversed(segments)] if backwards else segments


@dataclass(frozen=True)
class GuidanceSegment:
    """A part of flow time in which guidance acts throughout, or not at all."""

    start: float
    end: float
    guided: bool


FULL_INTERVAL = GuidanceInterval()


@dataclass(frozen=True)
class ImageCondition:
    """The condition of one image: guided velocity = scale·Σ weight·v(label) + (1 − scale)·v(other).

    Attributes:
        weighted_labels: the conditional branch, labels and their weights, which sum to 1; one label unless mixed.
        scale: guidance scale; 1 needs no other branch.
        negative_label: label of the other branch: the model's null label, or a class to move away from.
    """

    weighted_labels: tuple[tuple[int, float], ...]
    scale: float
    negative_label: int

    def count_branches(self, guided: bool) -> int:
        """Return how many rows one evaluation of this image takes."""
        return len(self.weighted_labels) + (guided and self.scale != 1.0)


def build_class_branches(
    labels: Sequence[int],
    scales: Sequence[float],
    null_label: int,
    channels: int,
    guided_channels: int = REFERENCE_CHANNELS,
    *,
    double: bool = False,
) -> BranchBatch:
    """Build the rows of one evaluation of B images of one class each; see `build_branches`."""
    conditions = [
        ImageCondition(((label, 1.0),), scale, null_label) for label, scale in zip(labels, scales, strict=True)
    ]
    return build_branches(conditions, channels, guided_channels, double=double)


def build_branches(
    conditions: Sequence[ImageCondition],
    channels: int,
    guided_channels: int = REFERENCE_CHANNELS,
    *,
    guided: bool = True,
    double: bool = False,
) -> BranchBatch:
    """Build the rows of an evaluation of B images: the first label of each, further labels of mixtures, the negatives.

    The rows without guidance are the first of the guided rows, in the same order.

    Args:
        channels: C.
        guided_channels: number of first channels that are guided (3: the reference, C: all). The rest of each row is
            its own branch's velocity, the mixture's for the conditional ones.
        guided: False outside the guidance interval: the negative branch is not evaluated.
        double: give every image a negative row even where no image needs it (static engines with N = 2B).
    """
    first_labels = [(i, condition.weighted_labels[0][0]) for i, condition in enumerate(conditions)]
    extra_labels = [(i, label) for i, condition in enumerate(conditions) for label, _ in condition.weighted_labels[1:]]
    negative_labels = [
        (i, condition.negative_label)
        for i, condition in enumerate(conditions)
        if guided and (double or condition.scale != 1.0)
    ]
    rows = [*first_labels, *extra_labels, *negative_labels]
    mix = np.zeros((channels, len(rows), len(rows)), np.float32)
    num_conditional = len(first_labels) + len(extra_labels)
    for row, (i, _) in enumerate(rows):
        image_rows = [k for k in range(num_conditional) if rows[k][0] == i]
        weights = np.asarray([weight for _, weight in conditions[i].weighted_labels], np.float32)
        negative_row = next((k for k in range(num_conditional, len(rows)) if rows[k][0] == i), None)
        scale = np.float32(1.0 if negative_row is None else conditions[i].scale)
        mix[:guided_channels, row, image_rows] = scale * weights  # of both branches, as in the reference
        if negative_row is not None:
            mix[:guided_channels, row, negative_row] = 1 - scale
        if row < num_conditional:
            mix[guided_channels:, row, image_rows] = weights
        else:
            mix[guided_channels:, row, row] = 1.0
    return BranchBatch(
        np.asarray([label for _, label in rows], dtype=np.int32),
        np.asarray([i for i, _ in rows], dtype=np.int32),
        mix,
    )


def check_guidance_scale(scale: object) -> float:
    """Return the scale, if it can be used.

    Raises:
        RequestError: not a number from 0 to `MAX_SCALE`.
    """
    number = scale if isinstance(scale, int | float | np.number) else math.nan
    if not 0.0 <= float(number) <= MAX_SCALE:
        scale_text = f"{scale:g}" if isinstance(scale, int | float) else repr(scale)
        raise RequestError(f"guidance {scale_text}", allowed=f"a number from 0 to {MAX_SCALE:g}; 1 is no guidance")
    return float(number)
