"""Read clocks, power, energy and temperature of a GPU from NVIDIA's management library, through ctypes.

The library comes with the driver, except on Jetson boards, where the kernel shows sensors as files.
No GPU has run this file yet; its calls are tested against a library of the same interface.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any

from runtime.system import hardware
from runtime.system.errors import BackendError

_LIBRARY_NAME = "libnvidia-ml.so.1"
_SM_CLOCK, _MEMORY_CLOCK = 1, 2  # nvmlClockType_t
_GPU_TEMPERATURE = 0  # NVML_TEMPERATURE_GPU


@dataclass(frozen=True)
class GpuState:
    """A GPU at one moment; None where its driver does not say."""

    sm_clock_mhz: int | None
    max_sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: int | None
    throttle_reasons: int | None


class _NvmlMemoryInfo(ctypes.Structure):
    _fields_ = (("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong))


class Nvml:
    """One GPU, by its address on the bus.

    NVML numbers devices by address and ignores CUDA_VISIBLE_DEVICES: its first is not CUDA's first.

    Raises:
        BackendError: the library is missing, or it does not know the GPU.
    """

    def __init__(self, bus_id: str, open_library: Callable[[str], Any] = ctypes.CDLL) -> None:
        try:
            self._library = open_library(_LIBRARY_NAME)
        except OSError as error:
            raise BackendError(f"NVIDIA's management library is not here ({error})") from error
        self._device = c_void_p()
        for name, arguments in (
            ("nvmlInit_v2", ()),
            ("nvmlDeviceGetHandleByPciBusId_v2", (c_char_p(bus_id.encode()), byref(self._device))),
        ):
            code = getattr(self._library, name)(*arguments)
            if code:
                raise BackendError(f"NVIDIA's management library: {name} gave error {code} for the GPU at {bus_id}")

    @classmethod
    def for_first_gpu(cls, open_library: Callable[[str], Any] = ctypes.CDLL) -> Nvml:
        """Open the GPU that every backend here runs on: the first that CUDA shows.

        Raises:
            BackendError: CUDA shows none, or NVML does not know it.
        """
        gpus, reason = hardware.detect_gpus()
        if not gpus:
            raise BackendError(reason)
        return cls(gpus[0].bus_id, open_library)

    def read_state(self) -> GpuState:
        """Read clocks, power and temperature."""
        power = self._query_number("nvmlDeviceGetPowerUsage")
        limit = self._query_number("nvmlDeviceGetEnforcedPowerLimit")
        return GpuState(
            sm_clock_mhz=self._query_number("nvmlDeviceGetClockInfo", _SM_CLOCK),
            max_sm_clock_mhz=self._query_number("nvmlDeviceGetMaxClockInfo", _SM_CLOCK),
            memory_clock_mhz=self._query_number("nvmlDeviceGetClockInfo", _MEMORY_CLOCK),
            power_w=None if power is None else power / 1e3,
            power_limit_w=None if limit is None else limit / 1e3,
            temperature_c=self._query_number("nvmlDeviceGetTemperature", _GPU_TEMPERATURE),
            throttle_reasons=self._query_number("nvmlDeviceGetCurrentClocksThrottleReasons", kind=c_ulonglong),
        )

    def read_used_bytes(self) -> int | None:
        """Return the bytes of the device in use by all programs."""
        memory = _NvmlMemoryInfo()
        code = self._library.nvmlDeviceGetMemoryInfo(self._device, byref(memory))
        return None if code else int(memory.used)

    def read_energy_joules(self) -> float | None:
        """Return the energy since the driver was loaded; None before Volta."""
        millijoules = self._query_number("nvmlDeviceGetTotalEnergyConsumption", kind=c_ulonglong)
        return None if millijoules is None else millijoules / 1e3

    def _query_number(self, name: str, *arguments: int, kind: Any = c_uint) -> int | None:
        value = kind()
        try:
            function = getattr(self._library, name)
        except AttributeError:
            return None
        code = function(self._device, *(c_int(argument) for argument in arguments), byref(value))
        return None if code else int(value.value)
