"""The commands of `flowturbo-eval`, one function each, on paths and plain values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.load_options import LoadOptions
from flowturbo.evaluation.quality.engine_images import EngineImages
from flowturbo.evaluation.quality.image_files import FolderImages, ImageSource, NpzImages, list_members
from flowturbo.evaluation.quality.metrics import (
    METRICS,
    Moments,
    Population,
    check_metrics,
    compute_inception_score,
    compute_metrics,
    describe_noise,
    find_missing_images,
)
from flowturbo.evaluation.quality.populations import (
    FeatureCache,
    ImageSet,
    Origin,
    check_same_extractor,
    is_pack,
    load_pack,
    measure_image_set,
    save_pack,
)
from flowturbo.evaluation.quality.references import ExtractorOptions, load_reference, make_extractor_error
from flowturbo.evaluation.quality.sampled_latents import SampledLatents, make_balanced_draw
from runtime.directory.manifest import MANIFEST_FILE
from runtime.pipeline import Pipeline
from runtime.request import RequestOptions, resolve_vae
from runtime.system.errors import DataError, RequestError
from runtime.system.files import make_folder
from runtime.system.progress import Progress

_NEEDS = {
    "moments": "features of samples and reference",
    "features": "features of samples and reference",
    "spatial": "spatial features of both, which a pack has, and an extractor such as demo or inception gives",
    "score": "class probabilities of the samples: --probs, or an extractor that gives them",
}
"""Descriptions of `Metric.needs` for users."""
Summary = dict[str, Any]
"""Result of a command, as JSON data."""


def score_features(samples: Path, reference: Path | None, probabilities: Path | None, names: Sequence[str]) -> Summary:
    """Return the metrics of .npy features or packs, by name, with the numbers of images."""
    sample_set = _load_features(samples)
    reference_set = None if reference is None else _load_features(reference)
    if probabilities is not None:
        class_probabilities = _read_feature_array(probabilities)
        if (class_probabilities < 0).any() or not np.allclose(class_probabilities.sum(axis=1), 1, atol=1e-3):
            raise DataError(f"{probabilities} holds no probabilities", allowed="rows that add up to 1, none below 0")
        sample_set.population.score = compute_inception_score(class_probabilities)
    if reference_set is not None:
        check_same_extractor([sample_set, reference_set])
        sizes = [
            len(image_set.population.moments.mean)
            for image_set in (sample_set, reference_set)
            if image_set.population.moments
        ]
        if len(set(sizes)) > 1:
            raise DataError(f"{sizes[0]} and {sizes[1]} features a row", allowed="features of one extractor")
    values = _compute_required_metrics(
        sample_set.population, None if reference_set is None else reference_set.population, names
    )
    notes = _describe_numbers(
        values, sample_set.population, None if reference_set is None else reference_set.population
    )
    return {
        "samples": sample_set.origin.count,
        "reference": None if reference_set is None else reference_set.origin.count,
        **values,
        **({"notes": notes} if notes else {}),
    }


def _load_features(path: Path) -> ImageSet:
    if path.suffix == ".npz" and is_pack(list_members(path)):
        return load_pack(path)
    array = _read_feature_array(path)
    return ImageSet(Population(len(array), Moments.from_features(array), array), Origin(str(path), len(array)))


def _read_feature_array(path: Path) -> NDArray[np.float64]:
    allowed = "a .npy file of one array [N, E] of finite numbers with N ≥ 2"
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise DataError(f"{path} cannot be read: {error}", allowed=allowed) from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or len(array) < 2:
        shape = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise DataError(f"{path} holds {shape}", allowed=allowed)
    if not np.isfinite(array).all():
        raise DataError(f"{path} holds NaN or infinity", allowed=allowed)
    return np.asarray(array, np.float64)


def _open_image_source(path: Path, resolution: int | None) -> ImageSource:
    return NpzImages(path) if path.is_file() else FolderImages(path, resolution)


def make_reference(
    data: Path,
    out: Path,
    *,
    extractor_options: ExtractorOptions,
    resolution: int | None,
    name: str | None,
    cache: Path | None,
    progress: Progress,
) -> Summary:
    """Write a reference pack; return what is in it."""
    if extractor_options.features is None:
        raise make_extractor_error(data)
    source = _open_image_source(data, resolution)
    with extractor_options.open(data) as extractor:
        image_set = measure_image_set(source, extractor, cache, name or data.name, progress)
    save_pack(out, image_set)
    features = image_set.population.features
    return {
        "out": str(out),
        "count": image_set.origin.count,
        "kept": 0 if features is None else len(features),
        "extractor": image_set.origin.extractor,
        "extractor_hash": image_set.origin.extractor_hash,
        "bytes": out.stat().st_size,
    }


@dataclass(frozen=True)
class EngineOptions:
    """How an engine directory makes the samples.

    Attributes:
        sampler: its keyword arguments of `Pipeline.request`.
        num, seed: images to make; seed of the first.
        vae, resolution: the directory's first if None.
    """

    sampler: RequestOptions
    num: int | None
    seed: int
    vae: str | None
    resolution: int | None
    load_options: LoadOptions

    def list_flags(self) -> list[str]:
        """Return the options that only an engine directory uses, where they are given."""
        load_options = {name: value for name, value in self.load_options.items() if name != "threads"}
        options = {"num": self.num, "seed": self.seed or None, "vae": self.vae, "engine-resolution": self.resolution}
        given = [name for name, value in {**options, **load_options}.items() if value not in (None, False)]
        return [f"--{name.replace('_', '-')}" for name in (*given, *self.sampler)]


def score_images(
    samples: Path,
    reference: Path,
    *,
    extractor_options: ExtractorOptions,
    resolution: int | None,
    names: Sequence[str],
    cache: Path | None,
    shard: tuple[int, int] | None,
    engine_options: EngineOptions,
    progress: Progress,
) -> Summary | None:
    """Return the metrics of a set of images, and all that they depend on; None for a shard, which only makes its part.

    Raises:
        FlowTurboError: something is missing or does not fit; checks come before the work where they can.
    """
    check_metrics(names)
    threads = engine_options.load_options.get("threads")
    with extractor_options.open(reference, threads) as extractor, ExitStack() as stack:
        if (samples / MANIFEST_FILE).exists():
            load_options: LoadOptions = {**engine_options.load_options, "decode_tile": None}
            pipeline = stack.enter_context(Pipeline.load(samples, resolution=engine_options.resolution, **load_options))
            if engine_options.num is None:
                raise RequestError(
                    "engines without --num", remedy="say how many images to make, for example --num 2000"
                )
            variant = resolve_vae(pipeline.manifest, engine_options.vae)
            if variant is None:
                raise RequestError("this directory has no decoder", remedy="rebuild it with --vae")
            draw = make_balanced_draw(sorted(pipeline.manifest.model.classes), engine_options.num, engine_options.seed)
            latents = SampledLatents(pipeline, draw, engine_options.sampler, cache and cache / "latents")
            source: ImageSource = EngineImages(pipeline, latents, variant)
        else:
            if flags := engine_options.list_flags():
                raise RequestError(
                    f"{samples} is no engine directory, and {', '.join(flags)} is given",
                    remedy="leave them out for a folder or an .npz",
                )
            source = _open_image_source(samples, resolution)
        if shard is not None:
            if cache is None:
                raise RequestError("a shard without a cache folder", remedy="name one that can be written: --cache DIR")
            for _ in FeatureCache(source, extractor, make_folder(cache)).read_chunks(shard, progress, "samples"):
                pass  # what counts is that it is on disk
            return None
        _check_image_numbers(names, source.count, None)
        reference_set = load_reference(
            reference, extractor, names, resolution=resolution, cache=cache, progress=progress
        )
        _check_image_numbers(names, source.count, reference_set.population)
        sample_set = measure_image_set(
            source, extractor, cache and make_folder(cache), str(samples), progress, "samples"
        )
    check_same_extractor([sample_set, reference_set])
    values = _compute_required_metrics(sample_set.population, reference_set.population, names)
    notes = _describe_numbers(values, sample_set.population, reference_set.population)
    return {
        "samples": str(samples),
        "count": sample_set.origin.count,
        "sampler": dict(engine_options.sampler),
        "reference": reference_set.origin.what,
        "reference_count": reference_set.origin.count,
        "extractor": extractor.name,
        "extractor_hash": extractor.hash,
        "metrics": values,
        **({"notes": notes} if notes else {}),
    }


def _compute_required_metrics(
    samples: Population, reference: Population | None, names: Sequence[str]
) -> dict[str, float]:
    """Return all metrics that can be computed, at least one; or every metric of `names`.

    Raises:
        RequestError: not enough is known of the images.
    """
    _check_image_numbers(names, samples.count, reference)
    values = compute_metrics(samples, reference, names)
    missing = [name for name in names or METRICS if name not in values]
    if missing and (names or not values):
        needs = dict.fromkeys(_NEEDS[METRICS[name].needs] for name in missing)
        raise RequestError(
            f"{', '.join(missing)} cannot be computed of what is given",
            allowed=", ".join(values) or "nothing can",
            remedy=f"give {'; '.join(needs)}",
        )
    return values


def _check_image_numbers(names: Sequence[str], num_samples: int, reference: Population | None) -> None:
    """Refuse named metrics with too few images, and numbers of images with which there is no metric at all."""
    needs = find_missing_images(names, num_samples, None if reference is None else reference.num_known)
    possible = [name for name in METRICS if name not in find_missing_images((), num_samples)]
    if needs and (names or len(needs) == len(METRICS)):
        of_reference = "" if reference is None or not reference.count else f", reference of {reference.count}"
        names_by_need: dict[str, list[str]] = {}
        for name, need in needs.items():
            names_by_need.setdefault(need, []).append(name)
        raise RequestError(
            f"{', '.join(needs)} of {num_samples} image{'s' if num_samples > 1 else ''}{of_reference}",
            allowed="; ".join(f"{need} for {', '.join(group)}" for need, group in names_by_need.items()),
            remedy="give more images" + (f", or --metrics {','.join(possible)}" if possible else ""),
        )


def _describe_numbers(values: dict[str, float], samples: Population, reference: Population | None) -> list[str]:
    """Return the lines under the numbers: which are left out for too few images, and which are mostly noise."""
    needs = find_missing_images((), samples.count, None if reference is None else reference.num_known)
    return [f"{name} –: needs {need}" for name, need in needs.items()] + describe_noise(
        values, samples.count, None if reference is None else reference.count or None
    )


def compare_scores(paths: Sequence[Path]) -> list[Summary]:
    """Read results of `score_images`, if they may stand side by side.

    Raises:
        RequestError: they are of different extractors, references or numbers of images.
    """
    results: list[Summary] = []
    for path in paths:
        try:
            results.append(json.loads(path.read_text(encoding="utf-8")))
            _ = results[-1]["metrics"], results[-1]["samples"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no result of flowturbo-eval score --out", remedy="make it again") from error
    required_equal = {
        "extractors": ("extractor_hash",),
        "sample counts": ("count",),
        "references": ("reference", "reference_count"),
    }
    for quantity, keys in required_equal.items():
        values = [" ".join(str(result.get(key)) for key in keys) for result in results]
        if len(set(values)) > 1:
            raise RequestError(
                f"results of different {quantity}: {', '.join(values)}",
                allowed="one extractor, one reference, one number of images",
                remedy="score them alike: these metrics depend on all three",
            )
    return results


def convert_inception_weights(weights: Path, out: Path) -> None:
    """Convert the public weights to an ONNX file."""
    try:
        from flowturbo.evaluation.quality import convert_extractor
    except ImportError as error:
        raise RequestError(
            f"converting needs torch and onnx ({error.name} is missing)",
            remedy="pip install 'flowturbo[export]', here or on another machine; the ONNX file needs neither",
        ) from error
    convert_extractor.convert_inception(weights, out)
