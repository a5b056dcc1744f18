"""Cached latents: every photograph encoded once, upright and mirrored, so that training never runs the encoder again.

A cache is a folder of memory-mapped safetensors shards and a manifest. It holds the posterior's mean and standard
deviation, scaled for the sampler. So every epoch still draws new latents. `OnTheFlyLatents` encodes photographs when
they are shown, for data that are too large for a cache.

Letters: B images, n photographs of a shard, C latent channels, H = W latent side.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowturbo.data.photographs import Photographs, select_classes, select_subset
from flowturbo.models.vae import Vae
from runtime.system.errors import DataError
from runtime.system.files import make_folder, write_atomically, write_json
from runtime.system.json_codec import from_json
from runtime.system.locks import LOCK_FILE, hold_lock
from runtime.system.progress import SILENT, Progress

CACHE_MANIFEST = "manifest.json"
CACHE_VERSION = 1
STAMPS = "stamps"
"""Tensor of a shard: [n, 2] bytes and time of change, in nanoseconds, of each photograph when it was read."""


@dataclass(frozen=True)
class CacheManifest:
    """What a latent cache was made of.

    Attributes:
        data: folder of the photographs.
        resolution: their side in pixels.
        vae: name or folder of the encoder.
        scaling_factor, latents_mean, latents_std: of this VAE; the latents are scaled by them.
        shape: (C, H, W).
        photographs: their number.
        shard: photographs per shard (the last one may hold fewer, and corrupt ones are missing).
        fraction, classes, seed: which part of `data` was taken.
        names: folder name of each label.
        files_sha256: of the names of the photographs, in order.
        corrupt: files that could not be read; filled when the cache is complete.
        complete: whether every shard is written.
        version: of this layout.
    """

    data: str
    resolution: int
    vae: str
    scaling_factor: float
    shape: tuple[int, ...]
    photographs: int
    shard: int
    fraction: float = 1.0
    classes: tuple[str, ...] = ()
    seed: int = 0
    names: dict[str, str] | None = None
    files_sha256: str = ""
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    corrupt: tuple[str, ...] = ()
    complete: bool = False
    version: int = CACHE_VERSION


def is_cache(folder: Path) -> bool:
    """Whether the folder holds latents, finished or not."""
    return (folder / CACHE_MANIFEST).is_file()


def _shard_path(folder: Path, first: int) -> Path:
    return folder / f"latents-{first:08d}.safetensors"


def build_cache_manifest(photographs: Photographs, vae: Vae, vae_name: str, shard: int = 0) -> CacheManifest:
    """Return what a cache of these photographs through this VAE is made of.

    Raises:
        DataError: the resolution is no whole number of latents.
    """
    if photographs.resolution % vae.factor:
        raise DataError(
            f"--resolution {photographs.resolution} with a VAE of {vae.factor} pixels per latent",
            allowed=f"multiples of {vae.factor}",
            remedy=f"e.g. --resolution {max(1, photographs.resolution // vae.factor) * vae.factor}",
        )
    side, listing = photographs.resolution // vae.factor, photographs.listing
    return CacheManifest(
        data=str(listing.root),
        resolution=photographs.resolution,
        vae=vae_name,
        scaling_factor=vae.scaling,
        shape=(vae.channels, side, side),
        photographs=len(photographs),
        shard=shard,
        fraction=listing.fraction,
        classes=listing.classes,
        seed=listing.seed,
        names={str(label): name for label, name in listing.names.items()},
        files_sha256=listing.files_sha256,
        latents_mean=vae.mean,
        latents_std=vae.std,
    )


@torch.no_grad()
def build_cache(
    folder: Path,
    photographs: Photographs,
    vae: Vae,
    vae_name: str,
    *,
    shard: int = 2048,
    batch_size: int = 64,
    process: int = 0,
    processes: int = 1,
    wait: Callable[[], None] = lambda: None,
    progress: Progress = SILENT,
) -> CacheManifest:
    """Encode all photographs; shards of an interrupted call are not written again.

    Args:
        folder: of the cache.
        photographs: what is encoded.
        vae: the encoder.
        vae_name: its name or folder, for the manifest.
        shard: photographs per file.
        batch_size: photographs of one call of the encoder.
        process, processes: this process writes every `processes`-th shard, from number `process` on.
        wait: returns when all processes have called it.
        progress: gets the number of photographs that are done.

    Raises:
        DataError: the folder holds a cache of something else, or no photograph can be read.
        OutputError: another process writes the cache, or a file cannot be written.
    """
    manifest = build_cache_manifest(photographs, vae, vae_name, shard)
    make_folder(folder)
    if _is_complete(folder, manifest, photographs.listing.paths):
        return read_cache_manifest(folder)
    busy = f"another process is writing the latents in {folder}"
    remedy = "wait for it, or name another --out"
    with hold_lock(folder / LOCK_FILE, busy=busy, remedy=remedy) if process == 0 else nullcontext():
        wait()
        if process == 0:
            write_json(folder / CACHE_MANIFEST, asdict(manifest))
        firsts = range(0, len(photographs), shard)
        for first in firsts[process::processes]:
            last = min(first + shard, len(photographs))
            if _read_unreadable(_shard_path(folder, first)) is None:
                _write_shard(_shard_path(folder, first), photographs, vae, range(first, last), batch_size)
            progress.update("encoded", last, len(photographs))
        wait()
        corrupt = [name for first in firsts for name in _read_unreadable(_shard_path(folder, first)) or ()]
        if len(corrupt) == len(photographs):
            raise DataError(
                f"none of the {len(photographs)} photographs below {photographs.listing.root} can be read",
                allowed="JPEG, PNG, WebP or BMP files",
                remedy="check the files with an image viewer",
            )
        manifest = replace(manifest, corrupt=tuple(sorted(corrupt)), complete=True)
        if process == 0:
            write_json(folder / CACHE_MANIFEST, asdict(manifest))
        wait()
        return manifest


def _read_unreadable(shard: Path) -> list[str] | None:
    """Return the corrupt files that a shard names; None for a missing or damaged shard."""
    try:
        with safe_open(shard, framework="pt") as file:
            unreadable: list[str] = json.loads((file.metadata() or {}).get("skipped", "[]"))
    except (OSError, SafetensorError):
        return None
    return unreadable


def _is_complete(folder: Path, manifest: CacheManifest, paths: Sequence[Path]) -> bool:
    """Return whether this cache is complete and every shard readable.

    Raises:
        DataError: it is of something else, or the photographs at `paths` have changed since.
    """
    if not is_cache(folder):
        return False
    existing = read_cache_manifest(folder)
    names = ["data", "resolution", "vae", "scaling_factor", "photographs", "shard", "fraction", "classes", "seed"]
    names += ["latents_mean", "latents_std"]
    names += ["files_sha256"] if existing.files_sha256 else []  # which caches of earlier versions do not have
    different = [name for name in names if getattr(existing, name) != getattr(manifest, name)]
    if different:
        raise DataError(
            f"{folder} holds latents of something else: {', '.join(different)} differ",
            allowed="an empty folder, or an unfinished cache of the same data and VAE",
            remedy="name another folder with --out, or remove this one",
        )
    _check_photographs(folder, existing, paths)
    # A disk may have lost a shard of a finished cache: it is written again.
    firsts = range(0, existing.photographs, existing.shard)
    return existing.complete and all(_read_unreadable(_shard_path(folder, first)) is not None for first in firsts)


def _check_photographs(folder: Path, manifest: CacheManifest, paths: Sequence[Path]) -> None:
    """Check that the photographs at `paths` are those that the shards were made from, by their sizes and times.

    Raises:
        DataError: some have changed since.
    """
    changed: list[Path] = []
    newer: list[Path] = []
    for first in range(0, manifest.photographs, manifest.shard):
        shard, shard_paths = _shard_path(folder, first), paths[first : first + manifest.shard]
        if _read_unreadable(shard) is None:
            continue
        with safe_open(shard, framework="pt") as file:
            stamps = file.get_tensor(STAMPS).tolist() if STAMPS in file.keys() else None  # noqa: SIM118 - not a dict
        if stamps is None:  # an earlier version wrote it
            shard_time = shard.stat().st_mtime_ns
            newer += [path for path in shard_paths if _read_stamp(path)[1] > shard_time]
        else:
            pairs = zip(shard_paths, map(tuple, stamps), strict=False)
            changed += [path for path, stamp in pairs if stamp not in ((0, 0), _read_stamp(path))]
    if changed:
        raise DataError(
            f"{len(changed)} photographs have changed since their latents in {folder} were made, e.g. {changed[0]}",
            allowed="the photographs that they were made from, with the same sizes and times",
            remedy=f"remove {folder} to encode them again, or name another folder with --out",
        )
    if newer:
        warnings.warn(
            f"{len(newer)} photographs are newer than their latents in {folder}, e.g. {newer[0]}. "
            "Remove that folder to encode them again",
            stacklevel=2,
        )


def _read_stamp(path: Path) -> tuple[int, int]:
    """Return the size of a file in bytes and its time of change in nanoseconds; (−1, −1) if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _write_shard(path: Path, photographs: Photographs, vae: Vae, indices: range, batch_size: int) -> None:
    parts: dict[str, list[Tensor]] = {"mean": [], "std": [], "label": []}
    paths = [photographs.listing.paths[i] for i in indices]
    stamps = [_read_stamp(path) for path in paths]  # before they are read: a change while they are is seen later
    for first in range(indices.start, indices.stop, batch_size):
        readable, pixels = photographs.read_valid(range(first, min(first + batch_size, indices.stop)))
        if len(readable) == 0:
            continue
        images = _scale_pixels(torch.from_numpy(pixels).to(vae.device))
        sides = [vae.encode(side) for side in (images, images.flip(3))]
        parts["mean"].append(torch.stack([mean for mean, _ in sides], dim=1).half().cpu())  # [B, 2, C, H, W]
        parts["std"].append(torch.stack([std for _, std in sides], dim=1).half().cpu())
        parts["label"].append(torch.from_numpy(photographs.labels[readable]))
    if not parts["label"]:  # a shard without a readable photograph has no rows
        side = photographs.resolution // vae.factor
        empty = torch.zeros(0, 2, vae.channels, side, side, dtype=torch.float16)
        parts = {"mean": [empty], "std": [empty.clone()], "label": [torch.zeros(0, dtype=torch.int64)]}
    unreadable = [str(path) for path in paths if path in photographs.corrupt]
    # Sizes and times are a tensor, as metadata of two keys are written in any order: [n, 2], 0 for what is corrupt.
    stamps = [(0, 0) if path in photographs.corrupt else stamp for path, stamp in zip(paths, stamps, strict=True)]
    with write_atomically(path) as aside:
        shard = {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}
        shard[STAMPS] = torch.tensor(stamps, dtype=torch.int64)
        save_file(shard, aside, metadata={"skipped": json.dumps(unreadable)})


