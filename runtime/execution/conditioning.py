"""Modulations ahead of the trajectory: unique (time, label) pairs in few large calls, kept across pictures.

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
CACHE_BYTES = 256 << 20

Pair = tuple[float, int]


def pair_of(t: float, label: int) -> Pair:
    """What a row's modulations depend on, the time as the engine sees it."""
    return float(np.float32(t)), int(label)


class Conditioner:
    """One conditioning engine and the modulations it has already made."""

    def __init__(self, backend: Backend, engine: Engine, modulations: int) -> None:
        self._backend, self._engine, self._modulations = backend, engine, modulations
        row_bytes = 4 * modulations
        self._chunk = max(1, min(CONDITIONING_ROWS, CHUNK_BYTES // row_bytes))
        self._kept = max(self._chunk, CACHE_BYTES // row_bytes)
        self._rows: OrderedDict[Pair, NDArray[np.float32]] = OrderedDict()
        self.calls = 0

    def table(self, times: Sequence[float], labels: Sequence[NDArray[np.int32]]) -> ModulationTable:
        """Modulations of every evaluation: one [N, M] device buffer per time, rows in the order of its labels."""
        return ModulationTable(
            self, [[pair_of(t, label) for label in row] for t, row in zip(times, labels, strict=True)]
        )

    def buffers(self, pairs: Sequence[Sequence[Pair]]) -> list[Buffer]:
        """One device buffer per list of pairs; each pair is evaluated once."""
        wanted = list(dict.fromkeys(pair for row in pairs for pair in row))
        known = {pair: self._rows[pair] for pair in wanted if pair in self._rows}
        missing = [pair for pair in wanted if pair not in known]
        for start in range(0, len(missing), self._chunk):
            chunk = missing[start : start + self._chunk]
            known |= dict(zip(chunk, self._evaluate(chunk), strict=True))
        self._remember(known)
        return [self._upload(np.stack([known[pair] for pair in row])) for row in pairs]

    def forget(self) -> None:
        """Drops what was made: the next picture pays for its modulations, as a benchmark wants it to."""
        self._rows.clear()

    def window(self, rows: int) -> int:
        """Evaluations of N rows whose modulations are held on the device at once."""
        return max(1, CHUNK_BYTES // (4 * self._modulations * rows))

    def _evaluate(self, pairs: Sequence[Pair]) -> NDArray[np.float32]:
        t = self._upload(np.asarray([t for t, _ in pairs], np.float32))
        y = self._upload(np.asarray([label for _, label in pairs], np.int32))
        mods = self._backend.buffer((len(pairs), self._modulations), np.float32)
        self._engine.run({"t": t, "y": y}, {"mods": mods})
        self.calls += 1
        return mods.numpy()

    def _upload(self, array: NDArray[np.generic]) -> Buffer:
        buffer = self._backend.buffer(array.shape, array.dtype)
        buffer.upload(array)
        return buffer

    def _remember(self, rows: dict[Pair, NDArray[np.float32]]) -> None:
        for pair, row in rows.items():
            self._rows[pair] = row
            self._rows.move_to_end(pair)
        while len(self._rows) > self._kept:
            self._rows.popitem(last=False)


class ModulationTable:
    """The modulations of a trajectory, a window of at most 64 MB at a time: a long one would not fit a small board."""

    def __init__(self, conditioner: Conditioner, pairs: Sequence[Sequence[Pair]]) -> None:
        self._conditioner, self._pairs = conditioner, pairs
        self._size = conditioner.window(max(map(len, pairs))) if pairs else 1
        self._start, self._window = 0, conditioner.buffers(pairs[: self._size])

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Buffer:
        if not 0 <= index < len(self._pairs):
            raise IndexError(index)
        if not self._start <= index < self._start + len(self._window):
            self._start = index - index % self._size
            self._window = self._conditioner.buffers(self._pairs[self._start : self._start + self._size])
        return self._window[index - self._start]
