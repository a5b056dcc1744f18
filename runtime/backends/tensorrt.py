"""Runs engines of TensorRT 10.x, 11.x and TensorRT-RTX on the GPU, without a copy that is not asked for.

Buffers stay on the device and their addresses are handed to TensorRT; evaluations are captured as CUDA graphs. A
graph is valid for the addresses it was captured with, and the loop comes back to the same few buffers, so there is one
graph per (engine, shapes, addresses). Letters as in runtime/contract.py.

No GPU has run this file yet (docs/jetson.md says what was run).
"""

from __future__ import annotations

import json
import mmap
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from numpy.typing import DTypeLike

from runtime.backends.base import BackendOptions, Buffer, EngineFile, Ran
from runtime.backends.device_memory import DeviceBuffer, MemoryPool
from runtime.backends.rtx_cache import RuntimeCacheFile
from runtime.backends.trt_api import (
    NAMES,
    Api,
    BuiltWith,
    Flavour,
    LogText,
    load_api,
    make_logger,
    rebuild_command,
    refuse_foreign,
)
from runtime.contract import Specs
from runtime.cuda import CudaError, Gpu, Stream
from runtime.errors import BackendError, EngineError, RequestError
from runtime.hardware import SERVED, served

MAX_GRAPHS = 64
"""Captured graphs an engine keeps: each owns an execution context. More address sets than that run uncaptured."""
_MAX_CONTEXTS = 8  # execution contexts of an engine for uncaptured runs, one per set of shapes
_MAX_SEEN = 1024  # address sets remembered to tell which come back
_IO_ALIGNMENT = 256
_OLD_DRIVER = "driver version is insufficient"
_TURING = (7, 5)

Shapes = tuple[tuple[int, ...], ...]
Addresses = tuple[int, ...]


@dataclass
class _Captured:
    """A CUDA graph and the execution context it was captured from, which nothing may touch afterwards."""

    context: Any
    executable: int