def _scale_pixels(pixels: Tensor) -> Tensor:
    """Return 8-bit [B, R, R, 3] as float32 [B, 3, R, R] in 0 … 1."""
    return pixels.permute(0, 3, 1, 2) / 255


def read_cache_manifest(folder: Path) -> CacheManifest:
    """Return the manifest of a cache.

    Raises:
        DataError: no cache is there, or one that cannot be read.
    """
    try:
        raw = json.loads((folder / CACHE_MANIFEST).read_text(encoding="utf-8"))
        if raw.get("version") != CACHE_VERSION:
            raise DataError(
                f"{folder} is a latent cache of version {raw.get('version')}",
                allowed=f"version {CACHE_VERSION}",
                remedy="make it again: flowturbo-train cache-latents",
            )
        return from_json(CacheManifest, raw)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder} is not a latent cache: {error}",
            allowed=f"a folder with {CACHE_MANIFEST} written by cache-latents",
            remedy="make one: flowturbo-train cache-latents --data PHOTOGRAPHS --out DIR",
        ) from error


RawBatch = tuple[Tensor, ...]
"""What a source reads for a batch, in host memory; `sample` makes latents of it on the device."""


class LatentSource(Protocol):
    """Where training gets latents from: a cache, or photographs and an encoder.

    Attributes:
        manifest: what they are latents of.
        labels: [number of items] class of each.
    """

    manifest: CacheManifest
    labels: NDArray[np.int64]

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> tuple[RawBatch, NDArray[np.int64]]:
        """Return what `sample` needs of some items, upright or mirrored, and their labels [B]."""

    def sample(self, raw: RawBatch, noise: Tensor) -> Tensor:
        """Return scaled latents, drawn from the posteriors with `noise` [B, C, H, W]: float32 [B, C, H, W]."""

    def to(self, device: torch.device) -> None:
        """Move what `sample` needs to the device on which it will be called."""

    def describe(self) -> dict[str, object]:
        """Return what a run records of its data."""

    def list_unreadable(self) -> dict[str, str]:
        """Return the files that could not be read so far, and why."""


