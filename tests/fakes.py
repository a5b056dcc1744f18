"""Loops over the shipped fake device: tiny networks whose velocity is a formula, and engines that watch memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import BackendOptions, Buffer, Engine, EngineFile, HostBuffer
from runtime.backends.fake import FakeBackend, compute_velocity
from runtime.directory.contract import build_conditioning_spec, build_trunk_spec
from runtime.execution.conditioning import Conditioner
from runtime.execution.fixed_loop import FixedLoop, LoadedNetwork
from runtime.sampling.guidance import BranchBatch
from runtime.sampling.noise import sample_noise
from runtime.sampling.plan import HISTORY, AdaptiveSteps, Plan, integrate

SIDE, M, NULL = 4, 2, 10
WrapEngine = Callable[[str, Engine], Engine]


def make_loop(wrap: WrapEngine = lambda graph, engine: engine) -> FixedLoop:
    backend = FakeBackend(BackendOptions())

    def engine(graph: str, spec: Any) -> Engine:
        return wrap(graph, backend.load(EngineFile(Path(f"{graph}.onnx"), graph, "fp32", spec, "")))

    def trunk(graph: str, conditioning: str) -> LoadedNetwork:
        spec = build_trunk_spec(4, SIDE, M, refiner=graph == "refiner")
        return LoadedNetwork(
            engine(graph, spec), spec, Conditioner(backend, engine(conditioning, build_conditioning_spec(M)), M)
        )

    return FixedLoop(
        backend, {"predictor": trunk("predictor", "conditioning"), "refiner": trunk("refiner", "refiner_conditioning")}
    )


def make_noise(*seeds: int) -> NDArray[np.float32]:
    return sample_noise(seeds, (4, SIDE, SIDE))


def integrate_reference(
    plan: Plan | AdaptiveSteps, start: NDArray[np.float32], branches: BranchBatch, noise: Sequence[Any] = ()
) -> NDArray[np.float64]:
    """The same plan in float64 arithmetic over the fake device's formula."""
    labels, row_image, mix = branches.labels.astype(np.float32), branches.row_image, branches.mix.astype(np.float64)

    def evaluate(x: Any, t: float, v: Any = 0.0, add: Any = 0.0) -> Any:
        out = compute_velocity(x[row_image], np.full(len(labels), t, np.float32), labels).astype(np.float64) - v
        return np.einsum("cnm,mchw->nchw", mix, out) + add

    latents: NDArray[np.float64] = integrate(plan, start.astype(np.float64), evaluate, evaluate, noise=noise)
    return latents


class OverlapCheckEngine:
    """An engine that checks, at every call, that no output lands in memory which that call reads."""

    def __init__(self, graph: str, engine: Engine) -> None:
        self.graph, self.engine = graph, engine

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        if self.graph in ("predictor", "refiner"):
            arrays = {name: read_host_array(buffer) for name, buffer in inputs.items()}
            results = {name: read_host_array(buffer) for name, buffer in outputs.items()}
            for name, result in results.items():
                for input_name, array in arrays.items():
                    if input_name != "slopes":
                        assert not np.shares_memory(result, array), f"{name} lands in {input_name}"
                for slot in range(HISTORY):
                    if np.shares_memory(result, arrays["slopes"][slot]):
                        assert name == "slope"
                        coefficients = [
                            arrays["point_coef"][1 + slot],
                            arrays["update_coef"][1 + slot],
                            arrays["error_coef"][slot],
                        ]
                        assert not np.any(coefficients), f"slot {slot} is read and written"
        self.engine.run(inputs, outputs)

    def close(self) -> None:
        self.engine.close()


def read_host_array(buffer: Buffer) -> NDArray[Any]:
    assert isinstance(buffer, HostBuffer)
    return buffer.array
