"""The environment of a benchmark: machine, clocks, versions, load."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowturbo.evaluation.speed.nvml import Nvml
from runtime.system import hardware
from runtime.system.errors import BackendError
from runtime.system.version import VERSION

CPU_FOLDER = Path("/sys/devices/system/cpu")
PACKAGES = (
    *("numpy", "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-openvino", "onnxruntime-ep-nv-tensorrt-rtx-cu13"),
    *("tensorrt", "tensorrt-rtx-cu13", "torch", "pillow"),
)
BUSY_LOAD_PER_CORE = 0.2
"""Load per core before the benchmark, above which it warns."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")


@dataclass(frozen=True)
class Governor:
    """How the CPU chooses its clock: governor, limits in MHz, boost; None where the system, such as a VM, is silent."""

    governor: str | None
    min_mhz: float | None
    max_mhz: float | None
    boost: bool | None


def read_governor(folder: Path = CPU_FOLDER) -> Governor:
    """Read the governor of the first CPU."""
    frequency = folder / "cpu0" / "cpufreq"
    boost = hardware.read_system_file(folder / "cpufreq" / "boost") or {"0": "1", "1": "0"}.get(
        hardware.read_system_file(folder / "intel_pstate" / "no_turbo")
    )
    return Governor(
        governor=hardware.read_system_file(frequency / "scaling_governor") or None,
        min_mhz=_read_mhz(frequency / "scaling_min_freq"),
        max_mhz=_read_mhz(frequency / "scaling_max_freq"),
        boost=None if not boost else boost == "1",
    )


def read_environment(cpu_folder: Path = CPU_FOLDER) -> dict[str, Any]:
    """Read machine, clocks, versions and load, as JSON data; None where a value is unknown."""
    cpu, jetson = hardware.detect_cpu(), hardware.detect_jetson()
    gpus, gpu_problem = hardware.detect_gpus()
    total, available = hardware.read_memory_bytes()
    return {
        "flowturbo": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {**asdict(cpu), "features": list(cpu.features), **asdict(read_governor(cpu_folder))},
        "memory_bytes": {"total": total, "available": available},
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "gpus": [{**asdict(gpu), "capability": gpu.sm} for gpu in gpus],
        "gpu_problem": gpu_problem,
        "gpu_state": read_gpu_state() if gpus else None,
        "driver": hardware.run_command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "jetson": asdict(jetson) if jetson else None,
        "versions": list_versions(),
        "variables": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
    }


def read_gpu_state() -> dict[str, Any] | None:
    """Read clocks and power of the GPU that backends run on; None where NVML is missing, as on a Jetson."""
    try:
        return asdict(Nvml.for_first_gpu().read_state())
    except BackendError:
        return None


def list_versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def list_environment_warnings(environment: dict[str, Any]) -> list[str]:
    """Return warnings of what makes the figures of this machine doubtful."""
    warnings, cores = [], environment["cpu"]["logical_cores"]
    load = environment["load_average"]
    if load and load[0] > BUSY_LOAD_PER_CORE * cores:
        warnings.append(
            f"the machine was busy before the benchmark began: load {load[0]:.1f} on {cores} cores; "
            "figures are too slow and vary"
        )
    if (governor := environment["cpu"]["governor"]) not in (None, "performance"):
        warnings.append(f"the CPU's governor is {governor}: clocks follow the load (`performance` keeps them up)")
    jetson = environment["jetson"]
    if jetson and jetson["power_mode"] and not jetson["power_mode"].startswith("MAXN"):
        warnings.append(f"power mode {jetson['power_mode']}: nvpmodel and jetson_clocks give more (docs/jetson.md)")
    state = environment["gpu_state"]
    if state and (state["throttle_reasons"] or 0) & ~1:  # bit 0: nothing runs
        warnings.append(f"the GPU holds its clocks down (NVML throttle reasons {state['throttle_reasons']:#x})")
    return warnings


def _read_mhz(path: Path) -> float | None:
    text = hardware.read_system_file(path)
    return int(text) / 1000 if text.isdigit() else None
