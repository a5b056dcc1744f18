"""Measure sets of images: features chunk by chunk, cached on disk, then statistics; and packs of statistics.

A pack is a small .npz: everything that metrics need of a set of images, with the hash of its extractor.

Letters: N images, E features.
"""

from __future__ import annotations

import json
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.quality.features import Extractor
from flowturbo.evaluation.quality.image_files import ImageSource
from flowturbo.evaluation.quality.metrics import InceptionSplits, Moments, Population
from runtime.system.array_store import Arrays, load_arrays, save_arrays
from runtime.system.errors import DataError, RequestError
from runtime.system.files import make_folder
from runtime.system.json_codec import parse_versioned
from runtime.system.progress import SILENT, Progress
from runtime.system.version import VERSION

MAX_FEATURE_IMAGES = 10_000
"""Images with features for precision, recall and KID: of larger sets a random part, always the same."""
MAX_PACK_IMAGES, MAX_PACK_BYTES = 10**9, 1 << 30
_PACK_ERRORS = (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError)
PACK_SCHEMA = 1


@dataclass(frozen=True)
class Origin:
    """The images and the extractor of a population.

    Attributes:
        extractor, extractor_hash: name, and hash of all that its numbers depend on; None for features of unknown make.
        count: images.
        what: for reports.
    """

    what: str
    count: int
    extractor: str | None = None
    extractor_hash: str | None = None


@dataclass
class ImageSet:
    """A population, its origin, and further numbers of its images, by name."""

    population: Population
    origin: Origin
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)


class FeatureCache:
    """Features of a source's images, made once per chunk and cached: a killed run loses one chunk.

    Args:
        cache: folder that holds one folder per source and extractor; None caches nothing.
    """

    def __init__(self, source: ImageSource, extractor: Extractor, cache: Path | None) -> None:
        self._source, self._extractor = source, extractor
        self._folder = None if cache is None else make_folder(cache / f"{source.key}-{extractor.hash}")

    def read_chunks(
        self, shard: tuple[int, int] = (0, 1), progress: Progress = SILENT, task: str = "features"
    ) -> Iterator[Arrays]:
        """Read the arrays of each chunk in order: features, spatial, probabilities and the source's scores.

        Args:
            shard: (i, n) for every n-th chunk from the i-th on: n processes share a cache and the work.
            progress, task: `progress.update(task, …)` receives the images of the shard that are done.
        """
        source, done = self._source, 0
        starts = range(0, source.count, source.chunk_size)[shard[0] :: shard[1]]
        total = sum(min(source.chunk_size, source.count - start) for start in starts)
        for start in starts:
            chunk = self._read_chunk(start)
            done += len(chunk["features"])
            progress.update(task, done, total)
            yield chunk

    def _read_chunk(self, start: int) -> Arrays:
        path = None if self._folder is None else self._folder / f"{start:07d}.npz"
        if path is not None and (cached := load_arrays(path)) is not None:
            return cached
        images = self._source.read(start)
        features = self._extractor.extract(images)
        arrays: Arrays = {"features": features.features, **self._source.compute_scores(start, images)}
        arrays |= {} if features.spatial is None else {"spatial": features.spatial}
        arrays |= {} if features.probabilities is None else {"probabilities": features.probabilities}
        if path is not None:
            save_arrays(path, arrays)
        return arrays


def measure_image_set(
    source: ImageSource,
    extractor: Extractor,
    cache: Path | None,
    name: str,
    progress: Progress = SILENT,
    task: str = "features",
) -> ImageSet:
    """Go through all images of a source once."""
    moments: dict[str, Moments] = {}
    splits: InceptionSplits | None = None
    rows: list[NDArray[np.float32]] = []
    scores: dict[str, list[NDArray[np.float64]]] = {}
    position, feature_mask = 0, np.zeros(source.count, bool)
    feature_mask[np.random.Generator(np.random.Philox(0)).permutation(source.count)[:MAX_FEATURE_IMAGES]] = True
    for chunk in FeatureCache(source, extractor, cache).read_chunks(progress=progress, task=task):
        for array_name, array in chunk.items():
            if array_name in ("features", "spatial"):
                moments.setdefault(array_name, Moments(array.shape[1])).add(array)
            elif array_name == "probabilities":
                splits = splits or InceptionSplits(source.count)
                splits.add(array)
            else:
                scores.setdefault(array_name, []).append(array)
        features = chunk["features"]
        rows.append(features[feature_mask[position : position + len(features)]])
        position += len(features)
    population = Population(
        source.count,
        moments["features"],
        np.concatenate(rows),
        moments.get("spatial"),
        None if splits is None else splits.compute_score(),
    )
    origin = Origin(name, source.count, extractor.name, extractor.hash)
    return ImageSet(population, origin, {key: np.concatenate(parts) for key, parts in scores.items()})


@dataclass(frozen=True)
class _PackHeader:
    schema: int
    flowturbo: str
    score: float | None
    what: str
    count: int
    extractor: str | None
    extractor_hash: str | None


