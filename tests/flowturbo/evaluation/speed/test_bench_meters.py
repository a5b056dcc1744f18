"""Memory, energy, clocks: from trees of files and libraries like those that devices have, and from this machine."""

from __future__ import annotations

import ctypes
import mmap
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowturbo.evaluation.speed.energy import NvmlMeter, RaplMeter, SensorMeter, find_energy_meter, measure_energy
from flowturbo.evaluation.speed.environment import list_environment_warnings, read_environment, read_governor
from flowturbo.evaluation.speed.memory import read_process_memory, reset_peak_memory
from flowturbo.evaluation.speed.nvml import Nvml
from flowturbo.evaluation.speed.timed_pipeline import CallRecorder, EventTimer, HostTimer
from runtime.system import hardware
from runtime.system.cuda_driver import CudaStream, Gpu
from runtime.system.errors import BackendError


def tree(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return folder


RAPL = {
    "intel-rapl:0/name": "package-0",
    "intel-rapl:0/energy_uj": 900_000,
    "intel-rapl:0/max_energy_range_uj": 999_999,
    "intel-rapl:0:0/name": "core",
    "intel-rapl:0:0/energy_uj": 1,
    "intel-rapl:0:0/max_energy_range_uj": 999_999,
    "intel-rapl:1/name": "package-1",
    "intel-rapl:1/energy_uj": 0,
    "intel-rapl:1/max_energy_range_uj": 999_999,
}
ORIN = {
    "hwmon0/name": "nvme",
    "hwmon3/name": "ina3221",
    "hwmon3/in1_label": "VDD_GPU_SOC",
    "hwmon3/in1_input": 5000,
    "hwmon3/curr1_input": 1000,
    "hwmon3/in2_label": "VDD_IN",
    "hwmon3/in2_input": 19000,
    "hwmon3/curr2_input": 500,
}


def test_rapl_adds_packages_and_survives_a_counter_that_wraps(tmp_path: Path) -> None:
    meter = RaplMeter(tree(tmp_path, RAPL))
    meter.start()
    tree(
        tmp_path,
        {"intel-rapl:0/energy_uj": 400_000, "intel-rapl:1/energy_uj": 250_000, "intel-rapl:0:0/energy_uj": 9e5},
    )
    assert meter.stop() == pytest.approx(0.5 + 0.25)
    assert "2 CPU package" in meter.scope


def test_a_board_counter_stands_for_everything(tmp_path: Path) -> None:
    board = {"intel-rapl:2/name": "psys", "intel-rapl:2/energy_uj": 0, "intel-rapl:2/max_energy_range_uj": 10**9}
    meter = RaplMeter(tree(tmp_path, RAPL | board))
    meter.start()
    tree(tmp_path, {"intel-rapl:2/energy_uj": 3_000_000})
    assert meter.stop() == pytest.approx(3.0)
    assert meter.scope == "the board"


def test_a_jetsons_input_rail_stands_for_its_parts(tmp_path: Path) -> None:
    ticks = count()
    meter = SensorMeter(tree(tmp_path, ORIN), clock=lambda: float(next(ticks)))
    assert meter.read_watts() == pytest.approx(9.5)
    meter.start()
    time.sleep(0.06)
    joules = meter.stop()
    assert joules == pytest.approx(9.5 * (next(ticks) - 1))  # one second of the meter's clock per sample
    assert joules > 0
    assert meter.scope == "rail VDD_IN, the whole board"


def test_an_agx_orins_rails_are_added_up_without_parts_of_others(tmp_path: Path) -> None:
    """Two chips; VIN_SYS_5V0 is one rail of three and feeds the memory; one channel is off and cannot be read."""
    rails = (
        ("hwmon1", 1, "VDD_GPU_SOC", 8),
        ("hwmon1", 2, "VDD_CPU_CV", 3),
        ("hwmon1", 3, "VIN_SYS_5V0", 5),
        ("hwmon2", 2, "VDDQ_VDD2_1V8AO", 2),
    )
    files: dict[str, object] = {"hwmon1/name": "ina3221", "hwmon2/name": "ina3221", "hwmon2/in1_label": "NC"}
    for chip, number, label, watts in rails:
        files |= {
            f"{chip}/in{number}_label": label,
            f"{chip}/in{number}_input": 5000,
            f"{chip}/curr{number}_input": 200 * watts,
        }
    meter = SensorMeter(tree(tmp_path, files))
    assert meter.read_watts() == pytest.approx(8 + 3 + 5)
    assert meter.scope == "rails VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"


def test_a_sensor_that_fails_gives_no_sum(tmp_path: Path) -> None:
    meter = SensorMeter(tree(tmp_path, ORIN))
    for file in tmp_path.rglob("curr*_input"):
        file.write_text("")  # as a bus that is busy reads
    meter.start()
    with pytest.raises(BackendError, match="could not be read"):
        meter.stop()


def test_thors_input_is_the_whole_board(tmp_path: Path) -> None:
    files = {"hwmon0/name": "ina238", "hwmon0/in1_input": 20000, "hwmon0/curr1_input": 3000, "hwmon0/in0_input": 1}
    meter = SensorMeter(tree(tmp_path, files))
    assert (meter.read_watts(), meter.scope) == (60.0, "rail VIN, the whole board")


def test_where_nothing_counts_energy_the_reason_is_said(tmp_path: Path) -> None:
    meter, why = find_energy_meter(False, tmp_path, tmp_path)
    assert meter is None
    assert "no INA power sensor" in why
    assert "no energy counter of the CPU" in why
    assert find_energy_meter(False, tree(tmp_path / "rapl", RAPL), tmp_path / "none")[0].name == "RAPL"  # type: ignore[union-attr]


def test_counters_that_only_root_reads_are_named(tmp_path: Path) -> None:
    folder = tree(tmp_path, RAPL)
    (folder / "intel-rapl:0" / "energy_uj").unlink()
    (folder / "intel-rapl:0" / "energy_uj").mkdir()  # as unreadable to root as a protected file is to others
    with pytest.raises(BackendError, match="cannot be read"):
        RaplMeter(folder)


def test_energy_is_counted_over_whole_pictures() -> None:
    class Steady:
        name, scope = "clock", "a lamp of 10 W"
        began = 0.0

        def start(self) -> None:
            self.began = time.monotonic()

        def stop(self) -> float:
            return 10 * (time.monotonic() - self.began)

    found = measure_energy(Steady(), lambda: time.sleep(0.01), 2, 0.05)
    assert found.images >= 2
    assert found.watts == pytest.approx(10, rel=0.2)
    assert found.idle_watts == pytest.approx(10, rel=0.5)
    assert found.joules_per_image == pytest.approx(found.joules / found.images)


def test_the_peak_is_this_processs_and_can_be_started_anew() -> None:
    if reset_peak_memory():
        pytest.skip("this system does not let a process reset its peak")
    before = read_process_memory()
    assert before.rss_bytes
    assert before.anonymous_bytes
    assert before.file_bytes is not None
    assert before.peak_rss_bytes is not None
    # A mapping of its own: memory of NumPy's may be a part of the heap that was touched before, and stay in it.
    block = mmap.mmap(-1, 64 << 20)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    grown = read_process_memory().peak_rss_bytes
    assert grown is not None
    assert grown >= before.rss_bytes + (60 << 20)
    block.close()
    assert reset_peak_memory() == ""
    after = read_process_memory().peak_rss_bytes
    assert after is not None
    assert after < grown - (30 << 20)


def test_memory_of_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert read_process_memory(tmp_path).peak_rss_bytes is None
    assert "since the process started" in reset_peak_memory(tmp_path)


SECOND = "0000:65:00.0"
"""Where the GPU that CUDA shows first is plugged in, as with CUDA_VISIBLE_DEVICES=1."""


class Library:
    """libnvidia-ml as far as it is used: every function writes through its last argument."""

    numbers = {  # noqa: RUF012
        "nvmlDeviceGetPowerUsage": 71_500,
        "nvmlDeviceGetEnforcedPowerLimit": 350_000,
        "nvmlDeviceGetTemperature": 61,
        "nvmlDeviceGetTotalEnergyConsumption": 123_456,
        "nvmlDeviceGetCurrentClocksThrottleReasons": 4,
    }

    def __init__(self, name: str) -> None:
        assert name == "libnvidia-ml.so.1"

    def __getattr__(self, name: str) -> Any:
        if name == "nvmlInit_v2":
            return lambda *arguments: 0
        if name == "nvmlDeviceGetHandleByPciBusId_v2":
            return lambda bus, device: 0 if bus.value == SECOND.encode() else 6  # NVML_ERROR_NOT_FOUND
        if name.endswith("ClockInfo"):
            return lambda device, kind, out: self._write(out, 1980 if "Max" in name else 1755)
        if name == "nvmlDeviceGetMemoryInfo":
            return lambda device, out: self._used(out)
        if name in self.numbers:
            return lambda *arguments: self._write(arguments[-1], self.numbers[name])
        raise AttributeError(name)

    @staticmethod
    def _write(out: Any, value: int) -> int:
        out._obj.value = value
        return 0

    @staticmethod
    def _used(out: Any) -> int:
        out._obj.used = 5 << 30
        return 0


def test_nvml_tells_clocks_power_and_energy() -> None:
    nvml = Nvml(SECOND, Library)
    state = nvml.read_state()
    assert (state.sm_clock_mhz, state.max_sm_clock_mhz, state.temperature_c) == (1755, 1980, 61)
    assert (state.power_w, state.power_limit_w) == (71.5, 350.0)
    assert nvml.read_energy_joules() == pytest.approx(123.456)
    assert nvml.read_used_bytes() == 5 << 30


def test_nvml_reads_the_gpu_that_backends_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML's first GPU is another where CUDA_VISIBLE_DEVICES hides it."""
    shown = Gpu("RTX 4090", (8, 9), 24 << 30, False, "13.0", SECOND)
    monkeypatch.setattr(hardware, "detect_gpus", lambda: ((shown,), ""))
    assert Nvml.for_first_gpu(Library).read_used_bytes() == 5 << 30
    monkeypatch.setattr(hardware, "detect_gpus", lambda: ((replace(shown, bus_id="0000:01:00.0"),), ""))
    with pytest.raises(BackendError, match=r"error 6 for the GPU at 0000:01:00\.0"):
        Nvml.for_first_gpu(Library)
    monkeypatch.setattr(hardware, "detect_gpus", lambda: ((), "no driver"))
    with pytest.raises(BackendError, match="no driver"):
        Nvml.for_first_gpu(Library)


def test_a_counter_that_goes_silent_gives_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = NvmlMeter(Nvml(SECOND, Library))
    meter.start()
    monkeypatch.setattr(Library, "numbers", {})  # the driver was unloaded, or says an error
    with pytest.raises(BackendError, match="tells no energy counter"):
        meter.stop()


def test_a_machine_without_nvml_says_so() -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(BackendError, match="management library is not here"):
        Nvml(SECOND, missing)


def test_a_jetsons_nvml_that_supports_nothing_counts_nothing() -> None:
    """JetPack 7 has the library; every query says NVML_ERROR_NOT_SUPPORTED."""

    class Tegra(Library):
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: 0 if name in ("nvmlInit_v2", "nvmlDeviceGetHandleByPciBusId_v2") else 3

    assert Nvml(SECOND, Tegra).read_used_bytes() is None
    assert set(vars(Nvml(SECOND, Tegra).read_state()).values()) == {None}
    with pytest.raises(BackendError, match="tells no energy counter"):
        NvmlMeter(Nvml(SECOND, Tegra))


def test_an_old_driver_without_a_function_leaves_a_gap() -> None:
    class Old(Library):
        numbers = {}  # noqa: RUF012

    assert Nvml(SECOND, Old).read_energy_joules() is None
    assert Nvml(SECOND, Old).read_state().power_w is None


def test_this_environment_is_described() -> None:
    found = read_environment()
    assert found["cpu"]["model"]
    assert found["versions"]["numpy"] == np.__version__
    assert found["flowturbo"]


def test_the_governor_is_read_and_complained_about(tmp_path: Path) -> None:
    files = {
        "cpu0/cpufreq/scaling_governor": "powersave",
        "cpu0/cpufreq/scaling_min_freq": 800_000,
        "cpu0/cpufreq/scaling_max_freq": 3_600_000,
        "intel_pstate/no_turbo": 1,
    }
    found = read_governor(tree(tmp_path, files))
    assert (found.governor, found.min_mhz, found.max_mhz, found.boost) == ("powersave", 800, 3600, False)
    assert any("governor is powersave" in text for text in list_environment_warnings(read_environment(tmp_path)))


def test_worries_about_a_busy_or_throttled_machine() -> None:
    found = read_environment()
    found |= {"load_average": [7.0, 0, 0], "jetson": {"power_mode": "15W"}, "gpu_state": {"throttle_reasons": 0x24}}
    found["cpu"] |= {"logical_cores": 2, "governor": "performance"}
    said = " ".join(list_environment_warnings(found))
    for part in ("busy before", "load 7.0 on 2 cores", "power mode 15W", "0x24"):
        assert part in said
    found |= {"load_average": [0.1, 0, 0], "jetson": None, "gpu_state": {"throttle_reasons": 1}}
    assert list_environment_warnings(found) == []


class Driver:
    """Records calls; events are numbers, and the n-th recorded one is n milliseconds late."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.made = count(1)
        self.times: dict[int, float] = {}

    def call(self, name: str, *arguments: Any) -> None:
        self.calls.append(name)
        if name == "cuEventCreate":
            arguments[0]._obj.value = next(self.made)
        elif name == "cuEventRecord":
            self.times[arguments[0]] = float(len(self.times))
        elif name == "cuEventElapsedTime":
            arguments[0]._obj.value = self.times[arguments[2]] - self.times[arguments[1]]


def test_spans_on_cuda_are_between_events_of_the_stream() -> None:
    stream = CudaStream.__new__(CudaStream)
    stream.driver = driver = Driver()  # type: ignore[assignment]
    stream._context, stream._stream = ctypes.c_void_p(1), ctypes.c_void_p(2)
    recorder = CallRecorder(EventTimer(stream))
    for stage in ("predictor", "predictor", "decoder"):
        recorder.begin(stage).end()
    assert "cuEventSynchronize" not in driver.calls  # nothing waits while the picture is made
    assert recorder.take() == {"conditioning": [], "predictor": [1.0, 1.0], "refiner": [], "decoder": [1.0]}
    assert driver.calls.count("cuEventDestroy_v2") == driver.calls.count("cuEventCreate") == 6
    assert recorder.take()["predictor"] == []


def test_spans_on_the_host_are_between_readings_of_its_clock() -> None:
    ticks = count(0, 1_500_000)
    recorder = CallRecorder(HostTimer(lambda: next(ticks)))
    recorder.begin("refiner").end()
    assert recorder.take()["refiner"] == [1.5]
