"""Load what samples are compared with: a folder of images, an ADM .npz, or a pack. Only what is needed is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.quality.features import EXTRACTORS, INCEPTION, PIXEL_RANGES, Extractor, open_extractor
from flowturbo.evaluation.quality.image_files import (
    FolderImages,
    NpzImages,
    list_members,
    open_array,
)
from flowturbo.evaluation.quality.metrics import METRICS, Moments, Population, check_metrics
from flowturbo.evaluation.quality.populations import ImageSet, Origin, is_pack, load_pack, measure_image_set
from runtime.backends.onnxruntime import PROVIDERS
from runtime.system.errors import DataError, RequestError
from runtime.system.option_fields import option
from runtime.system.progress import SILENT, Progress

_READ_BYTES = 1 << 20


def find_default_features(reference: Path) -> str:
    """Return the name of the registered extractor that a reference was made with.

    Raises:
        RequestError: it cannot be known.
    """
    member_names = set() if reference.is_dir() else list_members(reference)
    name = (
        load_pack(reference).origin.extractor if is_pack(member_names) else INCEPTION if "mu" in member_names else None
    )
    known_names = {INCEPTION: "inception", **{key: key for key in EXTRACTORS}}
    if name not in known_names:
        raise make_extractor_error(reference)
    return known_names[name]


def make_extractor_error(path: Path) -> RequestError:
    """Return the error for a reference whose extractor is neither named nor known."""
    allowed = f"{', '.join(EXTRACTORS)}, or an ONNX file with --input-size"
    return RequestError(f"no extractor named for {path}", allowed=allowed, remedy="name one with --features")


@dataclass(frozen=True)
class ExtractorOptions:
    """Which extractor to use; see `open_extractor`. `features` is the reference's extractor if None."""

    features: str | None = option(
        None, help=f"{', '.join(EXTRACTORS)}, or an ONNX file with one image input.", default_text="the reference's"
    )
    input_size: int | None = option(
        None, help="Pixels a side of an ONNX file that takes any.", minimum=1, advanced=True
    )
    input_range: str | None = option(
        None, help="What 0 … 255 become for it.", choices=tuple(PIXEL_RANGES), default_text="0..1", advanced=True
    )
    provider: str = option("cpu", "--features-provider", help="Runs it.", choices=tuple(PROVIDERS), advanced=True)

    def open(self, reference: Path, threads: int | None = None) -> Extractor:
        """Open the extractor that was named, or the one that the reference was made with."""
        return open_extractor(
            self.features or find_default_features(reference),
            input_size=self.input_size,
            input_range=self.input_range,
            provider=self.provider,
            threads=threads,
        )


def load_reference(
    path: Path,
    extractor: Extractor,
    names: Sequence[str] = (),
    *,
    resolution: int | None = None,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> ImageSet:
    """Load a reference, with as much as the metrics `names` need (all if empty).

    Args:
        resolution: for a folder of images of several sizes.
        cache: folder of the features of images.

    Raises:
        DataError: nothing there that can be a reference.
    """
    if path.is_dir():
        return measure_image_set(FolderImages(path, resolution), extractor, cache, str(path), progress, "reference")
    member_names = list_members(path)
    if is_pack(member_names):
        return load_pack(path)
    needs: set[str] = {METRICS[name].needs for name in check_metrics(names) if not METRICS[name].needs_samples_only}
    if {"mu", "sigma"} <= member_names:
        return _load_adm_statistics(path, member_names, needs, extractor, cache, progress)
    if "arr_0" in member_names:
        return measure_image_set(NpzImages(path), extractor, cache, str(path), progress, "reference")
    raise DataError(
        f"{path} holds {', '.join(sorted(member_names)) or 'nothing'}",
        allowed="an ADM .npz (mu, sigma, arr_0), images (arr_0), or a pack of flowturbo-eval reference",
    )


def _load_adm_statistics(
    path: Path,
    member_names: set[str],
    needs: set[str],
    extractor: Extractor,
    cache: Path | None,
    progress: Progress,
) -> ImageSet:
    """Read ADM's statistics, and features of its images only where precision, recall or KID need them."""
    if extractor.name != INCEPTION:
        raise DataError(
            f"the statistics in {path} are of the {INCEPTION} network, the extractor is {extractor.name}",
            allowed="--features inception",
            remedy="or make a pack of a folder of images: flowturbo-eval reference",
        )
    population = Population(0)
    if "features" in needs and "arr_0" in member_names:
        population = measure_image_set(NpzImages(path), extractor, cache, str(path), progress, "reference").population
    count = population.count or (open_array(path, "arr_0")[1][0] if "arr_0" in member_names else 0)
    population.count = count
    population.moments = _read_adm_moments(path, "mu", "sigma") if "moments" in needs else None
    population.spatial = (
        _read_adm_moments(path, "mu_s", "sigma_s") if "spatial" in needs and "mu_s" in member_names else None
    )
    return ImageSet(population, Origin(str(path), count, extractor.name, extractor.hash))


def _read_adm_moments(path: Path, mean: str, covariance: str) -> Moments:
    # The file has no number of images; with a count of 2 the covariance stays as it is.
    return Moments.from_statistics(2, _read_member(path, mean), _read_member(path, covariance))


def _read_member(path: Path, name: str) -> NDArray[np.float64]:
    """Read one array of an archive, without the others."""
    stream, shape, dtype = open_array(path, name)
    with stream:
        if dtype.kind != "f":
            raise DataError(f"{path}: {name} is {dtype}", allowed="floating-point statistics")
        values = np.empty(shape, dtype)
        view, filled = values.data.cast("B"), 0
        while part := stream.read(_READ_BYTES):  # no second copy of a large matrix
            view[filled : filled + len(part)] = part
            filled += len(part)
        if filled < values.nbytes:
            raise DataError(f"{path} ends in the middle of {name}", remedy="copy or download it again")
    return values.astype(np.float64, copy=False)
