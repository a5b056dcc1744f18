"""Arrays are stored whole, and found again only by the key that they were stored under."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from recorded_progress import RecordedProgress

from runtime.system.array_store import KeyedStore, hash_json, load_arrays, read_npz, save_arrays


def test_arrays_come_back_under_their_key(tmp_path: Path) -> None:
    store = KeyedStore(tmp_path / "a.npz", hash_json({"steps": 3}))
    assert store.load() is None
    store.save({"x": np.arange(3), "x/y": np.asarray(0.5)})
    arrays = KeyedStore(tmp_path / "a.npz", hash_json({"steps": 3})).load("x")
    assert arrays is not None and sorted(arrays) == ["x", "x/y"]
    np.testing.assert_array_equal(arrays["x"], np.arange(3))
    store.discard()
    store.discard()
    assert store.load() is None and not list(tmp_path.iterdir())


def test_what_does_not_fit_is_not_loaded_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    KeyedStore(path, "one").save({"x": np.arange(3)})
    whole = path.read_bytes()
    for store, required in ((KeyedStore(path, "other"), ()), (KeyedStore(path), ()), (KeyedStore(path, "one"), ("y",))):
        told = RecordedProgress()
        assert store.load(*required, progress=told) is None
        assert told.lines == [f"{path} is of another model, version or settings: beginning anew"]
    for damaged in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(damaged)
        assert load_arrays(path) is None and KeyedStore(path, "one").load() is None


def test_a_store_without_a_file_or_a_key(tmp_path: Path) -> None:
    told = RecordedProgress()
    nothing = KeyedStore(None, "one")
    nothing.save({"x": np.arange(3)})
    assert nothing.load(progress=told) is None
    nothing.discard()
    save_arrays(tmp_path / "a.npz", {"x": np.arange(3)}, compressed=True)
    assert KeyedStore(tmp_path / "a.npz").load("x", progress=told) is not None
    assert told.lines == []


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    """Whatever zipfile, zlib or NumPy's parser raise; what is no regular file is not opened."""
    path = tmp_path / "a.npz"
    save_arrays(path, {"x": np.arange(2000), "y": np.ones((1, 4))}, compressed=True)
    whole = path.read_bytes()
    for start in range(0, len(whole), 97):
        path.write_bytes(whole[:start] + bytes(byte ^ 0xA5 for byte in whole[start : start + 40]) + whole[start + 40 :])
        arrays = load_arrays(path)
        assert arrays is None or set(arrays) <= {"x", "y", *arrays}
    np.savez(path, x=np.asarray([print], dtype=object))
    assert load_arrays(path) is None
    path.unlink()
    os.mkfifo(path)
    assert load_arrays(path) is None
    with pytest.raises(ValueError, match="no regular file"):
        read_npz(path)


def test_a_limit_is_checked_before_anything_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save_arrays(path, {"x": np.zeros(1 << 20, np.uint8)}, compressed=True)
    assert path.stat().st_size < 1 << 14
    with pytest.raises(ValueError, match="more than 65536"):
        read_npz(path, 1 << 16)
    np.testing.assert_array_equal(read_npz(path, 1 << 21)["x"], 0)
