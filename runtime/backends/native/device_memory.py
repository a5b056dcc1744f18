"""Device memory of the native runner: buffers with views, over a pool of blocks.

A pool is needed because every picture takes a few small buffers, and freeing CUDA memory stops the device.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtime.system.cuda_driver import OUT_OF_MEMORY, CudaError, CudaStream

ALIGNMENT = 512
"""Alignment that TensorRT needs for scratch memory (it has logged errors below 512, where its documentation says 256);
enough for the vector loads of any kernel."""


class DeviceBuffer:
    """Device memory that returns to its pool with the last reference; `slot` gives a view that keeps it alive."""

    def __init__(
        self,
        stream: CudaStream,
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        parent: DeviceBuffer | None = None,
    ) -> None:
        self._stream, self.address, self._shape, self.dtype, self._parent = stream, address, shape, dtype, parent

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def nbytes(self) -> int:
        return int(np.prod(self._shape, dtype=np.int64)) * self.dtype.itemsize

    def upload(self, array: NDArray[Any]) -> None:
        if array.shape != self._shape or array.dtype != self.dtype:
            raise AssertionError(f"{array.dtype}{array.shape} does not fit a buffer of {self.dtype}{self._shape}")
        contiguous = np.ascontiguousarray(array)
        self._stream.make_current()
        self._stream.upload(self.address, contiguous.ctypes.data, contiguous.nbytes)

    def numpy(self) -> NDArray[Any]:
        host = np.empty(self._shape, self.dtype)
        self._stream.make_current()
        self._stream.download(host.ctypes.data, self.address, host.nbytes)
        return host

    def slot(self, index: int) -> DeviceBuffer:
        if not 0 <= index < self._shape[0]:
            raise IndexError(f"slot {index} of {self._shape[0]}")
        view = DeviceBuffer(self._stream, self.address, self._shape[1:], self.dtype, self)
        view.address += index * view.nbytes
        return view

    def head(self, count: int) -> DeviceBuffer:
        if not 0 <= count <= self._shape[0]:
            raise IndexError(f"{count} of {self._shape[0]} slots")
        return DeviceBuffer(self._stream, self.address, (count, *self._shape[1:]), self.dtype, self)

    def copy_from(self, source: DeviceBuffer) -> None:
        if source.shape != self._shape or source.dtype != self.dtype:
            raise AssertionError(f"{source.dtype}{source.shape} does not fit {self.dtype}{self._shape}")
        self._stream.make_current()
        self._stream.copy(self.address, source.address, self.nbytes)


class MemoryPool:
    """Blocks of device memory by size. All work is on one stream, so a block may be handed out again at once."""

    def __init__(self, stream: CudaStream, lock: threading.RLock) -> None:
        self._stream, self._lock = stream, lock
        self._idle: dict[int, list[int]] = {}
        self._bases: dict[int, int] = {}  # aligned address -> what the driver gave

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceBuffer:
        """Allocate zeroed memory."""
        buffer = DeviceBuffer(self._stream, 0, shape, np.dtype(dtype))
        size_bytes = max(buffer.nbytes, 1)
        with self._lock:
            buffer.address = self.acquire(size_bytes)
            self._stream.zero(buffer.address, size_bytes)
        weakref.finalize(buffer, self.release, buffer.address, size_bytes)
        return buffer

    def acquire(self, size_bytes: int) -> int:
        """Return the address of an uninitialised block of at least `size_bytes` bytes, aligned to `ALIGNMENT`."""
        with self._lock:
            self._stream.make_current()
            idle = self._idle.get(_round_up(size_bytes))
            return idle.pop() if idle else self._allocate_block(_round_up(size_bytes))

    def release(self, address: int, size_bytes: int) -> None:
        """Put a block back for the next request of this size."""
        with self._lock:
            if address in self._bases:  # else `close` freed it already
                self._idle.setdefault(_round_up(size_bytes), []).append(address)

    def _allocate_block(self, size_bytes: int) -> int:
        try:
            base = self._stream.allocate(size_bytes + ALIGNMENT)
        except CudaError as error:
            if error.code != OUT_OF_MEMORY or not any(self._idle.values()):
                raise
            for addresses in self._idle.values():
                for address in addresses:
                    self._stream.free(self._bases.pop(address))
            self._idle.clear()
            base = self._stream.allocate(size_bytes + ALIGNMENT)
        address = -(-base // ALIGNMENT) * ALIGNMENT
        self._bases[address] = base
        return address

    def close(self) -> None:
        """Free every block, in use or not."""
        with self._lock:
            self._stream.make_current()
            for base in self._bases.values():
                self._stream.free(base)
            self._bases.clear()
            self._idle.clear()


def _round_up(size_bytes: int) -> int:
    return -(-max(size_bytes, 1) // ALIGNMENT) * ALIGNMENT
