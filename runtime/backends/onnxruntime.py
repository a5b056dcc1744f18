"""ONNX Runtime: the CPU provider, CUDA, and the plug-in providers OpenVINO and TensorRT-RTX.

The provider that runs is compared with the one asked for: ONNX Runtime itself falls back to slower providers with a log
line, which is an error here unless the user allows it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtime.backends.base import BackendOptions, Buffer, EngineFile, HostBuffer, RuntimeInfo, allocate_host
from runtime.directory.contract import GraphSpec, match_names
from runtime.system.cuda_driver import CudaStream
from runtime.system.errors import BackendError, EngineError
from runtime.system.hardware import count_physical_cores, count_usable_cores, find_openvino_problem


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        name: as ONNX Runtime calls it.
        plugin: module of its plug-in package, or None where ONNX Runtime itself has it.
        device: where its buffers are, in ONNX Runtime's words.
        install: the pip command that installs it.
        precisions: precisions that it can compute in.
    """

    name: str
    plugin: str | None
    device: str
    install: str
    precisions: tuple[str, ...]


PROVIDERS = {
    "cpu": Provider(
        "CPUExecutionProvider",
        None,
        "cpu",
        "pip install 'flowturbo[cpu]'",
        ("fp32", "fp16", "int8", "int8-weights", "int4-weights"),
    ),
    "openvino": Provider(
        "OpenVINOExecutionProvider",
        "onnxruntime_ep_openvino",
        "cpu",
        "pip install 'flowturbo[openvino]'",
        ("fp32", "bf16"),
    ),
    "cuda": Provider("CUDAExecutionProvider", None, "cuda", "pip install 'flowturbo[cuda]'", ("fp32", "fp16", "bf16")),
    "rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "onnxruntime_ep_nv_tensorrt_rtx",
        "cpu",
        "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13",
        ("fp32", "fp16", "bf16"),
    ),
}


SPIN_US = 200
"""Longer than the time between two operators of a run, and too short for another program to notice."""

_REGISTERED_PLUGINS: set[str] = set()
"""Plug-in libraries that this process has registered; a second registration is an error."""


def is_provider_installed(provider: str) -> bool:
    """Return whether the provider's package is installed; nothing heavy is imported."""
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    plugin = PROVIDERS[provider].plugin
    if plugin is not None:
        return importlib.util.find_spec(plugin) is not None
    if provider == "cpu":
        return True
    return PROVIDERS[provider].name in _import_onnxruntime().get_available_providers()


def _import_onnxruntime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BackendError("onnxruntime is not installed", remedy=PROVIDERS["cpu"].install) from error


def build_spin_settings(threads: int) -> dict[str, str]:
    """Return ONNX Runtime's settings for how long the threads of a session spin before they sleep.

    Every engine has its own threads. Threads that spin after a run take cores from what runs next: another engine,
    another pipeline, another program (`benchmarks/threads.py`). Waking one other thread is quick, so it sleeps at once.
    Waking many takes longer than an operator of a small network, so they spin for a while, but never after a run.
    """
    if threads <= 2:
        return {"session.intra_op.allow_spinning": "0"}
    return {"session.force_spinning_stop": "1", "session.intra_op.spin_duration_us": str(SPIN_US)}


