"""Hashes of large files, remembered by path, size, times and inode, so that a start does not read gigabytes again."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from runtime.system.errors import OutputError
from runtime.system.files import compute_sha256, make_folder, read_json, write_json

_MAX_ENTRIES = 4096


def find_cache_folder() -> Path | None:
    """Return the user's cache folder of this package, which may be deleted at any time; None where there is no home.

    A relative XDG_CACHE_HOME is ignored, as its specification says.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "flowturbo"
    try:
        home = Path.home()
    except RuntimeError:  # a user id that is not in passwd, and no HOME
        return None
    return home / ".cache" / "flowturbo" if home.is_absolute() else None


def make_cache_folder(name: str) -> Path | None:
    """Make the folder `name` in the user's cache and return it; None where there is no home, or it cannot be written.

    What is cached is not needed, so a machine without a home goes on without.
    """
    cache = find_cache_folder()
    if cache is None:
        return None
    try:
        folder = make_folder(cache / name)
    except OutputError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def sha256_cached(path: Path, cache_folder: Path | None = None) -> str:
    """Return the hex digest of a file's contents; an unchanged file is not read twice.

    A cache that cannot be read or written is no error.

    Args:
        cache_folder: folder of the cache; the user's if None.
    """
    cache_folder = cache_folder or find_cache_folder()
    if cache_folder is None:
        return compute_sha256(path)
    cache_path = cache_folder / "hashes.json"
    stat = path.stat()
    # Tools set the modification time back; nobody but the kernel sets the time of the last change of the inode.
    times = f"{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    key = f"{path.resolve()}:{stat.st_size}:{times}:{stat.st_dev}:{stat.st_ino}"
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
        hashes = read_json(path)
        if isinstance(hashes, dict):
            return {str(key): str(value) for key, value in hashes.items()}
    return {}
