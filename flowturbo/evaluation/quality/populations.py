"""Images to what is known of them: features chunk by chunk, kept on disk, then statistics; and packs of statistics.

A pack is a small .npz: everything that metrics need of a set of images, with the hash of the extractor that made it.

Letters: N images, E features.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.progress import Report
from flowturbo.evaluation.quality.array_cache import Arrays, read_kept, write_kept
from flowturbo.evaluation.quality.features import Extractor
from flowturbo.evaluation.quality.image_files import ImageSource
from flowturbo.evaluation.quality.metrics import Moments, Population, SplitScores
from runtime.system.errors import DataError, RequestError
from runtime.system.files import make_folder
from runtime.system.version import VERSION

KEPT = 10_000
"""Images whose features are kept for precision, recall and KID: a random part of larger sets, always the same."""
PACK_SCHEMA = 1


@dataclass(frozen=True)
class Origin:
    """What a population was made of and with.

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
class Described:
    """A population, where it comes from, and further numbers of its images, by name."""

    population: Population
    origin: Origin
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)


class FeatureChunks:
    """Features of a source's images, made once per chunk and kept: a killed run loses one chunk.

    Args:
        cache: folder that holds one folder per source and extractor; None keeps nothing.
    """

    def __init__(self, source: ImageSource, extractor: Extractor, cache: Path | None) -> None:
        self._source, self._extractor = source, extractor
        self._folder = None if cache is None else make_folder(cache / f"{source.key}-{extractor.hash}")

    def chunks(self, shard: tuple[int, int] = (0, 1), report: Report | None = None) -> Iterator[Arrays]:
        """Arrays of each chunk in order: features, spatial, probabilities and the source's scores.

        Args:
            shard: (i, n) for every n-th chunk from the i-th on: n processes share a cache and the work.
        """
        source, done = self._source, 0
        starts = range(0, source.count, source.size)[shard[0] :: shard[1]]
        wanted = sum(min(source.size, source.count - start) for start in starts)
        for start in starts:
            chunk = self._chunk(start)
            done += len(chunk["features"])
            if report is not None:
                report(done, wanted)
            yield chunk

    def _chunk(self, start: int) -> Arrays:
        path = None if self._folder is None else self._folder / f"{start:07d}.npz"
        if path is not None and (kept := read_kept(path)) is not None:
            return kept
        images = self._source.read(start)
        found = self._extractor.extract(images)
        arrays: Arrays = {"features": found.features, **self._source.scores(start, images)}
        arrays |= {} if found.spatial is None else {"spatial": found.spatial}
        arrays |= {} if found.probabilities is None else {"probabilities": found.probabilities}
        if path is not None:
            write_kept(path, arrays)
        return arrays


def describe(
    source: ImageSource, extractor: Extractor, cache: Path | None, what: str, report: Report | None = None
) -> Described:
    """Goes through all images of a source once."""
    gathered = _Gathered(source.count)
    for chunk in FeatureChunks(source, extractor, cache).chunks(report=report):
        gathered.add(chunk)
    origin = Origin(what, source.count, extractor.name, extractor.hash)
    return Described(gathered.population(), origin, gathered.scores())


class _Gathered:
    """What has been seen of `count` images so far."""

    def __init__(self, count: int) -> None:
        self._count, self._seen = count, 0
        self._moments: dict[str, Moments] = {}
        self._splits: SplitScores | None = None
        self._rows: list[NDArray[np.float32]] = []
        self._scores: dict[str, list[NDArray[np.float64]]] = {}
        self._kept = np.zeros(count, bool)
        self._kept[np.random.Generator(np.random.Philox(0)).permutation(count)[:KEPT]] = True

    def add(self, chunk: Arrays) -> None:
        """Takes in the next chunk."""
        for name, array in chunk.items():
            if name in ("features", "spatial"):
                self._moments.setdefault(name, Moments(array.shape[1])).add(array)
            elif name == "probabilities":
                self._splits = self._splits or SplitScores(self._count)
                self._splits.add(array)
            else:
                self._scores.setdefault(name, []).append(array)
        features = chunk["features"]
        self._rows.append(features[self._kept[self._seen : self._seen + len(features)]])
        self._seen += len(features)

    def population(self) -> Population:
        return Population(
            self._count,
            self._moments["features"],
            np.concatenate(self._rows),
            self._moments.get("spatial"),
            None if self._splits is None else self._splits.value(),
        )

    def scores(self) -> dict[str, NDArray[np.float64]]:
        return {name: np.concatenate(parts) for name, parts in self._scores.items()}


def save_pack(path: Path, described: Described) -> None:
    """Writes a population: moments in float64, features in float16. Whole or not at all."""
    population = described.population
    if population.moments is None or population.features is None:
        raise DataError("a set without features", remedy="make the pack from images")
    about = {"schema": PACK_SCHEMA, "flowturbo": VERSION, "score": population.score, **asdict(described.origin)}
    arrays: Arrays = {"about": np.asarray(json.dumps(about)), "features": population.features.astype(np.float16)}
    for name, moments in (("", population.moments), ("spatial_", population.spatial)):
        if moments is not None:
            upper = np.triu_indices(len(moments.mean))
            arrays |= {f"{name}mean": moments.mean, f"{name}covariance": moments.covariance[upper]}
    make_folder(path.absolute().parent)
    write_kept(path, arrays, compressed=True)


def load_pack(path: Path) -> Described:
    """Reads one.

    Raises:
        DataError: it is damaged, no pack, or of a newer version.
    """
    arrays = read_kept(path)
    try:
        assert arrays is not None
        about = json.loads(str(arrays["about"]))
        if about["schema"] > PACK_SCHEMA:
            raise DataError(f"{path} is of a newer flowturbo ({about['flowturbo']})", remedy="update this one")
        count = int(about["count"])
        moments = _moments(arrays, "", count)
        spatial = _moments(arrays, "spatial_", count) if "spatial_mean" in arrays else None
        population = Population(count, moments, arrays["features"].astype(np.float32), spatial, about["score"])
        origin = Origin(about["what"], count, about["extractor"], about["extractor_hash"])
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no reference pack", remedy="make one: flowturbo-eval reference") from error
    return Described(population, origin)


def is_pack(names: set[str]) -> bool:
    """Whether an .npz with arrays of these names is a pack."""
    return {"about", "features", "mean", "covariance"} <= names


def _moments(arrays: Arrays, name: str, count: int) -> Moments:
    mean, upper = arrays[f"{name}mean"], arrays[f"{name}covariance"]
    covariance = np.zeros((len(mean), len(mean)))
    covariance[np.triu_indices(len(mean))] = upper
    covariance += np.triu(covariance, 1).T
    return Moments.known(count, mean, covariance)


def check_same_extractor(populations: Sequence[Described]) -> None:
    """Refuses what was not made by one extractor.

    Raises:
        RequestError: naming both.
    """
    first = populations[0].origin
    unknown = [one.origin.what for one in populations if one.origin.extractor_hash is None]
    if 0 < len(unknown) < len(populations):
        warnings.warn(f"{unknown[0]} does not say which extractor made it: see that it is the same one", stacklevel=2)
    for other in (one.origin for one in populations[1:]):
        if first.extractor_hash != other.extractor_hash and None not in (first.extractor_hash, other.extractor_hash):
            raise RequestError(
                f"{first.what} was seen by {first.extractor} ({first.extractor_hash}), "
                f"{other.what} by {other.extractor} ({other.extractor_hash})",
                allowed="features of one extractor, one input size and one resize",
                remedy="make both with the same --features",
            )
