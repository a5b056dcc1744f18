"""Measure joules where the device reports them: NVML's counter, RAPL's counters, a Jetson's INA sensors.

A counter is read before and after. Sensors show power only, which a thread samples and sums up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flowturbo.evaluation.speed.nvml import Nvml
from runtime.system.errors import BackendError
from runtime.system.hardware import read_system_file

POWERCAP = Path("/sys/class/powercap")
HWMON = Path("/sys/class/hwmon")
SENSOR_PERIOD_SECONDS = 0.02
_BOARD_RAILS = ("VDD_IN", "VIN")
"""Rails that feed everything else: Orin Nano and NX, and Thor's carrier. AGX Orin has none: its rails are added up."""
_EXCLUDED_RAILS = ("VDDQ_VDD2_1V8AO", "NC")
"""Of AGX Orin: memory, which VIN_SYS_5V0 feeds, and a channel that measures nothing."""


class EnergyMeter(Protocol):
    """Counts joules between `start` and `stop`."""

    name: str
    scope: str

    def start(self) -> None: ...

    def stop(self) -> float: ...


@dataclass(frozen=True)
class Energy:
    """The energy of images, made back to back, and the power of the idle device.

    Attributes:
        meter, what: the meter, and the part of the machine that it covers.
        images, seconds: length of the measurement.
    """

    meter: str
    what: str
    images: int
    seconds: float
    joules: float
    joules_per_image: float
    watts: float
    idle_watts: float


class NvmlMeter:
    """The GPU's own energy counter.

    Raises:
        BackendError: it has none.
    """

    name, scope = "NVML", "the GPU board"

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml
        self._before = self._read_counter()

    def start(self) -> None:
        self._before = self._read_counter()

    def stop(self) -> float:
        return self._read_counter() - self._before

    def _read_counter(self) -> float:
        joules = self._nvml.read_energy_joules()
        if joules is None:
            raise BackendError("this GPU tells no energy counter (it came with Volta; a Jetson's NVML has none)")
        return joules


class RaplMeter:
    """The package counters of an x86 CPU, which wrap round.

    Raises:
        BackendError: there are none, or they may not be read (since 2020 Linux shows them to root only).
    """

    name = "RAPL"

    def __init__(self, powercap: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package, intel-rapl:0:1 a part of it, psys the whole board where there is one.
        zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1)
        names = {zone: read_system_file(zone / "name") for zone in zones}
        board_zones = [zone for zone in zones if names[zone].startswith("psys")]
        self._zones = board_zones or [zone for zone in zones if names[zone].startswith("package")]
        if not self._zones:
            raise BackendError(f"no energy counter of the CPU below {powercap}")
        for zone in self._zones:
            try:
                _read_whole_number(zone / "energy_uj")
            except OSError as error:
                raise BackendError(
                    f"{zone / 'energy_uj'} cannot be read ({error.strerror})", remedy="Linux shows it to root only"
                ) from error
        self.scope = "the board" if board_zones else f"{len(self._zones)} CPU package(s), without memory"
        self._before: list[int] = []

    def start(self) -> None:
        self._before = [_read_whole_number(zone / "energy_uj") for zone in self._zones]

    def stop(self) -> float:
        joules = 0.0
        for zone, before_uj in zip(self._zones, self._before, strict=True):
            after_uj = _read_whole_number(zone / "energy_uj")
            wrap_uj = _read_whole_number(zone / "max_energy_range_uj") + 1 if after_uj < before_uj else 0
            joules += (after_uj + wrap_uj - before_uj) / 1e6
        return joules


