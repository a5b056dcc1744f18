"""Modulations ahead of the trajectory: unique (time, label) pairs in few large calls, cached across pictures.

A fixed sampler knows every time beforehand, so the third of a SiT's weights that depends on (t, y) is read once per
schedule and label instead of once per evaluation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, Buffer, Engine
from runtime.directory.contract import CONDITIONING_ROWS

CHUNK_BYTES = 64 << 20
MODULATION_CACHE_BYTES = 256 << 20

ConditioningKey = tuple[float, int]


def make_conditioning_key(t: float, label: int) -> ConditioningKey:
    """Return what a row's modulations depend on: the time in float32, as the engine reads it, and the label."""
    return float(np.float32(t)), int(label)


class Conditioner:
    """One conditioning engine and a cache of its modulations."""

    def __init__(self, backend: Backend, engine: Engine, modulations: int) -> None:
        self._backend, self._engine, self._modulations = backend, engine, modulations
        row_bytes = 4 * modulations
        self._chunk_rows = max(1, min(CONDITIONING_ROWS, CHUNK_BYTES // row_bytes))
        self._max_cached = max(self._chunk_rows, MODULATION_CACHE_BYTES // row_bytes)
        self._cache: OrderedDict[ConditioningKey, NDArray[np.float32]] = OrderedDict()
        self.calls = 0

    def build_table(self, times: Sequence[float], labels: Sequence[NDArray[np.int32]]) -> ModulationTable:
        """Return the modulations of all evaluations: one [N, M] buffer per time, rows in the order of its labels."""
        return ModulationTable(
            self, [[make_conditioning_key(t, label) for label in row] for t, row in zip(times, labels, strict=True)]
        )

    def compute_buffers(self, key_lists: Sequence[Sequence[ConditioningKey]]) -> list[Buffer]:
        """Return one device buffer per list of keys; each key is evaluated once."""
        keys = list(dict.fromkeys(key for key_list in key_lists for key in key_list))
        cached = {key: self._cache[key] for key in keys if key in self._cache}
        missing = [key for key in keys if key not in cached]
        for start in range(0, len(missing), self._chunk_rows):
            chunk = missing[start : start + self._chunk_rows]
            cached |= dict(zip(chunk, self._evaluate(chunk), strict=True))
        for key, row in cached.items():
            self._cache[key] = row
            self._cache.move_to_end(key)
        while len(self._cache) > self._max_cached:
            self._cache.popitem(last=False)
        return [self._upload(np.stack([cached[key] for key in key_list])) for key_list in key_lists]

    def clear_cache(self) -> None:
        """Empty the cache, so that the next picture pays for its modulations, as in a benchmark."""
        self._cache.clear()

    def compute_window(self, rows: int) -> int:
        """Return how many evaluations of N rows have their modulations on the device at once."""
        return max(1, CHUNK_BYTES // (4 * self._modulations * rows))

    def _evaluate(self, keys: Sequence[ConditioningKey]) -> NDArray[np.float32]:
        t = self._upload(np.asarray([t for t, _ in keys], np.float32))
        y = self._upload(np.asarray([label for _, label in keys], np.int32))
        mods = self._backend.allocate((len(keys), self._modulations), np.float32)
        self._engine.run({"t": t, "y": y}, {"mods": mods})
        self.calls += 1
        return mods.numpy()

    def _upload(self, array: NDArray[np.generic]) -> Buffer:
        buffer = self._backend.allocate(array.shape, array.dtype)
        buffer.upload(array)
        return buffer


class ModulationTable:
    """The modulations of a trajectory, a window of at most 64 MB at a time: a long one would not fit a small board."""

    def __init__(self, conditioner: Conditioner, keys: Sequence[Sequence[ConditioningKey]]) -> None:
        self._conditioner, self._keys = conditioner, keys
        self._window_size = conditioner.compute_window(max(map(len, keys))) if keys else 1
        self._start, self._window = 0, conditioner.compute_buffers(keys[: self._window_size])

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Buffer:
        if not 0 <= index < len(self._keys):
            raise IndexError(index)
        if not self._start <= index < self._start + len(self._window):
            self._start = index - index % self._window_size
            self._window = self._conditioner.compute_buffers(self._keys[self._start : self._start + self._window_size])
        return self._window[index - self._start]
