"""Modulations ahead of time: unique pairs, in few calls, kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import runtime.execution.conditioning as subject
from runtime.backends.base import BackendOptions, Buffer, Engine, EngineFile
from runtime.backends.fake import FakeBackend
from runtime.directory.contract import CONDITIONING_ROWS, build_conditioning_spec
from runtime.execution.conditioning import Conditioner, ModulationTable

M = 4


class Counting:
    """The shipped fake engine, with the rows of every call written down."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.rows: list[int] = []

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        self.rows.append(inputs["t"].shape[0])
        self._engine.run(inputs, outputs)

    def close(self) -> None:
        self._engine.close()


@pytest.fixture
def engine() -> Counting:
    file = EngineFile(Path("nowhere.onnx"), "conditioning", "fp32", build_conditioning_spec(M), "")
    return Counting(FakeBackend(BackendOptions()).load(file))


def conditioner(engine: Counting, modulations: int = M) -> Conditioner:
    return Conditioner(FakeBackend(BackendOptions()), engine, modulations)


def labels(*values: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.asarray(values, np.int32)


def table(made: Conditioner, times: Sequence[float], rows: NDArray[np.int32]) -> ModulationTable:
    """The same rows at every time."""
    return made.build_table(times, [rows] * len(times))


def test_a_row_holds_its_own_time_and_label(engine: Counting) -> None:
    found = table(conditioner(engine), [0.25, 0.5], labels(3, 1000))
    assert len(found) == 2
    for buffer, t in zip(found, (0.25, 0.5), strict=True):
        np.testing.assert_array_equal(buffer.numpy()[:, :2], [[t, 3], [t, 1000]])


def test_pairs_are_evaluated_once(engine: Counting) -> None:
    made = conditioner(engine)
    table(made, [0.0, 0.5, 0.5, 1.0], labels(7, 7, 9, 1000, 1000))
    assert engine.rows == [3 * 3]  # three times, three labels
    assert made.calls == 1


def test_later_pictures_ask_only_for_what_is_new(engine: Counting) -> None:
    made = conditioner(engine)
    table(made, [0.0, 0.5], labels(1, 1000))
    table(made, [0.0, 0.5], labels(1, 1000))
    assert (engine.rows, made.calls) == ([4], 1)
    table(made, [0.0, 0.5], labels(2, 1000))
    assert (engine.rows, made.calls) == ([4, 2], 2)


def test_large_tables_are_cut_into_chunks(engine: Counting) -> None:
    made = conditioner(engine)
    table(made, [i / 100 for i in range(100)], labels(0, 1, 1000))
    assert sum(engine.rows) == 300
    assert max(engine.rows) <= CONDITIONING_ROWS
    assert made.calls == len(engine.rows) == -(-300 // CONDITIONING_ROWS)


def test_a_chunk_holds_at_most_64_mb(engine: Counting) -> None:
    wide = subject.CHUNK_BYTES // (4 * 10)  # ten rows fill a chunk
    found = table(conditioner(engine, wide), [i / 25 for i in range(25)], labels(0))
    assert engine.rows == [10], "a window at a time"
    assert found[9].numpy()[0, 0] == np.float32(9 / 25)
    assert engine.rows == [10]
    assert [float(found[i].numpy()[0, 0]) for i in (10, 24)] == [np.float32(10 / 25), np.float32(24 / 25)]
    assert engine.rows == [10, 10, 5]


def test_the_cache_is_bounded_and_forgets_what_was_not_used_for_longest(
    engine: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "CHUNK_BYTES", 4 * M * 2)
    monkeypatch.setattr(subject, "MODULATION_CACHE_BYTES", 4 * M * 4)  # four rows
    made = conditioner(engine)
    table(made, [0.0], labels(0, 1))
    table(made, [0.0], labels(2, 3))
    table(made, [0.0], labels(0, 1))  # used again
    table(made, [0.0], labels(4, 5))  # pushes 2 and 3 out
    assert sum(engine.rows) == 6
    table(made, [0.0], labels(0, 1, 4, 5))
    assert sum(engine.rows) == 6
    table(made, [0.0], labels(2))
    assert sum(engine.rows) == 7


def test_a_table_larger_than_the_cache_is_whole(engine: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "CHUNK_BYTES", 4 * M * 2)
    monkeypatch.setattr(subject, "MODULATION_CACHE_BYTES", 4 * M * 2)
    found = table(conditioner(engine), [0.0, 0.25, 0.5, 0.75], labels(1, 2))
    for buffer, t in zip(found, (0.0, 0.25, 0.5, 0.75), strict=True):
        np.testing.assert_array_equal(buffer.numpy()[:, :2], [[t, 1], [t, 2]])


def test_no_evaluations_no_calls(engine: Counting) -> None:
    assert len(table(conditioner(engine), [], labels(1))) == 0
    assert engine.rows == []
