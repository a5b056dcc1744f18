"""Metrics against numbers that were computed independently, and against what must hold of any of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_data import KNOWN, PROBS, REFERENCE, SAMPLES

from flowturbo.evaluation.quality.metrics import (
    METRICS,
    InceptionSplits,
    Moments,
    Population,
    compute_inception_score,
    compute_metrics,
    describe_noise,
    find_missing_images,
    frechet_distance,
    neighbour_radii,
    subset_kernel_distance,
)
from runtime.system.errors import DataError


def population(features: np.ndarray) -> Population:
    return Population(len(features), Moments.from_features(features), features)


def test_agreement_with_the_reference_numbers() -> None:
    samples = population(SAMPLES)
    samples.score = compute_inception_score(PROBS)
    found = compute_metrics(samples, population(REFERENCE))
    assert found["fid"] == pytest.approx(float(KNOWN["fid"]), rel=1e-6)
    assert found["inception_score"] == pytest.approx(float(KNOWN["inception_score_10_splits"]), rel=1e-6)
    assert found["kid"] == pytest.approx(float(KNOWN["kid_unbiased_full"]), rel=1e-6)
    assert found["precision"] == float(KNOWN["precision_k3"])
    assert found["recall"] == float(KNOWN["recall_k3"])


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_parts_give_the_moments_and_scores_of_the_whole(sizes: list[int]) -> None:
    x, p = SAMPLES[: sum(sizes)], PROBS[: sum(sizes)]
    moments, scores, start = Moments(x.shape[1]), InceptionSplits(len(x)), 0
    for size in sizes:
        moments.add(x[start : start + size])
        scores.add(p[start : start + size])
        start += size
    np.testing.assert_allclose(moments.mean, x.astype(float).mean(axis=0), atol=1e-12)
    expected = np.cov(x.astype(float), rowvar=False) if len(x) > 1 else np.zeros((48, 48))
    np.testing.assert_allclose(moments.covariance, expected, atol=1e-10)
    assert scores.compute_score() == pytest.approx(compute_inception_score(p), rel=1e-12)


def test_known_moments_are_kept() -> None:
    mean, covariance = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
    known = Moments.from_statistics(10, mean, covariance)
    np.testing.assert_allclose(known.covariance, covariance)
    assert frechet_distance(known, known) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    """Commuting covariances: |Δμ|² + Σ (√a − √b)². One direction is singular in both."""
    a, b = np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 0.0])
    turn, _ = np.linalg.qr(np.random.Generator(np.random.Philox(0)).standard_normal((3, 3)))
    one, two = (
        Moments.from_statistics(5, mu, turn @ np.diag(v) @ turn.T) for mu, v in (([0, 0, 0], a), ([1, 2, 2], b))
    )
    assert frechet_distance(one, two) == pytest.approx(9 + 1 + 4)
    assert frechet_distance(two, one) == pytest.approx(frechet_distance(one, two))


@pytest.mark.parametrize("singular", [(False, False), (True, False), (False, True), (True, True)])
def test_frechet_distance_does_not_mind_singular_covariances(singular: tuple[bool, bool]) -> None:
    """Fewer images than features: against the trace of the root by eigenvectors of both."""
    x, y = (f[: 20 if few else None].astype(float) for f, few in zip((SAMPLES, REFERENCE), singular, strict=True))
    a, b = Moments.from_features(x), Moments.from_features(y)
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b.covariance @ root), 0)).sum()
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_a_set_is_its_own_best_match() -> None:
    same = compute_metrics(population(SAMPLES), population(SAMPLES))
    assert same["fid"] == pytest.approx(0, abs=1e-9)
    assert same["precision"] == same["recall"] == 1
    far = compute_metrics(population(SAMPLES + 100), population(SAMPLES))
    assert far["precision"] == far["recall"] == 0
    assert far["kid"] > 1 > same["kid"]


def test_inception_score_is_between_one_and_the_number_of_classes() -> None:
    assert compute_inception_score(np.full((50, 5), 0.2)) == pytest.approx(1)
    assert compute_inception_score(np.tile(np.eye(5), (10, 1))) == pytest.approx(
        5
    )  # zeros count nothing, and warn of nothing


def test_kernel_distance_is_the_unbiased_mmd() -> None:
    g = np.random.Generator(np.random.Philox(0))
    a, b = g.standard_normal((6, 3)), g.standard_normal((6, 3)) + 1
    kernel = [[(float(x @ y) / 3 + 1) ** 3 for y in (*a, *b)] for x in (*a, *b)]
    within = sum(kernel[i][j] + kernel[i + 6][j + 6] for i in range(6) for j in range(6) if i != j) / 30
    between = 2 * sum(kernel[i][j + 6] for i in range(6) for j in range(6)) / 36
    assert subset_kernel_distance(a, b, rounds=1)[0] == pytest.approx(within - between)
    assert subset_kernel_distance(a, b, rounds=3)[1] == pytest.approx(0, abs=1e-12)


def test_neighbours_by_hand() -> None:
    line = np.array([[0.0], [1.0], [3.0], [7.0], [15.0]])
    np.testing.assert_array_equal(neighbour_radii(line, k=1), [1, 1, 4, 16, 64])
    with pytest.raises(DataError, match="at least 4"):
        neighbour_radii(line[:3])


def test_what_is_not_known_is_left_out() -> None:
    statistics_only = Population(900, Moments.from_features(REFERENCE))
    assert set(compute_metrics(population(SAMPLES), statistics_only)) == {"fid"}
    few = compute_metrics(population(SAMPLES), population(REFERENCE), leave_out_noise=True)
    assert set(few) == {"precision", "recall", "kid"}
    assert METRICS["fid"].min_images == 2000


def test_equal_sets_are_not_below_zero() -> None:
    for rows in (5, 20, 200):
        same = Moments.from_features(SAMPLES[:rows])
        assert 0 <= frechet_distance(same, same) < 1e-6
    broken = Moments.from_features(SAMPLES)
    broken.mean = broken.mean * np.nan
    assert np.isnan(frechet_distance(broken, broken))  # and is not hidden by the limit


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, set()), (2, {"fid", "precision", "kid"}), (3, {"fid", "precision", "kid"}), (4, {"fid", "precision", "recall", "kid"})],
)  # fmt: skip
def test_metrics_with_too_few_samples_are_left_out(count: int, expected: set[str]) -> None:
    assert set(compute_metrics(population(SAMPLES[:count]), population(REFERENCE))) == expected


def test_metrics_with_too_small_a_reference_are_left_out() -> None:
    assert set(compute_metrics(population(SAMPLES), population(REFERENCE[:3]))) == {"fid", "recall", "kid"}
    assert set(find_missing_images((), 50, 1)) == {"fid", "sfid", "precision", "kid"}
    assert find_missing_images(["recall"], 3) == {"recall": "at least 4 images as samples"}


def test_few_pictures_are_called_noise() -> None:
    (line,) = describe_noise(["fid", "sfid", "kid"], 1999)
    assert line.startswith("FID and sFID of 1999 images: mostly noise below 2000")
    assert describe_noise(["fid"], 2000) == describe_noise(["kid"], 5) == describe_noise(["fid"], 2000, 2000) == []
    assert "a reference of 40:" in describe_noise(["fid"], 2000, 40)[0]


@pytest.mark.parametrize(
    ("mean", "covariance"),
    [([np.nan], [[1.0]]), ([0.0], [[np.inf]]), ([0.0], [[-1.0]]), ([0.0], [[1.0, 2.0]]), (0.0, 1.0)],
)
def test_impossible_statistics_are_refused(mean: object, covariance: object) -> None:
    with pytest.raises(DataError, match="a mean and covariance with") as caught:
        Moments.from_statistics(10, mean, covariance)  # type: ignore[arg-type]
    assert caught.value.allowed and caught.value.remedy