class OnnxRuntimeBackend:
    """Sessions of one provider, with bound buffers so that no run copies a latent."""

    def __init__(self, options: BackendOptions) -> None:
        self._ort = _import_onnxruntime()
        self._options = options
        self.key = options.provider or "cpu"
        if self.key not in PROVIDERS:
            raise BackendError(f"provider {self.key!r}", allowed=", ".join(PROVIDERS))
        self._provider = PROVIDERS[self.key]
        self._threads = min(options.threads or count_physical_cores(), count_usable_cores())
        note = None
        try:
            self._devices = self._find_devices()
        except BackendError as error:
            if not options.allow_fallback or self.key == "cpu":
                raise
            note = self._fall_back(error.given)
        self.ran = self._describe_runtime(note)

    def _fall_back(self, reason: str) -> str:
        """Use the CPU provider in place of the asked one, and return a note for the user."""
        requested, self.key = self._provider.name, "cpu"
        self._provider, self._devices = PROVIDERS["cpu"], []
        return f"{requested} was asked for, {self._provider.name} runs: {reason}"

    def _describe_runtime(self, note: str | None) -> RuntimeInfo:
        versions = {"onnxruntime": self._ort.__version__}
        device = "cuda:0" if self._provider.device == "cuda" else f"cpu, {self._threads} threads"
        return RuntimeInfo("onnxruntime", self._provider.name, device, versions, (note,) if note else ())

    def _find_devices(self) -> list[Any]:
        """Register a plug-in provider and return its devices; none for built-in providers."""
        name, plugin = self._provider.name, self._provider.plugin
        if plugin is None:
            if name not in self._ort.get_available_providers():
                raise self._make_missing_error(f"this onnxruntime {self._ort.__version__} has no {name}")
            return []
        try:
            module = importlib.import_module(plugin)
        except ImportError as error:
            raise self._make_missing_error(f"the provider {self.key} is not installed") from error
        if name not in _REGISTERED_PLUGINS:
            try:
                self._ort.register_execution_provider_library(name, module.get_library_path())
                _REGISTERED_PLUGINS.add(name)
            except Exception as error:  # ONNX Runtime raises its own Fail type, made at import
                raise self._make_missing_error(
                    f"the provider {self.key} did not load: {_format_first_line(error)}"
                ) from error
        devices = [device for device in self._ort.get_ep_devices() if device.ep_name == name]
        if self.key == "openvino":
            devices = [device for device in devices if "CPU" in str(device.device.type)][:1]
        if not devices:
            problem = find_openvino_problem() if self.key == "openvino" else ""
            raise self._make_missing_error(
                f"the provider {self.key} found no device it can use{': ' if problem else ''}{problem}"
            )
        return devices

    def _make_missing_error(self, given: str) -> BackendError:
        return BackendError(
            given, remedy=f"{self._provider.install}; `flowturbo-export doctor` shows what this machine has"
        )

    def load(self, file: EngineFile) -> OnnxRuntimeEngine:
        if file.precision not in self._provider.precisions:
            raise BackendError(
                f"{file.graph} is {file.precision}, which {self._provider.name} does not compute in",
                allowed=", ".join(self._provider.precisions),
                remedy="build for this target: flowturbo-export build-engines --target " + self.key,
            )
        cache = None
        if self.key == "openvino" and self._options.cache is not None:  # a compiled blob about halves a start
            key = hashlib.sha256(f"{file.sha256} {file.precision}".encode()).hexdigest()
            cache = self._options.cache / "openvino" / key[:24]
        try:
            try:
                session = self._create_session(file, cache)
            except Exception:  # a damaged blob may raise anything: remove it and load the file itself
                if cache is None:
                    raise
                shutil.rmtree(cache, ignore_errors=True)
                session = self._create_session(file, None)
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise EngineError(
                f"{self._provider.name} cannot load {file.path}: {_format_first_line(error)}",
                remedy="flowturbo-export verify on the directory tells whether the file is damaged",
            ) from error
        active = session.get_providers()[0]
        if active != self._provider.name:
            if not self._options.allow_fallback:
                raise BackendError(
                    f"{self._provider.name} was asked for, but ONNX Runtime would run on {active}",
                    remedy=f"{self._provider.install}; or pass --allow-fallback to accept the slower provider",
                )
            self.ran = self._describe_runtime(self._fall_back(f"ONNX Runtime chose {active}"))
        return OnnxRuntimeEngine(session, file, self._provider)

    def _create_session(self, file: EngineFile, cache: Path | None) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        for key, value in build_spin_settings(self._threads).items():
            options.add_session_config_entry(key, value)
        if file.precision == "int8" and not file.pairs_fit:
            # Without VNNI, ONNX Runtime's fastest 8-bit product adds pairs in 16 bits and saturates: wrong sums.
            options.add_session_config_entry("session.x64quantprecision", "1")
        if self._devices:
            # OpenVINO drops to bf16 on AMX by itself; precision is what the build says, no less.
            precision = "bf16" if file.precision == "bf16" else "f32"
            settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": self._threads}
            settings |= {} if cache is None else {"CACHE_DIR": str(cache)}
            plugin_options = {"load_config": json.dumps({"CPU": settings})} if self.key == "openvino" else {}
            options.add_provider_for_devices(self._devices, plugin_options)
            if not self._options.allow_fallback:
                options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            return self._ort.InferenceSession(str(file.path), sess_options=options)
        if self.key == "cpu":
            # ONNX Runtime allocates a memory plan beside the first run's memory: it would double activations.
            options.enable_mem_pattern = False
            if file.graph.endswith("conditioning"):
                # It runs once per schedule: a packed copy of a third of all weights is not worth its memory. Without
                # one the file is mapped, and its pages can be dropped.
                options.add_session_config_entry("session.disable_prepacking", "1")
        if self.key == "cuda":
            providers: list[Any] = [(self._provider.name, {"use_tf32": "0"})]
        else:
            providers = [self._provider.name]
        return self._ort.InferenceSession(str(file.path), sess_options=options, providers=providers)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        if self._provider.device == "cpu":
            return allocate_host(shape, dtype)
        return OrtDeviceBuffer(
            self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), "cuda", 0), shape, np.dtype(dtype)
        )

    def close(self) -> None:
        self._devices = []