class CachedLatents:
    """A finished cache: posterior samples by index, memory-mapped.

    Raises:
        DataError: no cache, an unfinished one, or a missing or damaged shard; no such class or fraction.
    """

    def __init__(self, folder: Path, *, fraction: float = 1.0, classes: Sequence[str] = (), seed: int = 0) -> None:
        self.folder, self.manifest = folder, read_cache_manifest(folder)
        self.fraction, self.classes, self.seed = fraction, tuple(classes), seed
        if not self.manifest.complete:
            raise DataError(
                f"{folder} is an unfinished latent cache",
                allowed="a finished one",
                remedy="run the same cache-latents command again; it goes on where it stopped",
            )
        firsts = range(0, self.manifest.photographs, self.manifest.shard)
        try:
            shards = [load_file(_shard_path(folder, first)) for first in firsts]
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{folder} misses a shard or has a damaged one: {error}",
                allowed="every shard that cache-latents wrote",
                remedy="run the same cache-latents command again: it writes that shard again",
            ) from error
        self._means, self._stds = [s["mean"] for s in shards], [s["std"] for s in shards]
        self._starts = np.cumsum([0, *(len(s["label"]) for s in shards)])
        labels = np.concatenate([s["label"].numpy() for s in shards])
        # Rows of the chosen classes and fraction: without corrupt files, those that `list_photographs` would take.
        names = {int(label): name for label, name in (self.manifest.names or {}).items()}
        items = [np.zeros(0, dtype=np.int64)]
        for label in sorted(select_classes(names, self.classes, folder)):
            label_items = np.flatnonzero(labels == label)
            items.append(label_items[select_subset(len(label_items), fraction, seed, label)])
        self._items = np.concatenate(items)
        self.labels: NDArray[np.int64] = labels[self._items]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> tuple[RawBatch, NDArray[np.int64]]:
        items, sides = self._items[indices], mirrored.astype(np.int64)
        shards = np.searchsorted(self._starts, items, side="right") - 1
        mean = torch.empty((len(items), *self.manifest.shape), dtype=torch.float16)
        std = torch.empty_like(mean)
        for shard in np.unique(shards):
            in_shard = np.flatnonzero(shards == shard)
            location = torch.from_numpy(items[in_shard] - self._starts[shard]), torch.from_numpy(sides[in_shard])
            mean[in_shard], std[in_shard] = self._means[shard][location], self._stds[shard][location]
        return (mean, std), self.labels[indices]

    def sample(self, raw: RawBatch, noise: Tensor) -> Tensor:
        mean, std = raw
        return mean.float() + std.float() * noise

    def to(self, device: torch.device) -> None: ...

    def describe(self) -> dict[str, object]:
        return {
            "latents": str(self.folder.resolve()),
            "items": len(self),
            "fraction": self.fraction,
            "classes": list(self.classes),
            "fraction_seed": self.seed,
            "manifest": asdict(self.manifest),
        }

    def list_unreadable(self) -> dict[str, str]:
        return dict.fromkeys(self.manifest.corrupt, "could not be read when the latents were cached")


