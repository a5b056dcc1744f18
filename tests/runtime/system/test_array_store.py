"""Arrays are stored whole, and found again only by the key that they were stored under."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from recorded_progress import RecordedProgress

from runtime.system.array_store import KeyedStore, hash_json, load_arrays, save_arrays


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
