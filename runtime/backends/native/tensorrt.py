"""Run engines of TensorRT 10.x, 11.x and TensorRT-RTX on the GPU; latents never come to the host between evaluations.

An engine reads and writes private tensors at fixed addresses, and the loop's buffers are copied in and out on the
device. That costs microseconds and buys one CUDA graph per (engine, shapes): a graph holds its addresses, and the loop
has other buffers at every evaluation. It also gives TensorRT the alignment that a slot of a table does not have.

No GPU has run this file yet (docs/jetson.md says what was run).
"""

from __future__ import annotations

import json
import mmap
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import DTypeLike

from runtime.backends.base import BackendOptions, Buffer, EngineFile, RuntimeInfo
from runtime.backends.native.device_memory import DeviceBuffer, MemoryPool
from runtime.backends.native.profiles import Shapes, choose_profile, format_sizes, read_profiles
from runtime.backends.native.rtx_cache import RuntimeCacheFile
from runtime.backends.native.trt_api import (
    FLAVOUR_NAMES,
    EngineBuildInfo,
    Flavour,
    LogBuffer,
    TensorRTApi,
    check_engine_origin,
    format_rebuild_command,
    load_api,
    make_logger,
)
from runtime.directory.contract import TensorSpecs, match_names
from runtime.system.cuda_driver import CudaError, CudaStream
from runtime.system.errors import BackendError, EngineError
from runtime.system.hardware import SUPPORTED_GPUS, is_gpu_supported

MAX_SHAPES = 8
"""Sets of shapes that an engine is prepared for at once; beyond them the oldest is dropped."""
_IO_ALIGNMENT = 256
_OLD_DRIVER_TEXT = "driver version is insufficient"
_TURING_CAPABILITY = (7, 5)

Addresses = tuple[int, ...]


@dataclass
class _PreparedContext:
    """An execution context for one set of shapes, and the CUDA graph captured from it.

    NVIDIA calls a graph undefined once the context it came from is changed: with a graph, nothing touches the context.
    """

    context: Any
    graph: int | None = None


