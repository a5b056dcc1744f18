"""The few calls of the CUDA driver that a runner needs, directly from libcuda through ctypes.

The driver library exists wherever an NVIDIA GPU can be used, Jetson included, and its functions keep their signatures
across CUDA versions. So nothing has to be installed, or matched with the CUDA release of TensorRT. TensorRT takes these
streams and addresses, as both work in the device's primary context.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any

from runtime.system.errors import BackendError

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetPCIBusId": [c_char_p, c_int, c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDeviceTotalMem_v2": [POINTER(c_size_t), c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuMemGetInfo_v2": [POINTER(c_size_t), POINTER(c_size_t)],
    "cuMemAlloc_v2": [POINTER(c_uint64), c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuMemcpyHtoDAsync_v2": [c_uint64, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, c_uint64, c_size_t, c_void_p],
    "cuMemcpyDtoDAsync_v2": [c_uint64, c_uint64, c_size_t, c_void_p],
    "cuMemsetD8Async": [c_uint64, c_ubyte, c_size_t, c_void_p],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuEventCreate": [POINTER(c_void_p), c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuEventElapsedTime": [POINTER(c_float), c_void_p, c_void_p],
    "cuEventDestroy_v2": [c_void_p],
    "cuStreamBeginCapture_v2": [c_void_p, c_int],
    "cuStreamEndCapture": [c_void_p, POINTER(c_void_p)],
    "cuGraphInstantiateWithFlags": [POINTER(c_void_p), c_void_p, c_ulonglong],
    "cuGraphLaunch": [c_void_p, c_void_p],
    "cuGraphDestroy": [c_void_p],
    "cuGraphExecDestroy": [c_void_p],
}
_INTEGRATED, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 18, 75, 76  # CUdevice_attribute
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: TensorRT synchronises the whole device on the default stream
_CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on allocating
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class CudaError(BackendError):
    """A driver call failed; `code` is its CUresult."""

    def __init__(self, given: str, code: int, remedy: str = "") -> None:
        self.code = code
        super().__init__(given, remedy=remedy)


@dataclass(frozen=True)
class Gpu:
    """One CUDA device.

    Attributes:
        name: by the driver.
        capability: compute capability, e.g. (8, 7) for Orin.
        memory_bytes: of the device; shared with the CPU where `integrated`.
        driver: newest CUDA release the driver supports, e.g. "12.6".
        bus_id: PCI address, e.g. "0000:65:00.0", by which NVML, with another count of devices, finds it.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    integrated: bool
    driver: str
    bus_id: str = ""

    @property
    def sm(self) -> str:
        """Compute capability as NVIDIA writes it: "8.7"."""
        return f"{self.capability[0]}.{self.capability[1]}"


class CudaDriver:
    """libcuda, initialised.

    Raises:
        BackendError: there is no driver, or it has no device.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
            for name, arguments in _SIGNATURES.items():
                getattr(self._library, name).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise BackendError(
                f"no NVIDIA driver that can be used on this machine ({error})",
                remedy="install the GPU's driver, pass the GPU into the container (--gpus all, on Jetson"
                " --runtime nvidia), or use a build for --target cpu; an engine is not judged without a driver",
            ) from error
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a driver function.

        Raises:
            CudaError: it did not return CUDA_SUCCESS.
        """
        code = getattr(self._library, name)(*arguments)
        if code:
            error = self._describe_error("cuGetErrorName", code), self._describe_error("cuGetErrorString", code)
            given = f"{name} failed: {error[0]}, {error[1]}"
            raise CudaError(given, code, "free GPU memory or use a smaller batch" if code == OUT_OF_MEMORY else "")

    def _describe_error(self, name: str, code: int) -> str:
        text = c_char_p()
        getattr(self._library, name)(code, byref(text))
        return text.value.decode() if text.value else f"CUDA error {code}"

    def call_int(self, name: str, *arguments: Any) -> int:
        """Return the int that a driver function writes to its first argument."""
        value = c_int()
        self.call(name, byref(value), *arguments)
        return value.value

    def list_gpus(self) -> tuple[Gpu, ...]:
        """Return every visible device."""
        version = self.call_int("cuDriverGetVersion")
        return tuple(
            self._read_gpu(self.call_int("cuDeviceGet", ordinal), f"{version // 1000}.{version % 1000 // 10}")
            for ordinal in range(self.call_int("cuDeviceGetCount"))
        )

    def _read_gpu(self, device: int, version: str) -> Gpu:
        name, bus_id, memory = ctypes.create_string_buffer(256), ctypes.create_string_buffer(32), c_size_t()
        self.call("cuDeviceGetName", name, len(name), device)
        self.call("cuDeviceGetPCIBusId", bus_id, len(bus_id), device)
        self.call("cuDeviceTotalMem_v2", byref(memory), device)
        major, minor, integrated = (
            self.call_int("cuDeviceGetAttribute", attribute, device)
            for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _INTEGRATED)
        )
        return Gpu(
            name.value.decode(errors="replace"),
            (major, minor),
            memory.value,
            bool(integrated),
            version,
            bus_id.value.decode(errors="replace"),
        )


