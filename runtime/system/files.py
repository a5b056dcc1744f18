"""Files that are whole or absent: written aside, flushed, renamed. And their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime.system.errors import OutputError

_CHUNK_BYTES = 1 << 22
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")
_TORCH_WRITE_FAILURE = "PytorchStreamWriter failed writing file"
MAX_JSON_BYTES = 16 << 20
"""Of a JSON file that is read: a manifest of hundreds of engines with samplers has a tenth of it."""
_MAX_JSON_DEPTH = 64


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; rename it to `path` at the end, or remove it on any error.

    Raises:
        OutputError: the file cannot be written (permissions, disk full, missing folder).
    """
    if not path.name:
        raise OutputError(f"cannot write {path}: it is a folder", remedy="name a file")
    temp_path = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with report_write_errors(path):
            yield temp_path
            with open(temp_path, "rb") as temp_file:
                os.fsync(temp_file.fileno())
            os.replace(temp_path, path)
    finally:
        with suppress(OSError):
            temp_path.unlink(missing_ok=True)


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into an `OutputError`, whichever library tells of it.

    Raises:
        OutputError: the system refused to write.
    """
    try:
        yield
    except Exception as error:  # libraries in Rust (safetensors) and C++ (torch) have errors of their own
        if isinstance(error, OSError):
            reason = error.strerror or str(error) or type(error).__name__
        elif match := _RUST_OS_ERROR.search(str(error)):
            reason = os.strerror(int(match[1] or match[2]))
        elif _TORCH_WRITE_FAILURE in str(error):
            reason = "the file could not be written"
        else:
            raise
        raise OutputError(
            f"cannot write {path}: {reason}", remedy="free space, or name a folder that can be written"
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON with a stable layout, whole or not at all."""
    with write_atomically(path) as temp_path:
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        # Bytes of a file name that are no text become escapes of JSON.
        temp_path.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_regular(path: Path, max_bytes: int | None = None) -> None:
    """Check, before a file is read, that reading it ends: a pipe waits for ever, a device has no end.

    Raises:
        OSError: it is not there, or may not be read.
        ValueError: it is no regular file, or has more than `max_bytes`.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ValueError(f"it has {status.st_size} bytes, more than {max_bytes}")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        OSError: it is not there, or may not be read.
        ValueError: it is no regular file, too large, nested too deep, or no JSON.
    """
    check_regular(path, max_bytes)
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """Parse JSON that somebody else wrote.

    Raises:
        ValueError: it is no JSON, or nested too deep.
    """
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [data]
    for _ in range(_MAX_JSON_DEPTH):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, dict | list)
        ]
        if not level:
            return data
    raise ValueError(f"it is nested more than {_MAX_JSON_DEPTH} deep")


def make_folder(path: Path) -> Path:
    """Make a folder if it is missing, and return it.

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


def check_output_file(
    path: Path, *, option: str = "", suffixes: Collection[str] = (), reserved: Collection[Path] = ()
) -> None:
    """Check, before an hour of work, that its result can be written to `path`; make the folder.

    Args:
        option: the option that names the file, for the message.
        suffixes: endings that it may have, in lower case; any if empty.
        reserved: files that it must not replace.

    Raises:
        OutputError: it is a folder or reserved, has another ending, or its folder cannot be made or written.
    """
    given = f"{option} cannot write {path}" if option else f"cannot write {path}"
    if path.is_dir() or path.resolve() in {file.resolve() for file in reserved}:
        raise OutputError(given, allowed="a file of its own", remedy="name another file")
    if suffixes and path.suffix.lower() not in suffixes:
        raise OutputError(given, allowed=f"a file that ends in {', '.join(suffixes)}", remedy="name another file")
    folder = make_folder(path.absolute().parent)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror}", remedy="name another file") from error


def compute_sha256(path: Path) -> str:
    """Return the hex digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
