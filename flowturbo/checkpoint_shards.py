"""Checkpoints in several files: an index names the file of every tensor. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from runtime.system.errors import CheckpointError
from runtime.system.hashes import sha256_cached

INDEX_SUFFIX = ".index.json"


def find_index(path: Path) -> Path | None:
    """Return the index of a checkpoint of several files, which is `path` or lies in it; None for one file.

    Raises:
        CheckpointError: a folder has several indices.
    """
    if path.is_dir():
        indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        if len(indices) > 1:
            raise CheckpointError(
                f"{path} has {len(indices)} indices: {', '.join(index.name for index in indices)}",
                remedy="name the index of the wanted checkpoint",
            )
        return indices[0] if indices else None
    return path if path.name.endswith(INDEX_SUFFIX) and path.is_file() else None


def list_shards(index: Path) -> dict[Path, list[str]]:
    """Return the files of an index with the names of their tensors.

    Raises:
        CheckpointError: the index is damaged, or a file is missing or outside its folder.
    """
    weight_map: object = None
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise CheckpointError(
            f"{index} is not an index of a checkpoint",
            allowed="a JSON object whose `weight_map` names the file of every tensor",
            remedy="download or copy it again",
        )
    shards: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file or file.endswith(INDEX_SUFFIX):
            raise CheckpointError(
                f"{index} names {file!r}", allowed="files beside the index", remedy="download it again from its source"
            )
        shards.setdefault(index.parent / file, []).append(name)
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(shards)} files are missing: {', '.join(missing[:3])}",
            remedy="download or copy them too",
        )
    return shards


def hash_checkpoint(path: Path) -> str:
    """Return the sha256 of a checkpoint file; of several files, that of their hashes and the index's."""
    index = find_index(path)
    if index is None:
        return sha256_cached(path)
    hashes = [sha256_cached(file) for file in (index, *sorted(list_shards(index)))]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()