class OnTheFlyLatents:
    """Posterior samples of photographs that are encoded whenever they are shown.

    This costs an encoder's pass per sample and epoch, and no disk space. An SD VAE's pass costs more than training a
    SiT-B/2 on the sample. It is for data that are shown once, or too large for a cache.
    """

    def __init__(self, photographs: Photographs, vae: Vae, vae_name: str) -> None:
        self.photographs, self.vae = photographs, vae
        self.manifest, self.labels = build_cache_manifest(photographs, vae, vae_name), photographs.labels

    def __len__(self) -> int:
        return len(self.photographs)

    def read(self, indices: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> tuple[RawBatch, NDArray[np.int64]]:
        pixels, labels = self.photographs.read_batch(indices)
        pixels[mirrored] = pixels[mirrored, :, ::-1]
        return (torch.from_numpy(pixels),), labels

    @torch.no_grad()
    def sample(self, raw: RawBatch, noise: Tensor) -> Tensor:
        with torch.autocast(noise.device.type, enabled=False):  # SD's encoders overflow or drift in 16 bit
            mean, std = self.vae.encode(_scale_pixels(raw[0]))
        return mean + std * noise

    def to(self, device: torch.device) -> None:
        self.vae.module.to(device)

    def describe(self) -> dict[str, object]:
        return {**self.photographs.listing.describe(), "encoded": "on the fly", "manifest": asdict(self.manifest)}

    def list_unreadable(self) -> dict[str, str]:
        return self.photographs.list_unreadable()