class TensorRTEngine:
    """A deserialised engine with its contexts and graphs; made by `NativeBackend.load`."""

    def __init__(self, backend: NativeBackend, file: EngineFile, engine: Any, cache: RuntimeCacheFile | None) -> None:
        self._backend, self._file, self._engine, self._cache = backend, file, engine, cache
        self._api, self._stream = backend.api, backend.stream
        self._names = [*file.spec.inputs, *file.spec.outputs]
        self._contexts: dict[Shapes, Any] = {}
        self._seen: set[tuple[Shapes, Addresses]] = set()
        self._graphs: dict[tuple[Shapes, Addresses], _Captured] = {}
        self._capturing = backend.options.cuda_graph and not self._api.traits.optimises_contexts
        self._profiles = _profiles(engine, file)
        self._config = self._runtime_config()
        # All runs share one stream, so all contexts can share one block of scratch memory.
        self._scratch_bytes = int(engine.device_memory_size_v2)
        self._scratch = backend.pool.take(self._scratch_bytes)
        self._staging: dict[tuple[str, int], int] = {}

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Enqueues one evaluation; the stream orders it after uploads and before downloads.

        Raises:
            EngineError: the engine was closed, or TensorRT failed.
            RequestError: no profile of the engine takes these shapes.
        """
        if self._engine is None:
            raise EngineError(f"the engine {self._file.path.name} was closed")
        buffers = [_device_buffer(name, {**inputs, **outputs}) for name in self._names]
        count = len(self._file.spec.inputs)
        with self._backend.lock:
            self._stream.use()
            addresses = tuple(self._aligned(name, buffer) for name, buffer in zip(self._names, buffers, strict=True))
            self._copy(addresses[:count], [buffer.address for buffer in buffers[:count]], buffers[:count])
            self._run(tuple(buffer.shape for buffer in buffers[:count]), addresses)
            self._copy([buffer.address for buffer in buffers[count:]], addresses[count:], buffers[count:])

    def _aligned(self, name: str, buffer: DeviceBuffer) -> int:
        """The buffer's address, or that of a private copy: a slot of a table may lie at any multiple of four."""
        if buffer.address % _IO_ALIGNMENT == 0:
            return buffer.address
        key = name, buffer.nbytes
        if key not in self._staging:
            self._staging[key] = self._backend.pool.take(buffer.nbytes)
        return self._staging[key]

    def _copy(self, targets: Sequence[int], sources: Sequence[int], buffers: Sequence[DeviceBuffer]) -> None:
        for target, source, buffer in zip(targets, sources, buffers, strict=True):
            if target != source:
                self._stream.copy(target, source, buffer.nbytes)

    def _run(self, shapes: Shapes, addresses: Addresses) -> None:
        """Launches the graph of these shapes and addresses; the second time they come, captures it."""
        key = shapes, addresses
        if key in self._graphs:
            self._stream.launch(self._graphs[key].executable)
        elif self._capturing and key in self._seen and len(self._graphs) < MAX_GRAPHS:
            self._capture(key)
        else:
            if len(self._seen) > _MAX_SEEN:
                self._seen.clear()
            self._seen.add(key)
            self._enqueue(self._context(shapes), addresses)

    def _capture(self, key: tuple[Shapes, Addresses]) -> None:
        """Runs once in a context of its own, which settles what TensorRT defers, then records the next run.

        NVIDIA calls a graph undefined once the context it came from is changed, hence one context per graph.
        """
        context = self._new_context(key[0])
        self._enqueue(context, key[1])
        try:
            self._stream.begin_capture()
            done = context.execute_async_v3(self._stream.handle)
            executable = self._stream.end_capture()
        except CudaError as error:
            self._stop_capturing(error.given)
            return
        if done:
            self._graphs[key] = _Captured(context, executable)
        else:
            self._stop_capturing(self._backend.log.take() or "TensorRT did not take part in the capture")

    def _stop_capturing(self, reason: str) -> None:
        self._capturing = False
        self._backend.note(f"{self._file.graph}: runs without CUDA graphs, {reason}")

    def _enqueue(self, context: Any, addresses: Addresses) -> None:
        bound = [context.set_tensor_address(*pair) for pair in zip(self._names, addresses, strict=True)]
        if not all(bound) or not context.execute_async_v3(self._stream.handle):
            raise EngineError(
                f"{self._api.name} failed to run {self._file.path.name}: {self._backend.log.take()}",
                remedy=rebuild_command(self._api.flavour),
            )

    def _context(self, shapes: Shapes) -> Any:
        """The context for uncaptured runs of these shapes: changing the shapes of one is slow."""
        if shapes not in self._contexts:
            while len(self._contexts) >= _MAX_CONTEXTS:
                self._stream.wait()
                del self._contexts[next(iter(self._contexts))]
            self._contexts[shapes] = self._new_context(shapes)
        return self._contexts[shapes]

    def _new_context(self, shapes: Shapes) -> Any:
        strategy = self._api.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(self._config if self._config is not None else strategy)
        if context is None:
            raise EngineError(
                f"{self._api.name} could not prepare {self._file.path.name}: {self._backend.log.take()}",
                remedy="free GPU memory, use a smaller batch, or rebuild with --low-memory",
            )
        if self._scratch_bytes:
            context.set_device_memory(self._scratch, self._scratch_bytes)
        context.set_optimization_profile_async(choose_profile(self._profiles, shapes, self._file), self._stream.handle)
        sized = [context.set_input_shape(*pair) for pair in zip(self._file.spec.inputs, shapes, strict=True)]
        if not all(sized):
            raise EngineError(f"{self._api.name} refused {_sizes(shapes, self._file)}: {self._backend.log.take()}")
        self._stream.wait()
        return context

    def _runtime_config(self) -> Any:
        """RTX: a cache for the JIT's kernels, and CUDA graphs that follow shapes and addresses by themselves."""
        if not self._api.traits.optimises_contexts:
            return None
        trt, config = self._api.trt, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._backend.options.cuda_graph:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache:
            self._cache.attach(config)
        return config

    def layer_types(self) -> dict[str, int]:
        """Element types of the built layers' outputs → count, as the inspector tells; empty where it does not.

        Layers that TensorRT compiled as one region show only what enters and leaves it: counted as "region".
        """
        text = self._engine.create_engine_inspector().get_engine_information(self._api.trt.LayerInformationFormat.JSON)
        return count_types(text)

    def close(self) -> None:
        """Frees contexts, graphs, scratch memory and the engine, in this order; twice does no harm."""
        if self._engine is None:
            return
        with self._backend.lock:
            self._stream.use()
            self._stream.wait()
            if self._cache:
                self._cache.save()
            for captured in self._graphs.values():
                self._stream.free_graph(captured.executable)
            self._graphs.clear()
            self._contexts.clear()
            self._config = None
            self._engine = None
            for (_, size), address in self._staging.items():
                self._backend.pool.give_back(address, size)
            self._backend.pool.give_back(self._scratch, self._scratch_bytes)


