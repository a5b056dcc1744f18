"""Hashes of large files, remembered by path, size, time and inode, so that a start does not read gigabytes again."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from runtime.system.errors import OutputError
from runtime.system.files import compute_sha256, write_json

_MAX_ENTRIES = 4096


def find_cache_folder() -> Path:
    """Return the user's cache folder of this package; it may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "flowturbo"


def sha256_cached(path: Path, cache_folder: Path | None = None) -> str:
    """Return the hex digest of a file's contents; an unchanged file is not read twice.

    A cache that cannot be read or written is no error.

    Args:
        cache_folder: folder of the cache; the user's if None.
    """
    cache_path = (cache_folder or find_cache_folder()) / "hashes.json"
    stat = path.stat()
    key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
    hashes = _read_cache(cache_path)
    if key in hashes:
        return hashes[key]
    digest = compute_sha256(path)
    with suppress(OSError, OutputError):
        cache_path.parent.mkdir(parents=True, exist_ok=True)
        hashes = _read_cache(cache_path) | {key: digest}  # read again: another process may have added some meanwhile
        write_json(cache_path, dict(list(hashes.items())[-_MAX_ENTRIES:]))
    return digest


def _read_cache(path: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        hashes = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(hashes, dict):
            return {str(key): str(value) for key, value in hashes.items()}
    return {}
