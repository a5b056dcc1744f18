"""Metrics between two sets of images, each a short function of their features, and the registry of them.

A new metric is one such function and one line of `METRICS`; the commands, the table and its files read it there.

Letters: N, M images of a set, E features, S spatial features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from runtime.system.errors import DataError, RequestError

Floats = NDArray[np.float64]
Features = NDArray[np.float32] | Floats

NEIGHBOURS = 3
"""k of precision and recall."""
SPLITS = 10
"""Parts whose Inception Scores are averaged, in the order of the images."""
BLOCK_ROWS = 1024
"""Rows of a distance or kernel matrix that are in memory at once."""


class Moments:
    """Mean and covariance of features that come in parts (Chan et al. 1979): [E] and [E, E] in float64."""

    def __init__(self, features: int) -> None:
        self.count = 0
        self.mean: Floats = np.zeros(features)
        self._scatter: Floats = np.zeros((features, features))

    @classmethod
    def from_features(cls, features: Features) -> Moments:
        """Return the moments of features [N, E]."""
        moments = cls(features.shape[1])
        moments.add(features)
        return moments

    @classmethod
    def from_statistics(cls, count: int, mean: ArrayLike, covariance: ArrayLike) -> Moments:
        """Return moments from statistics [E] and [E, E] that were computed before.

        Raises:
            DataError: other shapes, NaN or infinity, or variances below 0.
        """
        mean, covariance = np.asarray(mean), np.asarray(covariance)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            reason = f"shapes {list(mean.shape)} and {list(covariance.shape)}"
        elif not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            reason = "NaN or infinity"
        elif (np.diagonal(covariance) < 0).any():
            reason = "a variance below 0"
        else:
            reason = ""
        if reason:
            raise DataError(
                f"a mean and covariance with {reason}",
                allowed="finite [E] and [E, E]",
                remedy="make the statistics again of the images",
            )
        moments = cls(len(mean))
        moments.count, moments.mean = count, np.asarray(mean, np.float64)
        moments._scatter = np.asarray(covariance, np.float64)
        if count > 2:  # otherwise scatter and covariance are one, and large ones are not copied
            moments._scatter = moments._scatter * (count - 1)
        return moments

    def add(self, features: Features) -> None:
        """Add features [N, E]."""
        if not len(features):
            return
        part = np.asarray(features, np.float64)
        mean = part.mean(axis=0)
        centred, shift, total = part - mean, mean - self.mean, self.count + len(part)
        self._scatter = self._scatter + centred.T @ centred + np.outer(shift, shift) * (self.count * len(part) / total)
        self.mean = self.mean + shift * (len(part) / total)
        self.count = total

    @property
    def covariance(self) -> Floats:
        """Return the unbiased covariance; zero for a single image."""
        return self._scatter / (self.count - 1) if self.count > 2 else self._scatter


class InceptionSplits:
    """Inception Score (Salimans et al. 2016) of class probabilities that come in parts, as ADM's evaluator splits them.

    Args:
        count: images in all.
        splits: parts of equal size, in order; the score is the mean over them.
    """

    def __init__(self, count: int, splits: int = SPLITS) -> None:
        self._edges = np.linspace(0, count, min(splits, count) + 1).astype(int)
        self._position = 0
        self._sums: list[tuple[float, Floats] | None] = [None] * (len(self._edges) - 1)

    def add(self, probabilities: Features) -> None:
        """Add the probabilities [N, K] of the next images."""
        image_probabilities = np.asarray(probabilities, np.float64)
        negative_entropy = np.sum(
            image_probabilities * np.log(np.where(image_probabilities > 0, image_probabilities, 1.0)), axis=1
        )
        split_indices = (
            np.searchsorted(self._edges, self._position + np.arange(len(image_probabilities)), side="right") - 1
        )
        for split_index in np.unique(split_indices):
            in_split = split_indices == split_index
            sums = self._sums[split_index] or (0.0, np.zeros(image_probabilities.shape[1]))
            self._sums[split_index] = (
                sums[0] + float(negative_entropy[in_split].sum()),
                sums[1] + image_probabilities[in_split].sum(axis=0),
            )
        self._position += len(image_probabilities)

    def compute_split_scores(self) -> list[float]:
        """Return exp of the mean divergence of an image's classes from the split's, per split."""
        scores = []
        for size, sums in zip(np.diff(self._edges), self._sums, strict=True):
            if sums is not None:
                marginal = sums[1] / size
                entropy = float(np.sum(marginal * np.log(np.where(marginal > 0, marginal, 1.0))))
                scores.append(float(np.exp(sums[0] / size - entropy)))
        return scores

    def compute_score(self) -> float:
        """Return the Inception Score."""
        return float(np.mean(self.compute_split_scores()))


def compute_inception_score(probabilities: Features, splits: int = SPLITS) -> float:
    """Return the Inception Score of class probabilities [N, K]."""
    scores = InceptionSplits(len(probabilities), splits)
    scores.add(probabilities)
    return scores.compute_score()


@dataclass
class Population:
    """Statistics of a set of images; None where they are unknown.

    Attributes:
        count: images.
        moments, spatial: of all images' features and spatial features.
        features: [M, E] of all images or the first ones, for what needs neighbours and kernels.
        score: Inception Score.
    """

    count: int
    moments: Moments | None = None
    features: Features | None = None
    spatial: Moments | None = None
    score: float | None = None

    @property
    def num_known(self) -> int | None:
        """Return the images with features, or all where there are no features; None if that is not known."""
        return (self.count or None) if self.features is None else len(self.features)

    @cached_property
    def radii(self) -> Floats:
        """Return the squared distance to the k-th nearest other image, [M]."""
        return neighbour_radii(_require_features(self))

    @cached_property
    def kernel_mean(self) -> float:
        """Return the mean kernel of two different images."""
        x = np.asarray(_require_features(self), np.float64)
        diagonal = float((((x**2).sum(axis=1) / x.shape[1] + 1) ** 3).sum())
        return (_kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |μa − μb|² + tr(Σa + Σb − 2·(Σa·Σb)^½), in float64 (Heusel et al. 2017, eq. 6).

    The trace of the root is the sum of the roots of the eigenvalues of Σa·Σb, which are those of the symmetric Fᵀ·Σb·F
    for any F with Σa = F·Fᵀ: no general matrix root, with its complex results for singular covariances, is needed.
    """
    covariance_a, covariance_b = a.covariance, b.covariance
    difference = a.mean - b.mean
    traces = float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b))
    product = _factor_product(covariance_a, covariance_b)
    distance = traces - 2 * float(np.sqrt(np.maximum(np.linalg.eigvalsh(product), 0)).sum())
    return 0.0 if distance < 0 else distance  # rounding leaves -1e-8 for equal sets; NaN stays