class NativeBackend:
    """Loads serialised engines of one flavour and owns the memory they work in.

    Raises:
        BackendError: there is no driver or GPU (which says nothing about the engines), or the flavour is missing.
    """

    def __init__(self, flavour: Flavour, options: BackendOptions) -> None:
        self.options = options
        self.stream = Stream()
        self.api = load_api(flavour)
        self.lock = threading.RLock()
        self.pool = MemoryPool(self.stream, self.lock)
        self.log = LogText()
        self._logger = make_logger(self.api, self.log)
        self._runtime = self.api.trt.Runtime(self._logger)
        self._engines: list[TensorRTEngine] = []
        versions = {flavour: self.api.version, "cuda": self.stream.gpu.driver}
        self.ran = Ran(flavour, "native", self.stream.gpu.name, versions, _device_notes(self.api, self.stream.gpu))

    def note(self, text: str) -> None:
        """Adds a remark to what `run.json` says."""
        self.ran = Ran(self.ran.backend, self.ran.provider, self.ran.device, self.ran.versions, (*self.ran.notes, text))

    def load(self, file: EngineFile) -> TensorRTEngine:
        """Deserialises an engine, if the manifest says that it was built for this machine.

        Raises:
            EngineError: it is damaged, or was built by another release or for another GPU.
        """
        if "built" in file.built and not self.options.allow_foreign:
            built = BuiltWith.from_json(file.built["built"])
            refuse_foreign(built, self.api, self.stream.gpu, rebuild_command(self.api.flavour))
        with self.lock:
            self.stream.use()
            engine = self._deserialise(file)
            check_tensors(self.api, engine, file)
            loaded = TensorRTEngine(self, file, engine, self._cache(file))
        self._engines.append(loaded)
        return loaded

    def _deserialise(self, file: EngineFile) -> Any:
        self.log.take()
        try:
            with open(file.path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                # Mapped, not read: on a Jetson a copy of the file would take memory from the engine itself.
                engine = self._runtime.deserialize_cuda_engine(content)
                reason = self._invalidity(content) if engine is None else ""
        except (OSError, ValueError) as error:
            raise EngineError(f"cannot read {file.path}: {error}", remedy=rebuild_command(self.api.flavour)) from error
        if engine is None:
            said = self.log.take()
            if _OLD_DRIVER in said:
                raise BackendError(
                    f"the NVIDIA driver (CUDA {self.stream.gpu.driver}) is too old for {self.api.name}",
                    remedy=f"update the driver; nothing is known against {file.path.name}",
                )
            raise EngineError(
                f"{self.api.name} on {self.stream.gpu.name} (compute capability {self.stream.gpu.sm}) did not accept"
                f" {file.path.name}. {reason}It says:\n  {said or 'nothing'}",
                allowed="engines built by this very release for this GPU",
                remedy=rebuild_command(self.api.flavour),
            )
        return engine

    def _invalidity(self, content: Any) -> str:
        """RTX can say why an engine does not fit; without a driver it calls every engine invalid, but there is one."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return ""
        with suppress(Exception):
            _, bits = self._runtime.get_engine_validity(content)
            kinds = self.api.trt.EngineInvalidityDiagnostics.__members__
            return "Reasons: " + ", ".join(name for name, bit in kinds.items() if int(bits) & int(bit)) + ". "
        return ""

    def _cache(self, file: EngineFile) -> RuntimeCacheFile | None:
        if self.options.cache is None or not self.api.traits.optimises_contexts:
            return None
        gpu = self.stream.gpu
        return RuntimeCacheFile.of(self.options.cache, file.sha256, self.api.version, gpu.name, gpu.driver)

    def buffer(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceBuffer:
        """Zeroed device memory."""
        return self.pool.buffer(shape, dtype)

    def close(self) -> None:
        """Closes every engine and frees every buffer."""
        for engine in self._engines:
            engine.close()
        self._engines.clear()
        with self.lock:
            self.pool.close()
            self._runtime = None
            self.stream.close()


class TensorRTBackend(NativeBackend):
    """TensorRT 10.x and 11.x."""

    def __init__(self, options: BackendOptions) -> None:
        super().__init__("tensorrt", options)


class RtxBackend(NativeBackend):
    """TensorRT-RTX 1.x."""

    def __init__(self, options: BackendOptions) -> None:
        super().__init__("rtx", options)


def _device_notes(api: Api, gpu: Gpu) -> tuple[str, ...]:
    if not served(api.flavour, gpu):
        raise BackendError(
            f"{gpu.name} has compute capability {gpu.sm}, which {NAMES[api.flavour]} does not serve",
            allowed=SERVED[api.flavour],
            remedy="use a build for --target cuda, tensorrt or cpu",
        )
    if api.flavour == "rtx" and gpu.capability == _TURING:
        return (f"{gpu.name} has compute capability 7.5, where TensorRT-RTX is known to be slow",)
    return ()


def _device_buffer(name: str, buffers: Mapping[str, Buffer]) -> DeviceBuffer:
    buffer = buffers.get(name)
    if not isinstance(buffer, DeviceBuffer):
        raise AssertionError(f"tensor {name} needs a device buffer, got {type(buffer).__name__}")
    return buffer


def check_tensors(api: Api, engine: Any, file: EngineFile) -> None:
    """Compares the engine's inputs and outputs with the contract: a stale engine must not read past a buffer.

    Raises:
        EngineError: a name or a type differs.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {name: engine.get_tensor_dtype(name) for name in names}
    specs: Specs = {**file.spec.inputs, **file.spec.outputs}
    wanted = {name: _data_type(api.trt, spec.dtype) for name, spec in specs.items()}
    if found != wanted:
        differing = ", ".join(sorted(f"{name} {kind}" for name, kind in found.items() ^ wanted.items()))
        raise EngineError(
            f"{file.path.name} is not a {file.graph} of this version: {differing} differ",
            remedy=rebuild_command(api.flavour),
        )


def _data_type(trt: Any, dtype: str) -> Any:
    return {"float32": trt.DataType.FLOAT, "int32": trt.DataType.INT32, "bool": trt.DataType.BOOL}[dtype]


ProfileBounds = tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]
"""Smallest, tuned-for and largest shape of every input of one profile."""