class TensorRTEngine:
    """A deserialised engine with its contexts and graphs; made by `NativeBackend.load`."""

    def __init__(self, backend: NativeBackend, file: EngineFile, engine: Any, cache: RuntimeCacheFile | None) -> None:
        self._backend, self._file, self._engine, self._cache = backend, file, engine, cache
        self._api, self._stream = backend.api, backend.stream
        self._names = [*file.spec.inputs, *file.spec.outputs]
        file_names = check_tensors(backend.api, engine, file)
        self._file_names = [file_names[name] for name in self._names]
        self._file_inputs = self._file_names[: len(file.spec.inputs)]
        self._contexts: dict[Shapes, _PreparedContext] = {}
        # Conditioning runs seldom and writes much: copying its output costs memory and gains nothing.
        self._uses_graphs = backend.options.cuda_graph and not file.graph.endswith("conditioning")
        self._captures_graphs = self._uses_graphs and not self._api.traits.has_runtime_config
        self._profiles = read_profiles(engine, self._file_inputs)
        self._config = self._create_runtime_config()
        # All runs share one stream, so all contexts can share one block of scratch memory.
        self._scratch_bytes = int(engine.device_memory_size_v2)
        self._scratch = backend.pool.acquire(self._scratch_bytes)
        self._staging: dict[tuple[str, int], int] = {}

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Enqueue one evaluation; the stream orders it after uploads and before downloads.

        Raises:
            EngineError: the engine was closed, or TensorRT failed.
            RequestError: no profile of the engine takes these shapes.
        """
        if self._engine is None:
            raise EngineError(f"the engine {self._file.path.name} was closed")
        buffers: list[DeviceBuffer] = []
        for name in self._names:
            buffer = inputs.get(name, outputs.get(name))
            if not isinstance(buffer, DeviceBuffer):
                raise AssertionError(f"tensor {name} needs a device buffer, got {type(buffer).__name__}")
            buffers.append(buffer)
        num_inputs = len(self._file.spec.inputs)
        shapes = tuple(buffer.shape for buffer in buffers[:num_inputs])
        with self._backend.lock:
            self._stream.make_current()
            prepared = self._contexts.get(shapes) or self._prepare_context(shapes)
            addresses = tuple(
                self._choose_address(name, buffer) for name, buffer in zip(self._names, buffers, strict=True)
            )
            buffer_addresses = [buffer.address for buffer in buffers]
            self._copy_buffers(addresses[:num_inputs], buffer_addresses[:num_inputs], buffers[:num_inputs])
            self._launch(prepared, addresses)
            self._copy_buffers(buffer_addresses[num_inputs:], addresses[num_inputs:], buffers[num_inputs:])

    def _choose_address(self, name: str, buffer: DeviceBuffer) -> int:
        """Return where TensorRT finds a tensor: a private address, or the caller's if aligned and without a graph."""
        if not self._uses_graphs and buffer.address % _IO_ALIGNMENT == 0:
            return buffer.address
        key = name, buffer.nbytes
        if key not in self._staging:
            self._staging[key] = self._backend.pool.acquire(buffer.nbytes)
        return self._staging[key]

    def _copy_buffers(self, targets: Sequence[int], sources: Sequence[int], buffers: Sequence[DeviceBuffer]) -> None:
        for target, source, buffer in zip(targets, sources, buffers, strict=True):
            if target != source:
                self._stream.copy(target, source, buffer.nbytes)

    def _launch(self, prepared: _PreparedContext, addresses: Addresses) -> None:
        """Launch the graph. The first run is without one, as TensorRT defers work to it; then it is captured."""
        if prepared.graph is not None:
            self._stream.launch_graph(prepared.graph)
            return
        is_bound = [
            prepared.context.set_tensor_address(*name_address)
            for name_address in zip(self._file_names, addresses, strict=True)
        ]
        if not all(is_bound) or not prepared.context.execute_async_v3(self._stream.handle):
            raise EngineError(
                f"{self._api.name} failed to run {self._file.path.name}: {self._backend.log.drain()}",
                remedy=format_rebuild_command(self._api.flavour),
            )
        if self._captures_graphs:
            prepared.graph = self._capture_graph(prepared.context)

    def _capture_graph(self, context: Any) -> int | None:
        """Capture the next run as a graph; return None, with a note, where that fails."""
        try:
            self._stream.begin_capture()
            is_enqueued = context.execute_async_v3(self._stream.handle)
            graph = self._stream.end_capture()
        except CudaError as error:
            self._stop_capturing(error.given)
            return None
        if is_enqueued:
            return graph
        self._stream.free_graph(graph)
        self._stop_capturing(self._backend.log.drain() or "TensorRT did not take part in the capture")
        return None

    def _stop_capturing(self, reason: str) -> None:
        self._captures_graphs = False
        self._backend.add_note(f"{self._file.graph}: runs without CUDA graphs, {reason}")

    def _prepare_context(self, shapes: Shapes) -> _PreparedContext:
        """Create a context for these shapes alone: changing the shapes of one is slow."""
        while len(self._contexts) >= MAX_SHAPES:
            self._stream.wait()
            self._discard_context(next(iter(self._contexts)))
        strategy = self._api.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(self._config if self._config is not None else strategy)
        if context is None:
            raise EngineError(
                f"{self._api.name} could not prepare {self._file.path.name}: {self._backend.log.drain()}",
                remedy="free GPU memory, use a smaller batch, or rebuild with --low-memory",
            )
        if self._scratch_bytes:
            context.set_device_memory(self._scratch, self._scratch_bytes)
        context.set_optimization_profile_async(choose_profile(self._profiles, shapes, self._file), self._stream.handle)
        is_accepted = [
            context.set_input_shape(*name_shape) for name_shape in zip(self._file_inputs, shapes, strict=True)
        ]
        if not all(is_accepted):
            raise EngineError(
                f"{self._api.name} refused {format_sizes(shapes, self._file)}: {self._backend.log.drain()}"
            )
        self._stream.wait()
        self._contexts[shapes] = _PreparedContext(context)
        return self._contexts[shapes]

    def _discard_context(self, shapes: Shapes) -> None:
        prepared = self._contexts.pop(shapes)
        if prepared.graph is not None:
            self._stream.free_graph(prepared.graph)

    def _create_runtime_config(self) -> Any:
        """Configure RTX: a cache for the JIT's kernels, and CUDA graphs that TensorRT captures by itself."""
        if not self._api.traits.has_runtime_config:
            return None
        trt, config = self._api.trt, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._uses_graphs:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache:
            self._cache.attach(config)
        return config

    def count_layer_types(self) -> dict[str, int]:
        """Count the element types of the built layers' outputs, from the inspector; empty where it does not tell.

        Layers that TensorRT compiled as one region show only its inputs and outputs: counted as "region".
        """
        text = self._engine.create_engine_inspector().get_engine_information(self._api.trt.LayerInformationFormat.JSON)
        return parse_layer_types(text)

    def close(self) -> None:
        """Free contexts, graphs, scratch memory and the engine, in this order; a second call does nothing."""
        if self._engine is None:
            return
        with self._backend.lock:
            self._stream.make_current()
            self._stream.wait()
            if self._cache:
                self._cache.save()
            for shapes in list(self._contexts):
                self._discard_context(shapes)
            self._config = None
            self._engine = None
            for (_, size), address in self._staging.items():
                self._backend.pool.release(address, size)
            self._backend.pool.release(self._scratch, self._scratch_bytes)