def _factor_product(a: Floats, b: Floats) -> Floats:
    """Compute Fᵀ·b·F with a = F·Fᵀ, or the same with a and b exchanged.

    By Cholesky where one of them is positive definite: a third of the memory and a tenth of the time of eigenvectors.
    """
    for factored, other in ((a, b), (b, a)):
        with suppress(np.linalg.LinAlgError):
            factor = np.linalg.cholesky(factored)
            return np.asarray(factor.T @ (other @ factor))
    values, vectors = np.linalg.eigh(a)
    vectors *= np.sqrt(np.maximum(values, 0))
    return np.asarray(vectors.T @ (b @ vectors))


def neighbour_radii(features: Features, k: int = NEIGHBOURS) -> Floats:
    """Return the squared distance of each row of features [N, E] to its k-th nearest other row, [N]."""
    if len(features) <= k:
        raise DataError(f"{len(features)} images for k = {k} nearest neighbours", allowed=f"at least {k + 1}")
    radii = []
    for start, distances in _distance_blocks(features, features):
        distances[np.arange(len(distances)), start + np.arange(len(distances))] = np.inf  # not its own neighbour
        radii.append(np.partition(distances, k - 1, axis=1)[:, k - 1])
    return np.concatenate(radii)


def coverage(features: Features, manifold: Features, radii: Floats) -> float:
    """Return the share of `features` within the radius of any row of `manifold` (Kynkäänniemi et al. 2019)."""
    inside = [np.any(distances <= radii, axis=1) for _, distances in _distance_blocks(features, manifold)]
    return float(np.concatenate(inside).mean())


def kernel_distance(a: Population, b: Population) -> float:
    """Return KID (Bińkowski et al. 2018): unbiased MMD² under (x·y/E + 1)³, over all features that are known."""
    x, y = np.asarray(_require_features(a), np.float64), np.asarray(_require_features(b), np.float64)
    return a.kernel_mean + b.kernel_mean - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def subset_kernel_distance(
    a: Features, b: Features, subset: int = 300, rounds: int = 20, seed: int = 0
) -> tuple[float, float]:
    """Return KID of features [N, E] and [M, E]: mean and standard deviation over random subsets of equal size."""
    size, g = min(subset, len(a), len(b)), np.random.Generator(np.random.Philox(seed))
    values = []
    for _ in range(rounds):
        x, y = a[g.permutation(len(a))[:size]], b[g.permutation(len(b))[:size]]
        values.append(kernel_distance(Population(size, features=x), Population(size, features=y)))
    return float(np.mean(values)), float(np.std(values))


def _kernel_sum(x: Floats, y: Floats) -> float:
    total = 0.0
    for start in range(0, len(x), BLOCK_ROWS):
        base = x[start : start + BLOCK_ROWS] @ y.T / x.shape[-1] + 1
        total += float((base * base * base).sum())  # a general power takes many times as long
    return total


