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
    """The user's cache folder for this package. Nothing in it is needed; no cache is kept in an engine directory."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "flowturbo"


class HashCache:
    """sha256 of files; unchanged ones are not read twice."""

    def __init__(self, folder: Path | None = None) -> None:
        self._path = (folder or find_cache_folder()) / "hashes.json"
        self._hashes = self._load()
        self._has_changed = False

    def sha256(self, path: Path) -> str:
        """Hex digest of the file's contents."""
        stat = path.stat()
        key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        if key not in self._hashes:
            self._hashes[key] = compute_sha256(path)
            self._has_changed = True
        return self._hashes[key]

    def save(self) -> None:
        """Keeps what was learnt; a cache that cannot be written is no error."""
        if self._has_changed:
            with suppress(OSError, OutputError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._path, dict(list(self._hashes.items())[-_MAX_ENTRIES:]))

    def _load(self) -> dict[str, str]:
        with suppress(OSError, ValueError):
            hashes = json.loads(self._path.read_text(encoding="utf-8"))
            if isinstance(hashes, dict):
                return {str(key): str(value) for key, value in hashes.items()}
        return {}
