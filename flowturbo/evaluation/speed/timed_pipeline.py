"""Time every engine call of a pipeline by wrapping its backend; the pipeline has no code for it.

A pipeline that is not benchmarked pays nothing. On CUDA the durations come from events on the backend's own stream,
where it has one; elsewhere from the monotonic clock, around calls that return when the work is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import DTypeLike

from flowturbo.evaluation.load_options import LoadOptions
from runtime.backends import BackendChoice
from runtime.backends.base import Backend, Buffer, Engine, EngineFile, RuntimeInfo
from runtime.directory.records import Manifest
from runtime.execution.decoding import TileChoice
from runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

Clock = Callable[[], int]
"""Nanoseconds that never go back."""

MONOTONIC, CUDA_EVENTS = "monotonic", "cuda events"
"""Clocks of calls, as reports name them."""

STAGES = ("conditioning", "predictor", "refiner", "decoder")


def find_stage(graph: str) -> str:
    """Return the stage that a graph belongs to."""
    if graph.endswith("conditioning"):
        return "conditioning"
    return graph if graph in ("predictor", "refiner", "encoder") else "decoder"


class Span(Protocol):
    """One call that has begun; `end` marks its end, `read_ms` waits for that and returns the duration."""

    def end(self) -> None: ...

    def read_ms(self) -> float: ...


class CallTimer(Protocol):
    """Begins spans on a device's clock."""

    name: str

    def begin(self) -> Span: ...


class HostSpan:
    """The time between two readings of a monotonic clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start = self._end = clock()

    def end(self) -> None:
        self._end = self._clock()

    def read_ms(self) -> float:
        return (self._end - self._start) / 1e6


class HostTimer:
    """For engines whose calls return when they are done."""

    name = MONOTONIC

    def __init__(self, clock: Clock = time.perf_counter_ns) -> None:
        self._clock = clock

    def begin(self) -> HostSpan:
        return HostSpan(self._clock)


class EventSpan:
    """The time between two CUDA events on a stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._start, self._end = stream.create_event(), stream.create_event()
        stream.record_event(self._start)

    def end(self) -> None:
        self._stream.record_event(self._end)

    def read_ms(self) -> float:
        elapsed: float = self._stream.elapsed_ms(self._start, self._end)
        for event in (self._start, self._end):
            self._stream.free_event(event)
        return elapsed


class EventTimer:
    """For engines whose calls return before the device has finished (native TensorRT)."""

    name = CUDA_EVENTS

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def begin(self) -> EventSpan:
        self._stream.make_current()
        return EventSpan(self._stream)


def choose_timer(backend: Backend) -> CallTimer:
    """Return CUDA events where the backend computes on a stream of its own, the monotonic clock elsewhere."""
    stream = getattr(backend, "stream", None)
    return HostTimer() if stream is None else EventTimer(stream)


@dataclass
class CallRecorder:
    """Milliseconds of every engine call since the last `take`, by stage, in order."""

    timer: CallTimer = field(default_factory=HostTimer)
    _spans: list[tuple[str, Span]] = field(default_factory=list)

    def begin(self, stage: str) -> Span:
        span = self.timer.begin()
        self._spans.append((stage, span))
        return span

    def take(self) -> dict[str, list[float]]:
        """Return what was recorded since the last call, and clear it."""
        spans, self._spans = self._spans, []
        calls: dict[str, list[float]] = {stage: [] for stage in STAGES}
        for stage, span in spans:
            calls.setdefault(stage, []).append(span.read_ms())
        return calls


class TimedEngine:
    """An engine with recorded runs; everything else is the engine itself."""

    def __init__(self, engine: Engine, stage: str, recorder: CallRecorder) -> None:
        self._engine, self._stage, self._recorder = engine, stage, recorder

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        span = self._recorder.begin(self._stage)
        self._engine.run(inputs, outputs)
        span.end()

    def close(self) -> None:
        self._engine.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class TimedBackend:
    """A backend with recorded engines; everything else is the backend itself."""

    def __init__(self, backend: Backend, recorder: CallRecorder) -> None:
        self._backend, self._recorder = backend, recorder
        self.load_ms: dict[str, float] = {}
        self.paths: dict[str, Path] = {}

    @property
    def ran(self) -> RuntimeInfo:
        return self._backend.ran

    @ran.setter
    def ran(self, value: RuntimeInfo) -> None:
        self._backend.ran = value

    def load(self, file: EngineFile) -> TimedEngine:
        start_ns = time.perf_counter_ns()
        engine = self._backend.load(file)
        self.paths[file.graph] = file.path
        self.load_ms[file.graph] = (time.perf_counter_ns() - start_ns) / 1e6
        return TimedEngine(engine, find_stage(file.graph), self._recorder)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        return self._backend.allocate(shape, dtype)

    def close(self) -> None:
        self._backend.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


@dataclass(frozen=True)
class TimedChoice(BackendChoice):
    """A choice of backend that opens it with a recorder around it."""

    recorder: CallRecorder = field(default_factory=CallRecorder)

    def open(self) -> Backend:
        backend = super().open()
        self.recorder.timer = choose_timer(backend)
        return TimedBackend(backend, self.recorder)


class TimedPipeline(Pipeline):
    """The pipeline that users run, with every engine call recorded in `recorder`."""

    def __init__(
        self, folder: Path, manifest: Manifest, resolution: int, choice: BackendChoice, decode_tile: TileChoice = "auto"
    ) -> None:
        self.recorder = CallRecorder()
        timed_choice = TimedChoice(choice.backend, choice.target, choice.options, choice.reason, self.recorder)
        super().__init__(folder, manifest, resolution, timed_choice, decode_tile)

    @classmethod
    def open(cls, folder: Path, resolution: int | None = None, **load_options: Unpack[LoadOptions]) -> Self:
        """Load a pipeline that records; see `Pipeline.load`."""
        pipeline = cls.load(folder, resolution=resolution, **load_options)
        assert isinstance(pipeline, cls)
        return pipeline

    @property
    def load_ms(self) -> dict[str, float]:
        """Return the milliseconds that opening each engine took, by graph."""
        return self._timed_backend.load_ms

    @property
    def _timed_backend(self) -> TimedBackend:
        assert isinstance(self._backend, TimedBackend)
        return self._backend

    def load_decoder(self, vae: str) -> None:
        """Open a whole decoder now; without this, the first picture does."""
        self._load_engine(f"decoder-{vae}")

    def forget_modulations(self) -> None:
        """Make the next picture compute its conditioning, like the first picture of a class."""
        for network in self._loop.networks.values():
            network.conditioner.clear_cache()

    @property
    def late_graphs(self) -> tuple[str, ...]:
        """Return the graphs that the first picture opens: decoders, whole or in tiles."""
        return tuple(name for name in self.load_ms if find_stage(name) == "decoder")

    def weight_bytes(self) -> int | None:
        """Return the bytes of weights of the open engines; None where the manifest has no ONNX record of one."""
        total = 0
        for path in self._timed_backend.paths.values():
            relative = path.relative_to(self.folder).as_posix()
            graph = next((g for g in self.manifest.graphs if g.path == relative), None)
            if graph is None:
                return None
            total += graph.weight_bytes
        return total
