"""Resolve the options of a build from checkpoints, and compute the key that shows whether anything changed.

Files are hashed here and nothing heavy is imported: an unchanged build must answer within seconds.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from export.doctor import choose_target
from export.lowbit.recipe import EMPTY_RECIPE, Recipe, read_recipe
from export.targets import resolve_graph_precision, resolve_precision
from flowturbo import demo
from flowturbo.checkpoint_shards import find_index, hash_checkpoint
from runtime.directory.records import TARGETS
from runtime.system.errors import CheckpointError, RequestError
from runtime.system.hardware import detect_cpu
from runtime.system.hashes import sha256_cached
from runtime.system.version import VERSION

NONE_OPTION = "none"
MAX_BATCH = 64
DEFAULT_MAX_BATCH = 8
MAX_RESOLUTION = 2048
_VERSIONED_PACKAGES = (
    "torch",
    "onnx",
    "onnxscript",
    "diffusers",
    "onnxruntime",
    "polygraphy",
    "tensorrt",
    "tensorrt-rtx-cu13",
)


@dataclass(frozen=True)
class VaeSource:
    """A VAE and the name its decoder goes by."""

    variant: str
    source: str


@dataclass(frozen=True)
class BuildRequest:
    """A resolved build from checkpoints.

    Attributes:
        predictor, refiner: checkpoint files; refiner is None where there is none.
        vaes: decoders to build; None: those that the predictor's metadata names.
        resolutions: pixels a side; empty: the one the predictor was trained at.
        heads, time_direction, num_classes: facts that a checkpoint's shapes do not show.
        weights: "ema" or "model" of files that hold both; None: the averaged ones where there are some.
        precisions: target → precision.
        max_batch, static_batch: images of an engine call at most, or exactly.
        encoder: whether the VAE's encoder is built too.
        tile: pixels a side of the tiles that large pictures can be decoded in; None for no such decoders.
        inputs: everything above by name, with the hashes of files and the versions of libraries.
        recipe: treatment of single layers, from a calibration and a choice.
    """

    predictor: Path
    refiner: Path | None
    vaes: tuple[VaeSource, ...] | None
    resolutions: tuple[int, ...]
    heads: int | None
    time_direction: str | None
    precisions: dict[str, str]
    max_batch: int
    static_batch: bool
    encoder: bool
    tile: int | None
    inputs: dict[str, str]
    recipe: Recipe = EMPTY_RECIPE
    weights: str | None = None
    num_classes: int | None = None
    allow_foreign: ClassVar[bool] = False

    @property
    def checkpoint_hashes(self) -> dict[str, str]:
        """sha256 of the checkpoints by role, among the other inputs."""
        return self.inputs

    @property
    def graph_precisions(self) -> list[str]:
        """Precisions of the ONNX files that the targets need."""
        return list(
            dict.fromkeys(resolve_graph_precision(target, precision) for target, precision in self.precisions.items())
        )

    @property
    def key(self) -> str:
        """Hash of `inputs`."""
        return hash_inputs(self.inputs)


def hash_inputs(inputs: dict[str, str]) -> str:
    """Return the hash of a build's inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def resolve_request(
    *,
    predictor: Path | None = None,
    refiner: str | None = None,
    vaes: Sequence[str] = (),
    resolutions: Sequence[int] = (),
    heads: int | None = None,
    time_direction: str | None = None,
    weights: str | None = None,
    num_classes: int | None = None,
    targets: Sequence[str] = ("auto",),
    precision: str = "auto",
    max_batch: int = DEFAULT_MAX_BATCH,
    static_batch: bool = False,
    encoder: bool = False,
    tile: int | None = None,
    calibration: Path | None = None,
    choice: Path | None = None,
) -> BuildRequest:
    """Check the options and hash the files they name.

    Raises:
        RequestError: an option is out of range, or options contradict one another.
        CheckpointError: a named file is missing.
    """
    if predictor is None and refiner not in (None, NONE_OPTION):
        raise RequestError(
            "--refiner without --predictor", remedy="name the predictor that the refiner was trained for"
        )
    for resolution in resolutions:
        if not 8 <= resolution <= MAX_RESOLUTION:
            raise RequestError(f"resolution {resolution}", allowed=f"8 to {MAX_RESOLUTION} pixels")
    if heads is not None and heads < 1:
        raise RequestError(f"{heads} heads", allowed="a positive number that divides the width")
    if num_classes is not None and num_classes < 1:
        raise RequestError(f"{num_classes} classes", allowed="the number of classes that the model was trained on")
    if weights not in (None, "ema", "model"):
        raise RequestError(f"weights {weights!r}", allowed="ema, model")
    if not 1 <= max_batch <= MAX_BATCH:
        raise RequestError(f"max batch {max_batch}", allowed=f"1 to {MAX_BATCH}")
    chosen_vaes = _resolve_vaes(predictor is None, vaes)
    if predictor is None:
        predictor = demo.PREDICTOR
        refiner_path = None if refiner == NONE_OPTION else demo.REFINER
    else:
        refiner_path = None if refiner in (None, NONE_OPTION) else Path(str(refiner))
    precisions = resolve_targets(targets, precision)
    inputs = {
        "flowturbo": VERSION,
        "resolutions": ",".join(map(str, resolutions)) or "trained",
        "heads": str(heads),
        "time direction": str(time_direction),
        **({} if weights is None else {"weights": weights}),
        **({} if num_classes is None else {"num classes": str(num_classes)}),
        "precisions": ",".join(f"{t}:{p}" for t, p in precisions.items()),
        "max batch": f"{max_batch}{' static' if static_batch else ''}",
        "encoder": str(encoder),
        **({} if tile is None else {"tile": str(tile)}),
        **_hash_files(predictor, refiner_path, chosen_vaes),
    }
    for package in _VERSIONED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            inputs[package] = importlib.metadata.version(package)
    recipe = read_recipe(calibration, choice, precisions, inputs)
    inputs |= recipe.inputs
    return BuildRequest(
        predictor, refiner_path, chosen_vaes, tuple(dict.fromkeys(resolutions)), heads, time_direction, precisions,
        max_batch, static_batch, encoder, tile, inputs, recipe, weights, num_classes,
    )  # fmt: skip


