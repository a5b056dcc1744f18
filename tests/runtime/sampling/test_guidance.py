"""Guidance as a linear map over rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.sampling.guidance import MAX_SCALE, BranchBatch, build_class_branches, check_guidance_scale
from runtime.system.errors import RequestError

NULL = 1000
scales = st.lists(st.one_of(st.just(1.0), st.floats(0, 20)), min_size=1, max_size=6)


def mixed(rows: BranchBatch, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, C] → [N, C], as an engine does it for every pixel."""
    return np.einsum("cnm,mc->nc", rows.mix.astype(np.float64), outputs)


def random_outputs(rows: BranchBatch, channels: int = 4) -> NDArray[np.float64]:
    return np.random.Generator(np.random.Philox(3)).standard_normal((len(rows.labels), channels))


@given(scales)
def test_rows_are_conditional_first_then_one_null_row_for_every_guided_image(w: list[float]) -> None:
    rows = build_class_branches(list(range(len(w))), w, NULL, 4)
    guided = [i for i, scale in enumerate(w) if scale != 1.0]
    assert rows.labels.tolist() == [*range(len(w)), *[NULL] * len(guided)]
    assert rows.row_image.tolist() == [*range(len(w)), *guided]
    assert rows.mix.shape == (4, len(rows.labels), len(rows.labels))
    assert (rows.labels.dtype, rows.row_image.dtype, rows.mix.dtype) == (np.int32, np.int32, np.float32)
    assert len(w) <= len(rows.labels) <= 2 * len(w)


@given(scales)
def test_the_first_three_channels_are_guided_and_the_fourth_is_each_branchs_own(w: list[float]) -> None:
    rows = build_class_branches([0] * len(w), w, NULL, 4)
    outputs = random_outputs(rows)
    found = mixed(rows, outputs)
    np.testing.assert_array_equal(found[:, 3], outputs[:, 3])
    null_of = {int(image): row for row, image in enumerate(rows.row_image) if row >= len(w)}
    for image, scale in enumerate(w):
        own = outputs[image]
        expected = own if image not in null_of else outputs[null_of[image]] + scale * (own - outputs[null_of[image]])
        np.testing.assert_allclose(found[image, :3], expected[:3], rtol=1e-5, atol=1e-4)
        if image in null_of:
            np.testing.assert_array_equal(
                found[null_of[image], :3], found[image, :3]
            )  # both branches, as the reference's do


@given(st.integers(1, 6))
def test_scale_one_is_the_identity_without_a_second_row(images: int) -> None:
    rows = build_class_branches([7] * images, [1.0] * images, NULL, 4)
    assert len(rows.labels) == images
    outputs = random_outputs(rows)
    np.testing.assert_array_equal(mixed(rows, outputs), outputs)


@given(scales)
def test_double_gives_every_image_its_null_row(w: list[float]) -> None:
    double, plain = (
        build_class_branches([5] * len(w), w, NULL, 4, double=True),
        build_class_branches([5] * len(w), w, NULL, 4),
    )
    assert len(double.labels) == 2 * len(w)
    assert double.row_image.tolist() == [*range(len(w)), *range(len(w))]
    outputs = random_outputs(double)
    keep = [*range(len(w)), *(len(w) + i for i, scale in enumerate(w) if scale != 1.0)]
    np.testing.assert_allclose(mixed(double, outputs)[keep], mixed(plain, outputs[keep]), rtol=1e-6, atol=1e-6)


def test_all_channels_can_be_guided() -> None:
    rows = build_class_branches([1], [2.0], NULL, 4, guided_channels=4)
    np.testing.assert_allclose(mixed(rows, np.array([[1.0] * 4, [0.5] * 4])), 1.5)
    none = build_class_branches([1], [2.0], NULL, 4, guided_channels=0)
    np.testing.assert_array_equal(none.mix, np.tile(np.eye(2), (4, 1, 1)))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0, MAX_SCALE])
def test_scales_that_can_be_used(scale: float) -> None:
    assert check_guidance_scale(scale) == scale


@pytest.mark.parametrize("scale", [-1e-9, -4.0, MAX_SCALE * 1.01, math.inf, -math.inf, math.nan])
def test_scales_that_cannot(scale: float) -> None:
    with pytest.raises(RequestError) as caught:
        check_guidance_scale(scale)
    assert "guidance" in caught.value.given and "0 to 100" in caught.value.allowed
