"""Files that are whole or absent: written aside, flushed, renamed. And their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime.system.errors import OutputError

_CHUNK_BYTES = 1 << 22


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Gives a name beside `path` to write to; renames it to `path` at the end, or removes it on any error.

    Raises:
        OutputError: the file cannot be written (permissions, disk full, missing folder).
    """
    if not path.name:
        raise OutputError(f"cannot write {path}: it is a folder", remedy="name a file")
    temp_path = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield temp_path
        with open(temp_path, "rb") as temp_file:
            os.fsync(temp_file.fileno())
        os.replace(temp_path, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot write {path}: {reason}", remedy="free space, or name a folder that can be written"
        ) from error
    finally:
        with suppress(OSError):
            temp_path.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """JSON with stable layout, whole or not at all."""
    with write_atomically(path) as temp_path:
        temp_path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def make_folder(path: Path) -> Path:
    """The folder, made if it is missing.

    Raises:
        OutputError: it cannot be made, or a file has its name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the folder {path}: {error.strerror or error}", remedy="name another folder"
        ) from error
    return path


def compute_sha256(path: Path) -> str:
    """Hex digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
