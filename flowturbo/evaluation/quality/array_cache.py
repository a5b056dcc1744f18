"""Cache arrays on disk that took long to make: whole, or made again; named by what they depend on."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.system.files import write_atomically

Arrays = dict[str, NDArray[Any]]


def hash_json(data: Any) -> str:
    """Return a short hash of JSON data, for names in a cache."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def save_arrays(path: Path, arrays: Arrays, *, compressed: bool = False) -> None:
    """Write an .npz, whole or not at all."""
    save_npz = np.savez_compressed if compressed else np.savez
    with write_atomically(path) as aside, open(aside, "wb") as file:
        save_npz(file, **arrays)  # type: ignore[arg-type]  # none is called allow_pickle


def load_arrays(path: Path) -> Arrays | None:
    """Read the arrays of an .npz; None where it is missing or damaged, so that it is made again."""
    try:
        # Opened here: of a damaged file NumPy raises without closing what it opened itself.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile):
        return None