def _distance_blocks(x: Features, y: Features) -> Iterator[tuple[int, Floats]]:
    """Give the first row and squared Euclidean distances [block, len(y)] of each block."""
    x64, y64 = np.asarray(x, np.float64), np.asarray(y, np.float64)
    norms = (y64**2).sum(axis=1)
    for start in range(0, len(x64), BLOCK_ROWS):
        block = x64[start : start + BLOCK_ROWS]
        square = (block**2).sum(axis=1)[:, None] + norms - 2 * block @ y64.T
        yield start, np.maximum(square, 0)


def _make_frechet_metric(field: Literal["moments", "spatial"]) -> Callable[[Population, Population], float]:
    return lambda samples, reference: frechet_distance(getattr(samples, field), getattr(reference, field))


def _measure_coverage(covered: Population, manifold: Population) -> float:
    return coverage(_require_features(covered), _require_features(manifold), manifold.radii)


def _require_features(population: Population) -> Features:
    if population.features is None:
        raise DataError("a set without features", remedy="make it from images")
    return population.features


@dataclass(frozen=True)
class Metric:
    """A registered metric.

    Attributes:
        label: heading of its column.
        better: "lower" or "higher".
        needs: attribute of `Population` that the samples, and the reference unless `needs_samples_only`, must have.
        compute: samples, reference → value.
        digits: decimals shown.
        min_images: sample images below which it is noise: it is left out of tables, and scores warn.
        required_samples, required_reference: images of either set without which it is not defined.
        needs_samples_only: of the samples only.
    """

    label: str
    better: str
    needs: Literal["moments", "spatial", "features", "score"]
    compute: Callable[[Population, Population], float]
    digits: int
    min_images: int = 0
    needs_samples_only: bool = False
    required_samples: int = 2
    required_reference: int = 0


FID_MIN_IMAGES = 2000

METRICS = {
    "fid": Metric("FID", "lower", "moments", _make_frechet_metric("moments"), 2, FID_MIN_IMAGES, required_reference=2),
    "sfid": Metric(
        "sFID", "lower", "spatial", _make_frechet_metric("spatial"), 2, FID_MIN_IMAGES, required_reference=2
    ),
    "inception_score": Metric(
        "IS", "higher", "score", lambda samples, _: samples.score or 0.0, 2, needs_samples_only=True
    ),
    "precision": Metric("precision", "higher", "features", _measure_coverage, 3, required_reference=NEIGHBOURS + 1),
    "recall": Metric(
        "recall",
        "higher",
        "features",
        lambda samples, reference: _measure_coverage(reference, samples),
        3,
        required_samples=NEIGHBOURS + 1,
    ),
    "kid": Metric("KID", "lower", "features", kernel_distance, 4, required_reference=2),
}


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of metrics; all of them if none is given.

    Raises:
        RequestError: one is unknown.
    """
    if unknown := [name for name in names if name not in METRICS]:
        raise RequestError(f"metric {unknown[0]!r}", allowed=", ".join(METRICS))
    return tuple(names) or tuple(METRICS)


def find_missing_images(names: Sequence[str], num_samples: int, num_reference: int | None = None) -> dict[str, str]:
    """Return how many images metrics need that have too few, by name; of all metrics if `names` is empty.

    Args:
        num_samples, num_reference: images; None where the number is not known.
    """
    needs = {}
    for name in check_metrics(names):
        metric = METRICS[name]
        if num_samples < metric.required_samples:
            needs[name] = f"at least {metric.required_samples} images as samples"
        elif num_reference is not None and num_reference < metric.required_reference:
            needs[name] = f"at least {metric.required_reference} images as reference"
    return needs


def describe_noise(names: Iterable[str], num_samples: int, num_reference: int | None = None) -> list[str]:
    """Return a line about those of the metrics that are mostly noise with so few images; none if there are none."""
    noisy = [
        METRICS[name] for name in names if min(num_samples, num_reference or num_samples) < METRICS[name].min_images
    ]
    if not noisy:
        return []
    labels, minimum = " and ".join(metric.label for metric in noisy), max(metric.min_images for metric in noisy)
    images = f"{num_samples} images" + (f" and a reference of {num_reference}" if num_reference else "")
    return [f"{labels} of {images}: mostly noise below {minimum}; such numbers are no measure of quality"]


def compute_metrics(
    samples: Population, reference: Population | None, names: Sequence[str] = (), *, leave_out_noise: bool = False
) -> dict[str, float]:
    """Compute every metric that the statistics and the numbers of images allow, or those of `names`.

    Args:
        leave_out_noise: drop those for which there are too few samples.
    """
    values = {}
    for name in check_metrics(names):
        metric = METRICS[name]
        if leave_out_noise and samples.count < metric.min_images:
            continue
        if find_missing_images([name], samples.count, None if reference is None else reference.num_known):
            continue
        populations = [samples] if metric.needs_samples_only else [samples, reference]
        if all(population is not None and getattr(population, metric.needs) is not None for population in populations):
            values[name] = metric.compute(samples, reference or samples)
    return values