class CudaStream:
    """The first visible device, its primary context and one stream. Call `make_current` first in every thread.

    Raises:
        BackendError: no driver, or no device.
    """

    def __init__(self) -> None:
        self.driver = CudaDriver()
        gpus = self.driver.list_gpus()
        if not gpus:
            raise BackendError("the NVIDIA driver sees no GPU", remedy="look at CUDA_VISIBLE_DEVICES and nvidia-smi")
        self.gpu = gpus[0]
        self._device = self.driver.call_int("cuDeviceGet", 0)
        self._context = c_void_p()
        self.driver.call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        self.make_current()
        self._stream = c_void_p()
        self.driver.call("cuStreamCreate", byref(self._stream), _NON_BLOCKING)

    @property
    def handle(self) -> int:
        """The stream as TensorRT takes it."""
        return int(self._stream.value or 0)

    def make_current(self) -> None:
        """Make the context current in the calling thread."""
        self.driver.call("cuCtxSetCurrent", self._context)

    def read_free_bytes(self) -> int:
        """Return the free device memory."""
        free, total = c_size_t(), c_size_t()
        self.driver.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def allocate(self, size_bytes: int) -> int:
        """Return the address of `size_bytes` new bytes, aligned to at least 256."""
        address = c_uint64()
        self.driver.call("cuMemAlloc_v2", byref(address), size_bytes)
        return address.value

    def free(self, address: int) -> None:
        """Free memory, after waiting for the device."""
        self.driver.call("cuMemFree_v2", address)

    def zero(self, address: int, size_bytes: int) -> None:
        self.driver.call("cuMemsetD8Async", address, 0, size_bytes, self._stream)

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Copy from device to device."""
        self.driver.call("cuMemcpyDtoDAsync_v2", target, source, size_bytes, self._stream)

    def upload(self, address: int, host: int, size_bytes: int) -> None:
        """Copy from host to device. The host memory is pageable, so the driver has read it when this returns."""
        self.driver.call("cuMemcpyHtoDAsync_v2", address, host, size_bytes, self._stream)

    def download(self, host: int, address: int, size_bytes: int) -> None:
        """Copy from device to host, after everything before it on the stream."""
        self.driver.call("cuMemcpyDtoHAsync_v2", host, address, size_bytes, self._stream)
        self.wait()

    def wait(self) -> None:
        self.driver.call("cuStreamSynchronize", self._stream)

    def create_event(self) -> int:
        """Create an event for `record_event`; release it with `free_event`."""
        event = c_void_p()
        self.driver.call("cuEventCreate", byref(event), 0)
        return int(event.value or 0)

    def record_event(self, event: int) -> None:
        """Record the device's time at this place of the stream."""
        self.driver.call("cuEventRecord", event, self._stream)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Return the device's milliseconds between two events, to about half a microsecond; waits for `end`."""
        elapsed = c_float()
        self.driver.call("cuEventSynchronize", end)
        self.driver.call("cuEventElapsedTime", byref(elapsed), start, end)
        return elapsed.value

    def free_event(self, event: int) -> None:
        self.driver.call("cuEventDestroy_v2", event)

    def begin_capture(self) -> None:
        """Record the work on the stream, instead of doing it, until `end_capture`."""
        self.driver.call("cuStreamBeginCapture_v2", self._stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self) -> int:
        """Return the recorded work as an executable graph.

        Raises:
            CudaError: something in between cannot be captured.
        """
        graph, executable = c_void_p(), c_void_p()
        self.driver.call("cuStreamEndCapture", self._stream, byref(graph))
        try:
            self.driver.call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
        finally:
            self.driver.call("cuGraphDestroy", graph)
        return int(executable.value or 0)

    def launch_graph(self, executable: int) -> None:
        self.driver.call("cuGraphLaunch", executable, self._stream)

    def free_graph(self, executable: int) -> None:
        self.driver.call("cuGraphExecDestroy", executable)

    def close(self) -> None:
        """Wait for the stream and release the context."""
        if self._stream.value:
            self.make_current()
            self.wait()
            self.driver.call("cuStreamDestroy_v2", self._stream)
            self._stream = c_void_p()
            self.driver.call("cuDevicePrimaryCtxRelease_v2", self._device)
