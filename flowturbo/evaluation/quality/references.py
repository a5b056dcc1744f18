"""What samples are compared with: a folder of images, an ADM .npz, or a pack; only what is needed is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.progress import Report
from flowturbo.evaluation.quality.features import EXTRACTORS, INCEPTION, Extractor, open_extractor
from flowturbo.evaluation.quality.image_files import FolderImages, NpzImages, members, open_member, read_header
from flowturbo.evaluation.quality.metrics import METRICS, Moments, Population, check_metrics
from flowturbo.evaluation.quality.populations import Described, Origin, describe, is_pack, load_pack
from runtime.system.errors import DataError, RequestError

_PART_BYTES = 1 << 20


def default_features(reference: Path) -> str:
    """Name of the registered extractor that a reference was made with.

    Raises:
        RequestError: it cannot be known.
    """
    held = set() if reference.is_dir() else members(reference)
    name = load_pack(reference).origin.extractor if is_pack(held) else INCEPTION if "mu" in held else None
    names = {INCEPTION: "inception", **{key: key for key in EXTRACTORS}}
    if name not in names:
        raise no_extractor(reference)
    return names[name]


def no_extractor(of: Path) -> RequestError:
    """What to say where no extractor is named and none can be known."""
    allowed = f"{', '.join(EXTRACTORS)}, or an ONNX file with --input-size"
    return RequestError(f"no extractor named for {of}", allowed=allowed, remedy="name one with --features")


def extractor_for(
    features: str | None,
    reference: Path,
    input_size: int | None,
    input_range: str | None,
    provider: str,
    threads: int | None = None,
) -> Extractor:
    """The extractor that was named, or the one that the reference was made with."""
    name = features or default_features(reference)
    return open_extractor(name, input_size=input_size, input_range=input_range, provider=provider, threads=threads)


def load_reference(
    path: Path,
    extractor: Extractor,
    names: Sequence[str] = (),
    *,
    resolution: int | None = None,
    cache: Path | None = None,
    report: Report | None = None,
) -> Described:
    """A reference, with as much as the metrics `names` need (all if empty).

    Args:
        resolution: for a folder of images of several sizes.
        cache: where features of images are kept.

    Raises:
        DataError: nothing there that can be a reference.
    """
    if path.is_dir():
        return describe(FolderImages(path, resolution), extractor, cache, str(path), report)
    held = members(path)
    if is_pack(held):
        return load_pack(path)
    needs: set[str] = {METRICS[name].needs for name in check_metrics(names) if not METRICS[name].alone}
    if {"mu", "sigma"} <= held:
        return _adm(path, held, needs, extractor, cache, report)
    if "arr_0" in held:
        return describe(NpzImages(path), extractor, cache, str(path), report)
    raise DataError(
        f"{path} holds {', '.join(sorted(held)) or 'nothing'}",
        allowed="an ADM .npz (mu, sigma, arr_0), images (arr_0), or a pack of flowturbo-eval reference",
    )


def _adm(
    path: Path, held: set[str], needs: set[str], extractor: Extractor, cache: Path | None, report: Report | None
) -> Described:
    """ADM's statistics, and features of its images only where precision, recall or KID ask for them."""
    if extractor.name != INCEPTION:
        raise DataError(
            f"the statistics in {path} are of the {INCEPTION} network, the extractor is {extractor.name}",
            allowed="--features inception",
            remedy="or make a pack of a folder of images: flowturbo-eval reference",
        )
    population = Population(0)
    if "features" in needs and "arr_0" in held:
        population = describe(NpzImages(path), extractor, cache, str(path), report).population
    count = population.count or (read_header(open_member(path, "arr_0"))[0][0] if "arr_0" in held else 0)
    population.count = count
    population.moments = _moments(path, "mu", "sigma") if "moments" in needs else None
    population.spatial = _moments(path, "mu_s", "sigma_s") if "spatial" in needs and "mu_s" in held else None
    return Described(population, Origin(str(path), count, extractor.name, extractor.hash))


def _moments(path: Path, mean: str, covariance: str) -> Moments:
    # How many images they were made of is not in the file; with a count of 2 the covariance stays as it is.
    return Moments.known(2, _member(path, mean), _member(path, covariance))


def _member(path: Path, name: str) -> NDArray[np.float64]:
    """One array of an archive, without the others."""
    with open_member(path, name) as stream:
        shape, dtype = read_header(stream)
        if dtype.kind != "f":
            raise DataError(f"{path}: {name} is {dtype}", allowed="floating-point statistics")
        values = np.empty(shape, dtype)
        view, filled = values.data.cast("B"), 0
        while part := stream.read(_PART_BYTES):  # no second copy of a large matrix
            view[filled : filled + len(part)] = part
            filled += len(part)
        if filled < values.nbytes:
            raise DataError(f"{path} ends in the middle of {name}", remedy="copy or download it again")
    return values.astype(np.float64, copy=False)
