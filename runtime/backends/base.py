"""The interface of a backend: buffers on the device of the engine, and engines that run on them.

To add a backend, write a module with a class that satisfies `Backend` and register it in `runtime.backends`.
No module outside this folder depends on which backend runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtime.directory.contract import GraphSpec
from runtime.system.json_codec import JsonObject


class Buffer(Protocol):
    """Memory of fixed shape and type on the backend's device."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def upload(self, array: NDArray[Any]) -> None:
        """Copy a host array of the same shape and type to the buffer."""

    def numpy(self) -> NDArray[Any]:
        """Return a host copy, after waiting for what computes it."""

    def slot(self, index: int) -> Buffer:
        """Return the part at `index` of the first axis, sharing memory."""

    def head(self, count: int) -> Buffer:
        """Return the first `count` parts of the first axis, sharing memory."""

    def copy_from(self, source: Any) -> None:
        """Copy a buffer of the same backend, shape and type, on the device."""


class Engine(Protocol):
    """A loaded graph. Closing it frees its memory; running a closed one raises EngineError."""

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run once on these buffers; may return before the device has finished."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class EngineFile:
    """One engine of a directory, already checked against its manifest.

    Attributes:
        path: the ONNX file or the serialised engine.
        graph: name in the contract, for messages.
        precision: of the build: fp32, fp16, bf16 or int8; no backend may run it in less.
        spec: inputs and outputs.
        sha256: of `path` and its external weights; the key of every cache.
        static: sizes are fixed at build time.
        built: `EngineRecord.built`; empty for ONNX files.
        pairs_fit: `GraphRecord.pairs_fit` of an int8 file.
    """

    path: Path
    graph: str
    precision: str
    spec: GraphSpec
    sha256: str
    static: bool = False
    built: JsonObject = field(default_factory=dict)
    pairs_fit: bool = False


@dataclass(frozen=True)
class BackendOptions:
    """Options of a backend.

    Attributes:
        provider: ONNX Runtime execution provider (cpu, openvino, cuda, rtx), None for the one the target names.
        threads: CPU threads, None for one per physical core.
        allow_foreign: try an engine that another device or release built.
        allow_fallback: let a slower provider run what the asked one cannot, with a note in the output.
        cuda_graph: capture the evaluations as CUDA graphs where the backend can.
        cache: folder of compiled blobs, or None for no cache.
    """

    provider: str | None = None
    threads: int | None = None
    allow_foreign: bool = False
    allow_fallback: bool = False
    cuda_graph: bool = True
    cache: Path | None = None


@dataclass(frozen=True)
class RuntimeInfo:
    """What runs, for run.json and the pictures' metadata."""

    backend: str
    provider: str
    device: str
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Backend(Protocol):
    """Loads engines and owns their memory."""

    ran: RuntimeInfo

    def load(self, file: EngineFile) -> Engine:
        """Open an engine.

        Raises:
            EngineError: the file is damaged or was built for something else.
            BackendError: the asked provider did not take it.
        """

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """Allocate zeroed memory: a NaN in an unused history slot would spoil a sum even where its coefficient is 0."""

    def close(self) -> None: ...


class HostBuffer:
    """A buffer in host memory, for backends with engines that read NumPy arrays."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def pointer(self) -> int:
        """Address of the first element."""
        address: int = self.array.__array_interface__["data"][0]
        return address

    def upload(self, array: NDArray[Any]) -> None:
        self._check_shape(array)
        np.copyto(self.array, array, casting="no")

    def numpy(self) -> NDArray[Any]:
        return self.array.copy()

    def slot(self, index: int) -> HostBuffer:
        return HostBuffer(self.array[index])

    def head(self, count: int) -> HostBuffer:
        return HostBuffer(self.array[:count])

    def copy_from(self, source: HostBuffer) -> None:
        self._check_shape(source.array)
        np.copyto(self.array, source.array, casting="no")

    def _check_shape(self, array: NDArray[Any]) -> None:
        if array.shape != self.array.shape:  # as device memory does; NumPy would stretch it
            raise AssertionError(f"an array of shape {array.shape} does not fit a buffer of {self.array.shape}")


def allocate_host(shape: tuple[int, ...], dtype: DTypeLike) -> HostBuffer:
    """Allocate zeroed host memory."""
    return HostBuffer(np.zeros(shape, dtype))


def run_once(backend: Backend, engine: Engine, spec: GraphSpec, array: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Run a graph with one input, a host array of B images, and return its outputs on the host."""
    (name,) = spec.inputs
    source = backend.allocate(array.shape, np.float32)
    source.upload(np.ascontiguousarray(array))
    outputs = {
        key: backend.allocate(tensor.resolve_shape({"B": len(array)}), tensor.numpy_dtype)
        for key, tensor in spec.outputs.items()
    }
    engine.run({name: source}, outputs)
    return {key: buffer.numpy() for key, buffer in outputs.items()}


def pad_batch(array: NDArray[np.float32], images: int) -> NDArray[np.float32]:
    """Repeat the last image until there are as many as a fixed batch takes."""
    return np.concatenate([array, np.repeat(array[-1:], images - len(array), axis=0)])