class NativeBackend:
    """Loads serialised engines of one flavour and owns the memory of their runs.

    Raises:
        BackendError: there is no driver or GPU (which says nothing about the engines), or the flavour is missing.
    """

    def __init__(self, flavour: Flavour, options: BackendOptions) -> None:
        self.options = options
        self.stream = CudaStream()
        self.api = load_api(flavour)
        self.lock = threading.RLock()
        self.pool = MemoryPool(self.stream, self.lock)
        self.log = LogBuffer()
        self._logger = make_logger(self.api, self.log)
        self._runtime = self.api.trt.Runtime(self._logger)
        self._engines: list[TensorRTEngine] = []
        versions = {flavour: self.api.version, "cuda": self.stream.gpu.driver}
        gpu, notes = self.stream.gpu, []
        if not is_gpu_supported(flavour, gpu):
            raise BackendError(
                f"{gpu.name} has compute capability {gpu.sm}, which {FLAVOUR_NAMES[flavour]} does not serve",
                allowed=SUPPORTED_GPUS[flavour],
                remedy="use a build for --target cuda, tensorrt or cpu",
            )
        if flavour == "rtx" and gpu.capability == _TURING_CAPABILITY:
            notes = [f"{gpu.name} has compute capability 7.5, where TensorRT-RTX is known to be slow"]
        self.ran = RuntimeInfo(flavour, "native", gpu.name, versions, tuple(notes))

    def add_note(self, text: str) -> None:
        """Add a note for `run.json`."""
        self.ran = replace(self.ran, notes=(*self.ran.notes, text))

    def load(self, file: EngineFile) -> TensorRTEngine:
        """Deserialise an engine, if the manifest says that it was built for this machine.

        Raises:
            EngineError: it is damaged, or was built by another release or for another GPU.
        """
        if "built" in file.built and not self.options.allow_foreign:
            build_info = EngineBuildInfo.from_json(file.built["built"])
            check_engine_origin(build_info, self.api, self.stream.gpu, format_rebuild_command(self.api.flavour))
        with self.lock:
            self.stream.make_current()
            engine = self._deserialise(file)
            cache = None
            if self.options.cache is not None and self.api.traits.has_runtime_config:
                gpu = self.stream.gpu
                cache = RuntimeCacheFile.for_engine(
                    self.options.cache, file.sha256, self.api.version, gpu.name, gpu.driver
                )
            trt_engine = TensorRTEngine(self, file, engine, cache)
        self._engines.append(trt_engine)
        return trt_engine

    def _deserialise(self, file: EngineFile) -> Any:
        self.log.drain()
        try:
            with (
                open(file.path, "rb") as engine_file,
                mmap.mmap(engine_file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            ):
                # Mapped, not read: on a Jetson a copy of the file would take memory from the engine itself.
                engine = self._runtime.deserialize_cuda_engine(content)
                reason = self._explain_rejection(content) if engine is None else ""
        except (OSError, ValueError) as error:
            raise EngineError(
                f"cannot read {file.path}: {error}", remedy=format_rebuild_command(self.api.flavour)
            ) from error
        if engine is None:
            log_text = self.log.drain()
            if _OLD_DRIVER_TEXT in log_text:
                raise BackendError(
                    f"the NVIDIA driver (CUDA {self.stream.gpu.driver}) is too old for {self.api.name}",
                    remedy=f"update the driver; nothing is known against {file.path.name}",
                )
            raise EngineError(
                f"{self.api.name} on {self.stream.gpu.name} (compute capability {self.stream.gpu.sm}) did not accept"
                f" {file.path.name}. {reason}It says:\n  {log_text or 'nothing'}",
                allowed="engines built by this very release for this GPU",
                remedy=format_rebuild_command(self.api.flavour),
            )
        return engine

    def _explain_rejection(self, content: Any) -> str:
        """Return RTX's reasons why an engine does not fit; they need a driver, and there is one."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return ""
        with suppress(Exception):
            _, bits = self._runtime.get_engine_validity(content)
            kinds = self.api.trt.EngineInvalidityDiagnostics.__members__
            return "Reasons: " + ", ".join(name for name, bit in kinds.items() if int(bits) & int(bit)) + ". "
        return ""

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceBuffer:
        """Allocate zeroed device memory."""
        return self.pool.allocate(shape, dtype)

    def close(self) -> None:
        """Close every engine and free every buffer."""
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


def check_tensors(api: TensorRTApi, engine: Any, file: EngineFile) -> dict[str, str]:
    """Compare the engine's inputs and outputs with the contract: a stale engine must not read past a buffer.

    Returns:
        The engine's name of each tensor of the contract.

    Raises:
        EngineError: a name or a type differs.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    engine_types = {name: engine.get_tensor_dtype(name) for name in names}
    specs: TensorSpecs = {**file.spec.inputs, **file.spec.outputs}
    types = {"float32": api.trt.DataType.FLOAT, "int32": api.trt.DataType.INT32, "bool": api.trt.DataType.BOOL}
    file_names = match_names(file.spec, names) or {name: name for name in specs}
    contract_types = {file_names[name]: types[spec.dtype] for name, spec in specs.items()}
    if engine_types != contract_types:
        differing = ", ".join(sorted(f"{name} {kind}" for name, kind in engine_types.items() ^ contract_types.items()))
        raise EngineError(
            f"{file.path.name} is not a {file.graph} of this version: {differing} differ",
            remedy=format_rebuild_command(api.flavour),
        )
    return file_names


def parse_layer_types(inspector_json: str) -> dict[str, int]:
    """Count the layers by element type in an engine inspector's JSON; its wording differs between releases."""
    counts: Counter[str] = Counter()
    with suppress(ValueError, AttributeError, TypeError):
        for layer in json.loads(inspector_json)["Layers"]:
            if isinstance(layer, dict):
                is_region = "ForeignNode" in str(layer.get("Name", "")) or layer.get("LayerType") == "Myelin"
                kinds = {_parse_dtype(str(output.get("Format/Datatype", ""))) for output in layer.get("Outputs", [])}
                counts.update(["region"] if is_region else kinds)
    return dict(counts)


def _parse_dtype(text: str) -> str:
    """Return fp16 for "Row major linear FP16 format" or "Half", and so on."""
    for kind, words in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16", "half")), ("fp32", ("fp32", "float"))):
        if any(word in text.lower() for word in words):
            return kind
    return "int8" if "int8" in text.lower() else "other"
