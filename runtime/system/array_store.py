"""Store arrays that took long to make: whole or absent, and only for the settings that made them."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.system.files import check_regular, write_atomically
from runtime.system.progress import SILENT, Progress

Arrays = dict[str, NDArray[Any]]
_KEY = "key"


def hash_json(data: Any) -> str:
    """Return a short hash of JSON data, as a key or a part of a file name."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def save_arrays(path: Path, arrays: Arrays, *, compressed: bool = False) -> None:
    """Write an .npz, whole or not at all."""
    save_npz = np.savez_compressed if compressed else np.savez
    with write_atomically(path) as temp_path, open(temp_path, "wb") as file:
        save_npz(file, **arrays)  # type: ignore[arg-type]  # none is called allow_pickle


def load_arrays(path: Path) -> Arrays | None:
    """Return the arrays of an .npz; None where there is none or it is damaged, so that they are made again."""
    try:
        return read_npz(path)
    except (OSError, ValueError):
        return None


def read_npz(path: Path, max_bytes: int | None = None) -> Arrays:
    """Read all arrays of an .npz.

    Args:
        max_bytes: of all arrays together, unpacked; a small file may unpack to very much.

    Raises:
        OSError: it is not there, or may not be read.
        ValueError: it is damaged, no .npz, no regular file, holds Python objects, or is too large.
    """
    check_regular(path)
    try:
        # Opened here: of a damaged file NumPy raises without closing what it opened itself.
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            if max_bytes is not None and size > max_bytes:
                raise ValueError(f"its arrays have {size} bytes, more than {max_bytes}")
            return {member.filename.removesuffix(".npy"): _read_member(archive, member) for member in members}
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile, zlib, and NumPy's parser of headers raise almost anything on damaged files
        raise ValueError(f"it is damaged: {error or type(error).__name__}") from error


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """Read an array after its header, which may claim more than there is."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"{member.filename} has the format {version}")
        shape, _, dtype = read_header[version](stream)
        if dtype.hasobject or any(side < 0 for side in shape):
            raise ValueError(f"{member.filename} holds Python objects, or has the shape {shape}")
        if math.prod(shape) * dtype.itemsize > member.file_size:
            raise ValueError(f"{member.filename} is cut short")
    with archive.open(member) as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


class KeyedStore:
    """A file of arrays that belongs to one key: the state of a job that can be stopped, or one part of a cache.

    Args:
        path: the .npz file; None stores nothing.
        key: text that changes with everything that the arrays depend on, such as `hash_json` of the settings; empty
            where the path itself says it.
    """

    def __init__(self, path: Path | None, key: str = "") -> None:
        self.path, self.key = path, key

    def load(self, *required: str, progress: Progress = SILENT) -> Arrays | None:
        """Return the arrays that were saved under this key; None where there are none, or one of `required` lacks.

        Args:
            progress: told where there is a file that cannot be used.
        """
        if self.path is None:
            return None
        arrays = load_arrays(self.path)
        if arrays is not None and str(arrays.pop(_KEY, "")) == self.key and arrays.keys() >= set(required):
            return arrays
        if self.path.exists():
            progress.write(f"{self.path} is of another model, version or settings: beginning anew")
        return None

    def save(self, arrays: Arrays) -> None:
        """Replace the file; none of the arrays may be called "key"."""
        if self.path is not None:
            save_arrays(self.path, {_KEY: np.asarray(self.key), **arrays} if self.key else arrays)

    def discard(self) -> None:
        """Remove the file, if there is one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
