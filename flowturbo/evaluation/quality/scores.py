"""What `flowturbo-eval` does, one function a command, on paths and plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.progress import Say
from flowturbo.evaluation.quality.engine_images import EngineImages
from flowturbo.evaluation.quality.features import Extractor
from flowturbo.evaluation.quality.image_files import FolderImages, ImageSource, NpzImages, members
from flowturbo.evaluation.quality.metrics import (
    METRICS,
    Moments,
    Population,
    check_metrics,
    compute_metrics,
    inception_score,
)
from flowturbo.evaluation.quality.populations import (
    Described,
    FeatureChunks,
    Origin,
    check_same_extractor,
    describe,
    is_pack,
    load_pack,
    save_pack,
)
from flowturbo.evaluation.quality.references import extractor_for, load_reference, no_extractor
from flowturbo.evaluation.quality.sampled_latents import SampledLatents, balanced_draw
from runtime.directory.manifest import MANIFEST
from runtime.pipeline import Pipeline
from runtime.request import variant_of
from runtime.system.errors import DataError, RequestError
from runtime.system.files import make_folder, write_json

_NEEDS = {
    "moments": "features of samples and reference",
    "features": "features of samples and reference",
    "spatial": "spatial features of both, which a pack has, and an extractor such as demo or inception gives",
    "score": "class probabilities of the samples: --probs, or an extractor that gives them",
}
"""What `Metric.needs` is, for users."""


def metrics_of_features(
    samples: Path, reference: Path | None, probabilities: Path | None, names: Sequence[str]
) -> dict[str, Any]:
    """Metrics of .npy features or packs, by name, with the numbers of images."""
    found = _features(samples)
    other = None if reference is None else _features(reference)
    if probabilities is not None:
        probs = _array(probabilities)
        if (probs < 0).any() or not np.allclose(probs.sum(axis=1), 1, atol=1e-3):
            raise DataError(f"{probabilities} holds no probabilities", allowed="rows that add up to 1, none below 0")
        found.population.score = inception_score(probs)
    if other is not None:
        check_same_extractor([found, other])
        sizes = [len(one.population.moments.mean) for one in (found, other) if one.population.moments]
        if len(set(sizes)) > 1:
            raise DataError(f"{sizes[0]} and {sizes[1]} features a row", allowed="features of one extractor")
    values = _computed(found.population, None if other is None else other.population, names)
    return {"samples": found.origin.count, "reference": None if other is None else other.origin.count, **values}


def _features(path: Path) -> Described:
    if path.suffix == ".npz" and is_pack(members(path)):
        return load_pack(path)
    array = _array(path)
    return Described(Population(len(array), Moments.of(array), array), Origin(str(path), len(array)))


def _array(path: Path) -> NDArray[np.float64]:
    wanted = "a .npy file of one array [N, E] of finite numbers with N ≥ 2"
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}", allowed=wanted) from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or len(array) < 2:
        shape = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise DataError(f"{path} holds {shape}", allowed=wanted)
    if not np.isfinite(array).all():
        raise DataError(f"{path} holds NaN or infinity", allowed=wanted)
    return np.asarray(array, np.float64)


def _images(path: Path, resolution: int | None) -> ImageSource:
    return NpzImages(path) if path.is_file() else FolderImages(path, resolution)


def make_reference(
    data: Path,
    out: Path,
    *,
    features: str | None,
    input_size: int | None,
    input_range: str | None,
    features_provider: str,
    resolution: int | None,
    name: str | None,
    cache: Path | None,
    say: Say,
) -> dict[str, Any]:
    """Writes a pack; gives what is in it."""
    if features is None:
        raise no_extractor(data)
    source = _images(data, resolution)
    with extractor_for(features, data, input_size, input_range, features_provider) as extractor:
        found = describe(source, extractor, cache, name or data.name, lambda done, of: say("features", done, of))
    save_pack(out, found)
    assert found.population.features is not None
    return {
        "out": str(out),
        "count": found.origin.count,
        "kept": len(found.population.features),
        "extractor": found.origin.extractor,
        "extractor_hash": found.origin.extractor_hash,
        "bytes": out.stat().st_size,
    }


def score(
    samples: Path,
    reference: Path,
    *,
    features: str | None,
    input_size: int | None,
    input_range: str | None,
    features_provider: str,
    resolution: int | None,
    names: Sequence[str],
    cache: Path,
    shard: tuple[int, int] | None,
    sampler: Mapping[str, Any],
    num: int | None,
    seed: int,
    vae: str | None,
    engine_resolution: int | None,
    say: Say,
    **loading: Any,
) -> dict[str, Any] | None:
    """Metrics of a set of images, and all that they depend on; None for a shard, which only makes its part.

    Raises:
        FlowTurboError: something is missing or does not fit; what can be known beforehand is said before the work.
    """
    check_metrics(names)
    with (
        extractor_for(
            features, reference, input_size, input_range, features_provider, loading.get("threads")
        ) as extractor,
        ExitStack() as stack,
    ):
        if (samples / MANIFEST).exists():
            pipeline = stack.enter_context(
                Pipeline.load(samples, resolution=engine_resolution, decode_tile=None, **loading)
            )
            source: ImageSource = _engine_images(pipeline, sampler, num, seed, vae, cache)
        else:
            asked = {"num": num, "seed": seed or None, "vae": vae, "engine-resolution": engine_resolution, **loading}
            _check_of_engines(samples, [name for name, value in asked.items() if value is not None], sampler)
            source = _images(samples, resolution)
        if shard is not None:
            _make_part(source, extractor, cache, shard, say)
            return None
        other = load_reference(
            reference, extractor, names, resolution=resolution, cache=cache, report=lambda *at: say("reference", *at)
        )
        found = describe(source, extractor, make_folder(cache), str(samples), lambda *at: say("samples", *at))
    check_same_extractor([found, other])
    return {
        "samples": str(samples),
        "count": found.origin.count,
        "sampler": dict(sampler),
        "reference": other.origin.what,
        "reference_count": other.origin.count,
        "extractor": extractor.name,
        "extractor_hash": extractor.hash,
        "metrics": _computed(found.population, other.population, names),
    }


def _check_of_engines(samples: Path, given: Sequence[str], sampler: Mapping[str, Any]) -> None:
    """Refuses what only an engine directory makes use of; threads serve the extractor as well.

    Raises:
        RequestError: something of it was given.
    """
    named = [f"--{name}" for name in (*given, *sampler) if name != "threads"]
    if named:
        raise RequestError(
            f"{samples} is no engine directory, and {', '.join(named)} is given",
            remedy="leave them out for a folder or an .npz",
        )


def _computed(samples: Population, reference: Population | None, names: Sequence[str]) -> dict[str, float]:
    """All metrics that can be computed, at least one; or those of `names`, every one.

    Raises:
        RequestError: what is known of the images does not do for it.
    """
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


def _engine_images(
    pipeline: Pipeline, sampler: Mapping[str, Any], num: int | None, seed: int, vae: str | None, cache: Path
) -> EngineImages:
    if num is None:
        raise RequestError("engines without --num", remedy="say how many images to make, for example --num 2000")
    variant = variant_of(pipeline.manifest, vae)
    if variant is None:
        raise RequestError("this directory has no decoder", remedy="rebuild it with --vae")
    draw = balanced_draw(sorted(pipeline.manifest.model.classes), num, seed)
    return EngineImages(pipeline, SampledLatents(pipeline, draw, sampler, cache / "latents"), variant)


def _make_part(source: ImageSource, extractor: Extractor, cache: Path, shard: tuple[int, int], say: Say) -> None:
    for _ in FeatureChunks(source, extractor, make_folder(cache)).chunks(shard, lambda *at: say("samples", *at)):
        pass  # what counts is that it is on disk


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """A result as JSON, for `compare`."""
    make_folder(path.absolute().parent)
    write_json(path, dict(result))


def compare(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Results of `score`, if they may stand side by side.

    Raises:
        RequestError: they are of different extractors, references or numbers of images.
    """
    results = []
    for path in paths:
        try:
            results.append(json.loads(path.read_text(encoding="utf-8")))
            _ = results[-1]["metrics"], results[-1]["samples"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no result of flowturbo-eval score --out", remedy="make it anew") from error
    sames = {
        "extractors": ("extractor_hash",),
        "sample counts": ("count",),
        "references": ("reference", "reference_count"),
    }
    for what, keys in sames.items():
        values = [" ".join(str(result.get(key)) for key in keys) for result in results]
        if len(set(values)) > 1:
            raise RequestError(
                f"results of different {what}: {', '.join(values)}",
                allowed="one extractor, one reference, one number of images",
                remedy="score them alike: these metrics depend on all three",
            )
    return results


def convert_inception(weights: Path, out: Path) -> None:
    """The public weights to an ONNX file."""
    try:
        from flowturbo.evaluation.quality import convert_extractor
    except ImportError as error:
        raise RequestError(
            f"converting needs torch and onnx ({error.name} is missing)",
            remedy="pip install 'flowturbo[export]', here or on another machine; the ONNX file needs neither",
        ) from error
    convert_extractor.convert_inception(weights, out)
