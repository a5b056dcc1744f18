"""Cold starts: nothing of this process disturbs them, and one that fails says why in the process's own words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flowturbo.evaluation.load_options import LoadOptions
from flowturbo.evaluation.speed import bench_job, cold_start
from flowturbo.evaluation.speed.cold_start import ColdStart, measure_cold_starts
from flowturbo.evaluation.speed.rounds import Rounds
from flowturbo.evaluation.speed.timed_pipeline import TimedPipeline
from runtime.request import RequestOptions
from runtime.system.errors import BackendError, RequestError

QUICK = {"rounds": Rounds(repeats=1, duration=None, warmup=0), "energy": False, "load_options": {"backend": "fake"}}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[TimedPipeline]:
    """Every pipeline that a job opens."""
    pipelines: list[TimedPipeline] = []
    load = TimedPipeline.open

    def watched(*arguments: Any, **more: Any) -> TimedPipeline:
        pipelines.append(load(*arguments, **more))
        return pipelines[-1]

    monkeypatch.setattr(TimedPipeline, "open", watched)
    return pipelines


def test_no_engine_is_open_here_while_a_fresh_process_starts(
    tiny_engines: Path, opened: list[TimedPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def watched(
        label: str,
        folder: Path,
        resolution: int,
        load_options: LoadOptions,
        classes: Sequence[str],
        options: RequestOptions,
        *,
        decode: bool,
    ) -> list[ColdStart]:
        assert opened
        assert all(pipeline._is_closed for pipeline in opened)
        started.append(f"{label} {resolution} {options['schedule']}")
        return []

    monkeypatch.setattr(bench_job, "measure_cold_starts", watched)
    samplers: tuple[RequestOptions, ...] = ({"schedule": "H2"}, {"schedule": "H1"})
    bench_job.run_benchmark(bench_job.BenchmarkJob((tiny_engines,), samplers=samplers, **QUICK), [])  # type: ignore[arg-type]
    assert started == ["engines 32 H2"]


def test_what_is_not_possible_is_said_before_a_process_starts(
    tiny_engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_job, "measure_cold_starts", lambda *given, **more: pytest.fail("a process was started"))
    with pytest.raises(RequestError, match="class 207"):
        bench_job.run_benchmark(bench_job.BenchmarkJob((tiny_engines,), classes=("207",), **QUICK), [])  # type: ignore[arg-type]


def test_a_start_that_fails_says_what_is_wrong_and_not_only_what_to_do(tiny_engines: Path) -> None:
    with pytest.raises(BackendError) as raised:
        measure_cold_starts("engines", tiny_engines, 32, {"backend": "fake"}, ["1"], {"schedule": "Q3"}, decode=True)
    assert "a fresh process failed: schedule 'Q3' Allowed: blocks H" in raised.value.given


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("", ""),
        ("Traceback:\n  File x\nKeyError: 'a'\n", "'a'"),
        ("Traceback:\n  File x\nruntime.errors.EngineError: it is cut\n  Do: copy it", "it is cut Do: copy it"),
        ("terminate called\n", "terminate called"),
    ],
)
def test_the_last_words_of_a_process(stderr: str, words: str) -> None:
    assert cold_start._extract_error_message(stderr) == words


@pytest.mark.parametrize(
    ("program", "says"), [("import os; os.kill(os.getpid(), 9)", "ended with code -9"), ("print(1)", "left no result")]
)
def test_a_process_without_words(tiny_engines: Path, monkeypatch: pytest.MonkeyPatch, program: str, says: str) -> None:
    run = subprocess.run

    def other(command: list[str], **more: Any) -> Any:
        return run([sys.executable, "-c", program], **more)

    monkeypatch.setattr(cold_start.subprocess, "run", other)
    with pytest.raises(BackendError, match=says):
        measure_cold_starts("engines", tiny_engines, 32, {}, [], {}, decode=True)
