"""Modulations ahead of the trajectory: unique (time, label) pairs in few large calls, kept across pictures.

A fixed sampler knows every time beforehand, so the third of a SiT's weights that depends on (t, y) is read once per
schedule and label instead of once per evaluation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, Buffer, Engine
from runtime.contract import CONDITIONING_ROWS

CHUNK_BYTES = 64 << 20
CACHE_BYTES = 256 << 20

Pair = tuple[float, int]


class Conditioner:
    """One conditioning engine and the modulations it has already made."""

    def __init__(self, backend: Backend, engine: Engine, modulations: int) -> None:
        self._backend, self._engine, self._modulations = backend, engine, modulations
        row_bytes = 4 * modulations
        self._chunk = max(1, min(CONDITIONING_ROWS, CHUNK_BYTES // row_bytes))
        self._kept = max(self._chunk, CACHE_BYTES // row_bytes)
        self._rows: OrderedDict[Pair, NDArray[np.float32]] = OrderedDict()
        self.calls = 0

    def table(
        self, times: Sequence[float], labels: NDArray[np.int32], on_call: Callable[[], None] = lambda: None
    ) -> list[Buffer]:
        """Modulations of every evaluation: one [N, M] device buffer per time, rows in the order of `labels`."""
        pairs = [[(float(np.float32(t)), int(label)) for label in labels] for t in times]
        wanted = list(dict.fromkeys(pair for row in pairs for pair in row))
        known = {pair: self._rows[pair] for pair in wanted if pair in self._rows}
        missing = [pair for pair in wanted if pair not in known]
        for start in range(0, len(missing), self._chunk):
            chunk = missing[start : start + self._chunk]
            known |= dict(zip(chunk, self._evaluate(chunk), strict=True))
            on_call()
        self._remember(known)
        return [self._upload(np.stack([known[pair] for pair in row])) for row in pairs]

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