def _profiles(engine: Any, file: EngineFile) -> list[ProfileBounds]:
    return [
        tuple(_bounds(engine.get_tensor_profile_shape(name, index)) for name in file.spec.inputs)
        for index in range(engine.num_optimization_profiles)
    ]


def _bounds(shapes: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    smallest, best, largest = (tuple(int(size) for size in shape) for shape in shapes)
    return smallest, best, largest


def count_types(inspected: str) -> dict[str, int]:
    """Element types in an engine inspector's JSON → layers; its wording differs between releases."""
    counts: Counter[str] = Counter()
    with suppress(ValueError, AttributeError, TypeError):
        for layer in json.loads(inspected)["Layers"]:
            if isinstance(layer, dict):
                region = "ForeignNode" in str(layer.get("Name", "")) or layer.get("LayerType") == "Myelin"
                kinds = {_word(str(output.get("Format/Datatype", ""))) for output in layer.get("Outputs", [])}
                counts.update(["region"] if region else kinds)
    return dict(counts)


def _word(text: str) -> str:
    """fp16 for "Row major linear FP16 format" or "Half", and so on."""
    for kind, words in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16", "half")), ("fp32", ("fp32", "float"))):
        if any(word in text.lower() for word in words):
            return kind
    return "int8" if "int8" in text.lower() else "other"


def choose_profile(profiles: list[ProfileBounds], shapes: Shapes, file: EngineFile) -> int:
    """Index of the profile that takes these input shapes and was tuned for the nearest.

    Raises:
        RequestError: none takes them; lists the built sizes.
    """
    fitting = [
        index
        for index, profile in enumerate(profiles)
        if all(_inside(shape, bounds) for shape, bounds in zip(shapes, profile, strict=True))
    ]
    if fitting:
        return min(fitting, key=lambda index: _distance(shapes, profiles[index]))
    raise RequestError(
        f"{file.path.name} was not built for {_sizes(shapes, file)}",
        allowed=" or ".join(_range(profile, file) for profile in profiles),
        remedy="flowturbo-export build-engines with another --max-batch, or without --static-batch",
    )


def _distance(shapes: Shapes, profile: ProfileBounds) -> int:
    """How far shapes are from those that a profile was tuned for."""
    return sum(
        abs(size - best)
        for shape, (_, tuned, _) in zip(shapes, profile, strict=True)
        for size, best in zip(shape, tuned, strict=True)
    )


def _inside(shape: tuple[int, ...], bounds: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> bool:
    smallest, _, largest = bounds
    return len(shape) == len(smallest) and all(
        low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
    )


def _letters(shapes: Shapes, file: EngineFile) -> dict[str, int]:
    """B and N of a set of input shapes."""
    return {
        dim: size
        for shape, spec in zip(shapes, file.spec.inputs.values(), strict=True)
        for size, dim in zip(shape, spec.shape, strict=False)
        if isinstance(dim, str)
    }


_WORDS = {"B": "images", "N": "rows"}


def _sizes(shapes: Shapes, file: EngineFile) -> str:
    return ", ".join(f"{size} {_WORDS[dim]}" for dim, size in _letters(shapes, file).items())


def _range(profile: ProfileBounds, file: EngineFile) -> str:
    low = _letters(tuple(bounds[0] for bounds in profile), file)
    high = _letters(tuple(bounds[2] for bounds in profile), file)
    ranges = {dim: str(low[dim]) if low[dim] == high[dim] else f"{low[dim]}–{high[dim]}" for dim in low}
    return ", ".join(f"{text} {_WORDS[dim]}" for dim, text in ranges.items())
