"""What benchmarks see of a pipeline's engines: the time inside ONNX Runtime, apart from everything around it."""

from __future__ import annotations

import time
from typing import Any

from runtime.pipeline import Pipeline


class EngineClock:
    """Seconds inside engine calls: on the wall, and of the calling thread's CPU time; and how many calls there were."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seconds = self.thread_seconds = 0.0
        self.calls = 0


class _TimedSession:
    """An ONNX Runtime session whose runs a clock counts; all else is the session's own."""

    def __init__(self, session: Any, clock: EngineClock) -> None:
        self._session, self._clock = session, clock

    def run_with_iobinding(self, *arguments: Any) -> None:
        start, cpu_start = time.perf_counter(), time.thread_time()
        self._session.run_with_iobinding(*arguments)
        self._clock.thread_seconds += time.thread_time() - cpu_start
        self._clock.seconds += time.perf_counter() - start
        self._clock.calls += 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def time_engines(pipeline: Pipeline) -> EngineClock:
    """Counts the engine calls of a pipeline on ONNX Runtime from now on; its decoders are loaded for it."""
    clock = EngineClock()
    for variant in pipeline.manifest.vaes:
        pipeline._load_engine(f"decoder-{variant}")
    for engine in pipeline._engines.values():
        engine._session = _TimedSession(engine._session, clock)  # type: ignore[attr-defined]
    return clock
