"""ONNX Runtime sessions as the backend opens them, and what one engine call binds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_engines: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_engines, provider="cpu", threads=1) as opened:
        yield opened


def session(pipeline: Pipeline, graph: str) -> Any:
    engine: Any = pipeline._engine(graph)
    return engine._session


def test_activations_are_held_once(pipeline: Pipeline) -> None:
    """ONNX Runtime's memory plan would come on top of what the first run allocated."""
    graphs = ("predictor", "conditioning", "refiner", "decoder-small")
    assert not any(session(pipeline, graph).get_session_options().enable_mem_pattern for graph in graphs)


def test_only_conditioning_weights_stay_as_they_are_in_the_file(pipeline: Pipeline) -> None:
    key = "session.disable_prepacking"
    for graph in ("conditioning", "refiner_conditioning"):
        assert session(pipeline, graph).get_session_options().get_session_config_entry(key) == "1"
    with pytest.raises(RuntimeError, match=key):  # not set: packed once, as matrix products want them
        session(pipeline, "predictor").get_session_options().get_session_config_entry(key)


class Bindings:
    """A session's binding that writes down what is bound."""

    def __init__(self, binding: Any) -> None:
        self._binding, self.names = binding, []

    def bind_input(self, name: str, *arguments: Any) -> None:
        self.names.append(name)
        self._binding.bind_input(name, *arguments)

    def bind_output(self, name: str, *arguments: Any) -> None:
        self.names.append(name)
        self._binding.bind_output(name, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binding, name)


def test_a_call_binds_only_what_has_moved(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trajectory swaps points and slots; history, pairs, mix and tolerances stay where they are."""
    engine: Any = pipeline._engine("predictor")
    request = pipeline.request([1, 2], solver="euler", steps=4, guidance=2.0)
    expected = pipeline.run(request).latents
    watched = Bindings(engine._bound.binding)
    engine._bound._memory.clear()
    runs: list[list[str]] = []
    run = engine._session.run_with_iobinding
    monkeypatch.setattr(engine._bound, "binding", watched)

    def counted(binding: Any) -> None:
        runs.append(list(watched.names))
        watched.names.clear()
        run(watched._binding)

    monkeypatch.setattr(engine, "_session", type("Session", (), {"run_with_iobinding": staticmethod(counted)}))
    np.testing.assert_array_equal(pipeline.run(request).latents, expected)
    first, later = set(runs[0]), [set(names) for names in runs[1:]]
    assert first == set(engine._file.spec.inputs) | set(engine._file.spec.outputs)
    fixed = {"slopes", "pair", "mix", "atol", "rtol"}
    assert all(not names & fixed for names in later)
    assert all({"base", "x_next", "slope"} <= names for names in later)
