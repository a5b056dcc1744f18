"""Cached latents: every photograph encoded once, upright and mirrored, so that training never runs the encoder again.

A cache is a folder of memory-mapped safetensors shards and a manifest. It holds the posterior's mean and standard
deviation, scaled for the sampler, not a sample of it, so that every epoch still draws new latents.

Letters: B images, n photographs of a shard, C latent channels, H = W latent side.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowturbo.data import Photographs
from flowturbo.models.vae import Vae
from runtime.errors import DataError
from runtime.files import make_folder, replacing, write_json

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a latent cache was made of.

    Attributes:
        shard: photographs per shard (the last one may hold fewer, and corrupt ones are missing).
        vae: name or folder of the encoder; `scaling_factor` is its own.
        fraction, classes, seed: which part of `data` was taken.
        names: folder name of each label.
        corrupt: files that could not be read; filled when the cache is complete.
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
    corrupt: tuple[str, ...] = ()
    complete: bool = False
    version: int = VERSION


def is_cache(folder: Path) -> bool:
    """Whether the folder holds latents, finished or not."""
    return (folder / MANIFEST).is_file()


def _shard_path(folder: Path, first: int) -> Path:
    return folder / f"latents-{first:08d}.safetensors"


@torch.no_grad()
def build_cache(
    folder: Path,
    photographs: Photographs,
    vae: Vae,
    vae_name: str,
    *,
    fraction: float = 1.0,
    classes: tuple[str, ...] = (),
    seed: int = 0,
    shard: int = 2048,
    batch_size: int = 64,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Encodes all photographs; shards that are already there, from an interrupted call, are kept.

    Raises:
        DataError: the folder holds a cache of something else, or no photograph can be read.
    """
    side = photographs.resolution // vae.factor
    manifest = Manifest(
        data=str(photographs.listing.root),
        resolution=photographs.resolution,
        vae=vae_name,
        scaling_factor=vae.scaling,
        shape=(vae.channels, side, side),
        photographs=len(photographs),
        shard=shard,
        fraction=fraction,
        classes=classes,
        seed=seed,
        names={str(label): name for label, name in photographs.listing.names.items()},
    )
    make_folder(folder)
    _check_same(folder, manifest)
    write_json(folder / MANIFEST, asdict(manifest))
    for first in range(0, len(photographs), shard):
        last = min(first + shard, len(photographs))
        if not _shard_path(folder, first).exists():
            _write_shard(_shard_path(folder, first), photographs, vae, range(first, last), batch_size)
        report(last, len(photographs))
    manifest = Manifest(
        **{**asdict(manifest), "corrupt": tuple(str(p) for p in sorted(photographs.corrupt)), "complete": True}
    )
    write_json(folder / MANIFEST, asdict(manifest))
    return manifest


def _check_same(folder: Path, manifest: Manifest) -> None:
    if not is_cache(folder):
        return
    there = read_manifest(folder)
    names = [f for f in ("data", "resolution", "vae", "scaling_factor", "photographs", "shard", "fraction", "seed")]
    different = [name for name in names if getattr(there, name) != getattr(manifest, name)]
    if different:
        raise DataError(
            f"{folder} holds latents of something else: {', '.join(different)} differ",
            allowed="an empty folder, or an unfinished cache of the same data and VAE",
            remedy="name another folder with --out, or remove this one",
        )


def _write_shard(path: Path, photographs: Photographs, vae: Vae, indices: range, batch_size: int) -> None:
    parts: dict[str, list[Tensor]] = {"mean": [], "std": [], "label": []}
    for first in range(indices.start, indices.stop, batch_size):
        found, pixels = photographs.readable(range(first, min(first + batch_size, indices.stop)))
        if len(found) == 0:
            continue
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        sides = [vae.encode(side) for side in (images, images.flip(3))]
        parts["mean"].append(torch.stack([mean for mean, _ in sides], dim=1).half())  # [B, 2, C, H, W]
        parts["std"].append(torch.stack([std for _, std in sides], dim=1).half())
        parts["label"].append(torch.from_numpy(photographs.labels[found]))
    if not parts["label"]:
        raise DataError(
            f"photographs {indices.start} to {indices.stop} below {photographs.listing.root} are all corrupt",
            allowed="at least one readable photograph per shard",
            remedy="check the files with an image viewer",
        )
    with replacing(path) as aside:
        save_file({name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}, aside)


def read_manifest(folder: Path) -> Manifest:
    """Raises DataError: no cache there, or one that cannot be read."""
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if raw.get("version") != VERSION:
            raise DataError(
                f"{folder} is a latent cache of version {raw.get('version')}",
                allowed=f"version {VERSION}",
                remedy="make it again: flowturbo-train cache-latents",
            )
        raw["shape"], raw["classes"], raw["corrupt"] = (tuple(raw[key]) for key in ("shape", "classes", "corrupt"))
        return Manifest(**raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{folder} is not a latent cache: {error}",
            allowed=f"a folder with {MANIFEST} written by cache-latents",
            remedy="make one: flowturbo-train cache-latents --data PHOTOGRAPHS --out DIR",
        ) from error


class Latents:
    """A finished cache: posterior samples by index, memory-mapped.

    Raises:
        DataError: no cache, an unfinished one, or a missing or damaged shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
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
                remedy="remove the folder and run cache-latents again",
            ) from error
        self._means, self._stds = [s["mean"] for s in shards], [s["std"] for s in shards]
        self.labels: NDArray[np.int64] = np.concatenate([s["label"].numpy() for s in shards])
        self._starts = np.cumsum([0, *(len(s["label"]) for s in shards)])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, H, W] of one latent."""
        return self.manifest.shape

    def sample(self, indices: NDArray[np.int64], mirrored: NDArray[np.bool_], noise: Tensor) -> Tensor:
        """Scaled latents drawn from the posteriors with `noise` [B, C, H, W]: float32 [B, C, H, W]."""
        means, stds = [], []
        for index, mirror in zip(indices, mirrored, strict=True):
            shard = int(np.searchsorted(self._starts, index, side="right")) - 1
            row, side = int(index - self._starts[shard]), int(mirror)
            means.append(self._means[shard][row, side])
            stds.append(self._stds[shard][row, side])
        return torch.stack(means).float() + torch.stack(stds).float() * noise