class OrtDeviceBuffer:
    """Memory on a CUDA device, held by an OrtValue; slots are offsets into it."""

    def __init__(self, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int = 0) -> None:
        self._value, self.shape, self.dtype, self._offset = value, shape, dtype, offset

    @property
    def pointer(self) -> int:
        return int(self._value.data_ptr()) + self._offset

    @property
    def _is_whole(self) -> bool:
        return not self._offset and tuple(self._value.shape()) == self.shape

    def upload(self, array: NDArray[Any]) -> None:
        if array.shape != self.shape or array.dtype != self.dtype:
            raise AssertionError(f"{array.dtype}{array.shape} does not fit a buffer of {self.dtype}{self.shape}")
        array = np.ascontiguousarray(array)
        if self._is_whole:
            self._value.update_inplace(array)
            return
        stream = _use_copy_stream()
        stream.upload(self.pointer, array.ctypes.data, array.nbytes)
        stream.wait()

    def numpy(self) -> NDArray[Any]:
        if self._is_whole:
            return np.array(self._value.numpy())
        host = np.empty(self.shape, self.dtype)
        _use_copy_stream().download(host.ctypes.data, self.pointer, host.nbytes)
        return host

    def slot(self, index: int) -> OrtDeviceBuffer:
        size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        return OrtDeviceBuffer(self._value, self.shape[1:], self.dtype, self._offset + index * size)

    def head(self, count: int) -> OrtDeviceBuffer:
        return OrtDeviceBuffer(self._value, (count, *self.shape[1:]), self.dtype, self._offset)

    def copy_from(self, source: OrtDeviceBuffer) -> None:
        """Copy on the device; ONNX Runtime works in the primary context and waits for the device after every run."""
        stream = _use_copy_stream()
        stream.copy(self.pointer, source.pointer, int(np.prod(self.shape)) * self.dtype.itemsize)
        stream.wait()


_open_copy_stream = lru_cache(maxsize=1)(CudaStream)


def _use_copy_stream() -> CudaStream:
    """Return the driver's stream for copies between buffers, current in this thread; ONNX Runtime has no such copy."""
    stream = _open_copy_stream()
    stream.make_current()
    return stream


class OnnxRuntimeEngine:
    """An ONNX Runtime session."""

    def __init__(self, session: Any, file: EngineFile, provider: Provider) -> None:
        self._session, self._file = session, file
        tensor_names = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]
        file_names = match_names(file.spec, [*tensor_names[0], *tensor_names[1]])
        if file_names is None:
            raise EngineError(
                f"{file.path} does not keep the engine contract: "
                f"inputs {', '.join(tensor_names[0])}; outputs {', '.join(tensor_names[1])}",
                remedy="build the directory again with this version",
            )
        self._binding: _IoBinding | None = _IoBinding(session.io_binding(), file.spec, provider, file_names)

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        if self._binding is None:
            raise EngineError(f"{self._file.graph} was closed", remedy="load the pipeline again")
        self._binding.bind_inputs(inputs)
        self._binding.bind_outputs(outputs)
        try:
            self._session.run_with_iobinding(self._binding.binding)
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise EngineError(f"{self._file.graph} failed in ONNX Runtime: {_format_first_line(error)}") from error

    def close(self) -> None:
        self._binding = None  # before the session that it belongs to
        self._session = None


class _IoBinding:
    """The buffers of a session, bound again only where they differ from the call before.

    A plug-in provider copies an input when it is bound, and would not see what a later call changes in place (the
    history of slopes). So its inputs are bound again for every call.
    """

    def __init__(self, binding: Any, spec: GraphSpec, provider: Provider, file_names: Mapping[str, str]) -> None:
        self.binding, self._device, self._file_names = binding, provider.device, file_names
        self._copies_inputs = provider.plugin is not None
        self._types = {name: tensor.numpy_dtype for name, tensor in (spec.inputs | spec.outputs).items()}
        self._memory: dict[str, tuple[int, tuple[int, ...]]] = {}

    def bind_inputs(self, buffers: Mapping[str, Buffer]) -> None:
        if self._copies_inputs:
            for name in buffers:
                self._memory.pop(name, None)
        self._bind(self.binding.bind_input, buffers)

    def bind_outputs(self, buffers: Mapping[str, Buffer]) -> None:
        self._bind(self.binding.bind_output, buffers)

    def _bind(self, bind: Callable[..., None], buffers: Mapping[str, Buffer]) -> None:
        for name, buffer in buffers.items():
            assert isinstance(buffer, HostBuffer | OrtDeviceBuffer), "a buffer of another backend"
            memory = buffer.pointer, buffer.shape
            if self._memory.get(name) != memory:
                bind(self._file_names[name], self._device, 0, self._types[name], buffer.shape, buffer.pointer)
                self._memory[name] = memory


def _format_first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