def resolve_targets(targets: Sequence[str], precision: str) -> dict[str, str]:
    """Return target → precision, with `auto` resolved to the fastest that this machine can run."""
    for target in targets:
        if target not in (*TARGETS, "auto"):
            raise RequestError(f"target {target!r}", allowed=", ".join((*TARGETS, "auto")))
    resolved_targets = [choose_target()[0] if target == "auto" else target for target in targets]
    amx = "amx_bf16" in detect_cpu().features
    return {target: resolve_precision(precision, target, amx=amx) for target in dict.fromkeys(resolved_targets)}


def _resolve_vaes(is_demo: bool, vaes: Sequence[str]) -> tuple[VaeSource, ...] | None:
    """The decoders to build; None for those that the predictor names."""
    if NONE_OPTION in vaes and len(vaes) > 1:
        raise RequestError(
            f"--vae none together with {', '.join(v for v in vaes if v != NONE_OPTION)}", remedy="name VAEs or none"
        )
    if list(vaes) == [NONE_OPTION]:
        return ()
    if is_demo:
        names = vaes or tuple(demo.VAES)
        if all(name in demo.VAES for name in names):
            return tuple(VaeSource(name, str(demo.VAES[name])) for name in names)
    elif not vaes:
        return None
    sources = tuple(VaeSource(Path(name).name if "/" in name else name, name) for name in vaes)
    if len({source.variant for source in sources}) < len(sources):
        raise RequestError(f"VAEs {', '.join(vaes)} share a name", remedy="rename one of the folders")
    return sources


def _hash_files(predictor: Path, refiner: Path | None, vaes: tuple[VaeSource, ...] | None) -> dict[str, str]:
    hashes = {}
    for role, path in (("predictor", predictor), ("refiner", refiner)):
        if path is None:
            hashes[role] = NONE_OPTION
            continue
        if not path.is_file() and find_index(path) is None:
            folder_hint = ", which is a folder" if path.is_dir() else ""
            raise CheckpointError(
                f"no {role} checkpoint at {path}{folder_hint}",
                allowed="a .pt or .safetensors file, or a folder of shards with their *.index.json",
                remedy="check the path",
            )
        hashes[role] = hash_checkpoint(path)
    for vae in vaes or ():
        folder = Path(vae.source)
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        hashes[f"vae {vae.variant}"] = " ".join(
            [vae.source if not files else "", *(sha256_cached(f) for f in files if f.is_file())]
        )
    if vaes is None:
        hashes["vae"] = "the predictor's"
    return hashes