class SensorMeter:
    """INA sensors of a Jetson (voltage in mV, current in mA), sampled in a thread and summed by trapezoids.

    Raises:
        BackendError: there are none.
    """

    name = "INA sensors"

    def __init__(self, hwmon: Path = HWMON, clock: Callable[[], float] = time.monotonic) -> None:
        rails = _find_ina_rails(hwmon)
        if not rails:
            raise BackendError(f"no INA power sensor below {hwmon}")
        board_rail = next((name for name in _BOARD_RAILS if name in rails), None)
        part_rails = {name: rail for name, rail in rails.items() if name not in _EXCLUDED_RAILS}
        self._rails = [rails[board_rail]] if board_rail else list(part_rails.values())
        self.scope = f"rail {board_rail}, the whole board" if board_rail else f"rails {' + '.join(part_rails)}"
        self._clock = clock
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._joules = 0.0
        self._failure: Exception | None = None

    def read_watts(self) -> float:
        """Return the power now."""
        return sum(_read_whole_number(voltage) * _read_whole_number(current) / 1e6 for voltage, current in self._rails)

    def start(self) -> None:
        self._joules, self._failure = 0.0, None
        self._stopping.clear()
        self._thread = threading.Thread(target=self._integrate_power, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise BackendError(f"a power sensor could not be read: {self._failure}")
        return self._joules

    def _integrate_power(self) -> None:
        try:
            last_time, power = self._clock(), self.read_watts()
            is_stopped = False
            while not is_stopped:
                is_stopped = self._stopping.wait(SENSOR_PERIOD_SECONDS)
                now, next_power = self._clock(), self.read_watts()
                self._joules += (power + next_power) / 2 * (now - last_time)
                last_time, power = now, next_power
        except (OSError, ValueError) as error:
            self._failure = error  # an incomplete sum would look like a measurement


def find_energy_meter(cuda: bool, powercap: Path = POWERCAP, hwmon: Path = HWMON) -> tuple[EnergyMeter | None, str]:
    """Return the best meter of the device that the engines run on, or why there is none.

    Args:
        cuda: they run on a GPU, which has a counter.
    """
    candidates: list[Callable[[], EnergyMeter]] = [lambda: SensorMeter(hwmon), lambda: RaplMeter(powercap)]
    if cuda:
        candidates = [lambda: SensorMeter(hwmon), lambda: NvmlMeter(Nvml.for_first_gpu())]
    reasons = []
    for open_meter in candidates:
        try:
            return open_meter(), ""
        except BackendError as error:
            reasons.append(error.given)
    return None, "; ".join(reasons)


def measure_energy(
    meter: EnergyMeter,
    make_images: Callable[[], object],
    batch: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Energy:
    """Make images back to back for at least `seconds`, after a second of doing nothing.

    Args:
        make_images: makes `batch` images.
    """
    idle_seconds = min(1.0, seconds)
    meter.start()
    time.sleep(idle_seconds)
    idle_watts = meter.stop() / idle_seconds
    images, start_seconds = 0, clock()
    meter.start()
    while (elapsed := clock() - start_seconds) < seconds or not images:
        make_images()
        images += batch
    joules = meter.stop()
    elapsed = clock() - start_seconds
    return Energy(meter.name, meter.scope, images, elapsed, joules, joules / images, joules / elapsed, idle_watts)


def _find_ina_rails(hwmon: Path) -> dict[str, tuple[Path, Path]]:
    """Name of each rail → its voltage and current files; channels that are switched off cannot be read."""
    rails = {}
    for device in sorted(hwmon.glob("hwmon*")):
        chip = read_system_file(device / "name")
        channel_names = {"1": "VIN"} if chip == "ina238" else {}  # Thor's, one channel without a label
        if chip.startswith("ina3221"):
            labels = sorted(device.glob("in*_label"))
            channel_names = {
                label.name.removeprefix("in").removesuffix("_label"): read_system_file(label) for label in labels
            }
        for number, name in channel_names.items():
            rail = device / f"in{number}_input", device / f"curr{number}_input"
            with suppress(OSError, ValueError):
                for path in rail:
                    _read_whole_number(path)
                rails[name] = rail
    return rails


def _read_whole_number(path: Path) -> int:
    return int(path.read_text(encoding="utf-8"))
