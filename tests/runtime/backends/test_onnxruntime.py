"""ONNX Runtime sessions as the backend opens them, and what one engine call binds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.backends.base import allocate_host
from runtime.backends.onnxruntime import PROVIDERS, _IoBinding, build_spin_settings
from runtime.pipeline import Pipeline
from runtime.system.hardware import count_usable_cores, find_openvino_problem


@pytest.fixture(scope="module")
def pipeline(tiny_engines: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_engines, provider="cpu", threads=1) as opened:
        yield opened


def session(pipeline: Pipeline, graph: str) -> Any:
    engine: Any = pipeline._load_engine(graph)
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
    engine: Any = pipeline._load_engine("predictor")
    request = pipeline.request([1, 2], solver="euler", steps=4, guidance=2.0)
    expected = pipeline.run(request).latents
    watched = Bindings(engine._binding.binding)
    engine._binding._memory.clear()
    runs: list[list[str]] = []
    run = engine._session.run_with_iobinding
    monkeypatch.setattr(engine._binding, "binding", watched)

    def counted(binding: Any) -> None:
        runs.append(list(watched.names))
        watched.names.clear()
        run(watched._binding)

    monkeypatch.setattr(engine, "_session", type("Session", (), {"run_with_iobinding": staticmethod(counted)}))
    np.testing.assert_array_equal(pipeline.run(request).latents, expected)
    first, later = set(runs[0]), [set(names) for names in runs[1:]]
    assert first == set(engine._file.spec.inputs) | set(engine._file.spec.outputs)
    fixed = {"slopes", "row_image", "mix", "atol", "rtol"}
    assert all(not names & fixed for names in later)
    assert all({"base", "x_next", "slope"} <= names for names in later)


def test_a_plug_in_provider_reads_inputs_that_changed_in_place(pipeline: Pipeline) -> None:
    """It copies an input when it is bound (seen with OpenVINO's plug-in): a history bound once is the first one."""
    engine: Any = pipeline._load_engine("predictor")
    buffers = {name: allocate_host((1,), np.float32) for name in ("slopes", "base")}
    for provider, names in ((PROVIDERS["cpu"], []), (PROVIDERS["openvino"], ["slopes", "base"])):
        watched = Bindings(engine._session.io_binding())
        monitored = _IoBinding(watched, engine._file.spec, provider, {name: name for name in buffers})
        watched._binding = SimpleNamespace(bind_input=lambda *arguments: None)
        monitored.bind_inputs(buffers)
        watched.names.clear()
        monitored.bind_inputs(buffers)
        assert watched.names == names


@pytest.mark.skipif(find_openvino_problem() != "", reason="OpenVINO does not run here")
def test_openvino_makes_the_cpu_providers_latents(pipeline: Pipeline, tiny_engines: Path) -> None:
    """Samplers that read earlier slopes: a stale history was off by 1.0, rounding is off by 1e-6."""
    with Pipeline.load(tiny_engines, provider="openvino", threads=1) as openvino:
        for options in ({"schedule": "H1P5R3"}, {"solver": "ab2", "steps": 4}, {"adaptive": "lte"}):
            exact, other = (p.run(p.request([1, 2], **options)).latents for p in (pipeline, openvino))
            np.testing.assert_allclose(other, exact, atol=2e-4)


def test_threads_sleep_after_a_run(tiny_engines: Path) -> None:
    """Every engine has threads of its own: those that look for work take the cores of the engine that runs next."""
    with Pipeline.load(tiny_engines, provider="cpu") as opened:
        options = session(opened, "predictor").get_session_options()
        for key, value in build_spin_settings(options.intra_op_num_threads).items():
            assert options.get_session_config_entry(key) == value
    assert build_spin_settings(1) == build_spin_settings(2) == {"session.intra_op.allow_spinning": "0"}
    for threads in (4, 16):
        assert build_spin_settings(threads)["session.force_spinning_stop"] == "1"


@pytest.mark.skipif(count_usable_cores() < 2, reason="needs two cores")
def test_an_idle_pipeline_uses_no_processor(tiny_engines: Path) -> None:
    """With ONNX Runtime's own setting the threads of a session go on for tens of milliseconds after each run."""
    with Pipeline.load(tiny_engines, provider="cpu", threads=2) as opened:
        opened.generate(1, schedule="H1")
        before = time.process_time()
        time.sleep(0.05)
        assert time.process_time() - before < 0.01
