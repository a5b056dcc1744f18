"""Loops over the shipped fake device: tiny networks whose velocity is a formula, and engines that watch memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import BackendOptions, Buffer, Engine, EngineFile, HostBuffer
from runtime.backends.fake import FakeBackend, velocity
from runtime.directory.contract import conditioning_spec, trunk_spec
from runtime.execution.conditioning import Conditioner
from runtime.execution.fixed_loop import Loop, Trunk
from runtime.sampling.guidance import Rows
from runtime.sampling.noise import noise_of_seeds
from runtime.sampling.plan import HISTORY, Plan, Steps, integrate

SIDE, M, NULL = 4, 2, 10
Wrap = Callable[[str, Engine], Engine]


def make_loop(wrap: Wrap = lambda graph, engine: engine) -> Loop:
    backend = FakeBackend(BackendOptions())

    def engine(graph: str, spec: Any) -> Engine:
        return wrap(graph, backend.load(EngineFile(Path(f"{graph}.onnx"), graph, "fp32", spec, "")))

    def trunk(graph: str, conditioning: str) -> Trunk:
        spec = trunk_spec(4, SIDE, M, refiner=graph == "refiner")
        return Trunk(engine(graph, spec), spec, Conditioner(backend, engine(conditioning, conditioning_spec(M)), M))

    return Loop(
        backend, {"predictor": trunk("predictor", "conditioning"), "refiner": trunk("refiner", "refiner_conditioning")}
    )


def noise(*seeds: int) -> NDArray[np.float32]:
    return noise_of_seeds(seeds, (4, SIDE, SIDE))


def reference(
    plan: Plan | Steps, start: NDArray[np.float32], rows: Rows, noise: Sequence[Any] = ()
) -> NDArray[np.float64]:
    """The same plan in float64 arithmetic over the fake device's formula."""
    labels, pair, mix = rows.labels.astype(np.float32), rows.pair, rows.mix.astype(np.float64)

    def evaluate(x: Any, t: float, v: Any = 0.0, add: Any = 0.0) -> Any:
        out = velocity(x[pair], np.full(len(labels), t, np.float32), labels).astype(np.float64) - v
        return np.einsum("cnm,mchw->nchw", mix, out) + add

    found: NDArray[np.float64] = integrate(plan, start.astype(np.float64), evaluate, evaluate, noise=noise)
    return found


class Watched:
    """An engine that checks, at every call, that no output lands in memory which that call reads."""

    def __init__(self, graph: str, engine: Engine) -> None:
        self.graph, self.engine = graph, engine

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        if self.graph in ("predictor", "refiner"):
            arrays = {name: host(buffer) for name, buffer in inputs.items()}
            results = {name: host(buffer) for name, buffer in outputs.items()}
            for name, result in results.items():
                for other, array in arrays.items():
                    if other != "slopes":
                        assert not np.shares_memory(result, array), f"{name} lands in {other}"
                for slot in range(HISTORY):
                    if np.shares_memory(result, arrays["slopes"][slot]):
                        assert name == "slope"
                        read = [arrays["a"][1 + slot], arrays["b"][1 + slot], arrays["e"][slot]]
                        assert not np.any(read), f"slot {slot} is read and written"
        self.engine.run(inputs, outputs)

    def close(self) -> None:
        self.engine.close()


def host(buffer: Buffer) -> NDArray[Any]:
    assert isinstance(buffer, HostBuffer)
    return buffer.array