def save_pack(path: Path, image_set: ImageSet) -> None:
    """Write a population: moments in float64, features in float16. Whole or not at all."""
    population = image_set.population
    if population.moments is None or population.features is None:
        raise DataError("a set without features", remedy="make the pack from images")
    header = _PackHeader(PACK_SCHEMA, VERSION, population.score, **vars(image_set.origin))
    arrays: Arrays = {"about": np.asarray(json.dumps(vars(header))), "features": population.features.astype(np.float16)}
    for name, moments in (("", population.moments), ("spatial_", population.spatial)):
        if moments is not None:
            upper_indices = np.triu_indices(len(moments.mean))
            arrays |= {f"{name}mean": moments.mean, f"{name}covariance": moments.covariance[upper_indices]}
    make_folder(path.absolute().parent)
    save_arrays(path, arrays, compressed=True)


def load_pack(path: Path) -> ImageSet:
    """Read a pack.

    Raises:
        DataError: it is damaged, no pack, or of a newer version.
    """
    remedy = "make one: flowturbo-eval reference"
    try:
        with zipfile.ZipFile(path) as archive:  # members are never read beyond these sizes
            unpacked_bytes = sum(info.file_size for info in archive.infolist())
        if unpacked_bytes > MAX_PACK_BYTES:
            raise DataError(
                f"{path} unpacks to {unpacked_bytes:,} bytes", allowed=f"at most {MAX_PACK_BYTES:,}", remedy=remedy
            )
        arrays = load_arrays(path) or {}
        header = parse_versioned(
            json.loads(str(arrays["about"])), _PackHeader, PACK_SCHEMA,
            where=str(path), name="reference pack", remedy=remedy, error_type=DataError,
        )  # fmt: skip
        moments = _read_pack_moments(arrays, "", header.count)
        spatial = _read_pack_moments(arrays, "spatial_", header.count) if "spatial_mean" in arrays else None
        features = arrays["features"].astype(np.float32)
    except DataError as error:
        given = error.given if str(path) in error.given else f"{path} holds {error.given}"
        raise DataError(given, allowed=error.allowed, remedy=error.remedy) from error
    except (*_PACK_ERRORS, KeyError, ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{path} is no reference pack", allowed="a file that flowturbo-eval reference wrote", remedy=remedy
        ) from error
    is_matrix = features.ndim == 2 and features.shape[1] == len(moments.mean) and len(features) <= header.count
    if not is_matrix or not np.isfinite(features).all():
        raise DataError(
            f"{path} holds features {list(features.shape)} of {header.count} images, or NaN among them",
            allowed=f"finite [M, {len(moments.mean)}], M at most the number of images",
            remedy=remedy,
        )
    if header.score is not None and not 0 < header.score < np.inf:
        raise DataError(f"{path} holds the score {header.score}", allowed="a number above 0", remedy=remedy)
    population = Population(header.count, moments, features, spatial, header.score)
    return ImageSet(population, Origin(header.what, header.count, header.extractor, header.extractor_hash))


def is_pack(names: set[str]) -> bool:
    """Return whether an .npz with arrays of these names is a pack."""
    return {"about", "features", "mean", "covariance"} <= names


def _read_pack_moments(arrays: Arrays, name: str, count: int) -> Moments:
    mean, upper = arrays[f"{name}mean"], arrays[f"{name}covariance"]
    if not 1 <= count <= MAX_PACK_IMAGES:
        raise DataError(
            f"statistics of {count} images", allowed=f"1 to {MAX_PACK_IMAGES:,} images", remedy="make the pack again"
        )
    if mean.ndim != 1 or upper.shape != (len(mean) * (len(mean) + 1) // 2,):  # before anything of E × E is made
        raise DataError(
            f"statistics of shapes {list(mean.shape)} and {list(upper.shape)}",
            allowed="a mean [E] and a triangle of E·(E + 1)/2 covariances",
            remedy="make the pack again",
        )
    covariance = np.zeros((len(mean), len(mean)))
    covariance[np.triu_indices(len(mean))] = upper
    covariance += np.triu(covariance, 1).T
    return Moments.from_statistics(count, mean, covariance)


def check_same_extractor(image_sets: Sequence[ImageSet]) -> None:
    """Check that one extractor made all features.

    Raises:
        RequestError: naming both.
    """
    first_origin = image_sets[0].origin
    unknown_names = [image_set.origin.what for image_set in image_sets if image_set.origin.extractor_hash is None]
    if 0 < len(unknown_names) < len(image_sets):
        warnings.warn(
            f"{unknown_names[0]} does not say which extractor made it: see that it is the same one", stacklevel=2
        )
    for origin in (image_set.origin for image_set in image_sets[1:]):
        if first_origin.extractor_hash != origin.extractor_hash and None not in (
            first_origin.extractor_hash,
            origin.extractor_hash,
        ):
            raise RequestError(
                f"{first_origin.what} was seen by {first_origin.extractor} ({first_origin.extractor_hash}), "
                f"{origin.what} by {origin.extractor} ({origin.extractor_hash})",
                allowed="features of one extractor, one input size and one resize",
                remedy="make both with the same --features",
            )
