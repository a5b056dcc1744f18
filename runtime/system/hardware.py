"""Detect this machine: CPU, memory, NVIDIA GPUs, Jetson. Reads the system, with no extra package."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from runtime.system.cuda_driver import CudaDriver, Gpu
from runtime.system.errors import BackendError

_TEGRA_RELEASE = Path("/etc/nv_tegra_release")
_DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_TOPOLOGY = Path("/sys/devices/system/cpu")
_X86_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
_ARM_FEATURES = ("asimdhp", "asimddp", "bf16", "i8mm", "sve")
CPU_FEATURES = (*_X86_FEATURES, *_ARM_FEATURES)
"""CPU features that decide how fast a precision runs."""
TENSORRT_MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
"""Python modules of TensorRT's two flavours, by target."""
SUPPORTED_GPUS = {
    "tensorrt": "compute capability 7.5 and later",
    "rtx": "compute capability 7.5, 8.0, 8.6, 8.9, 12.0 and later",
}
_RTX_EARLY = ((7, 5), (8, 0), (8, 6), (8, 9))  # then nothing before Blackwell's 12.0: no Orin, no Hopper
_JETPACK = ((39, "JetPack 7.2"), (38, "JetPack 7"), (36, "JetPack 6"), (35, "JetPack 5"))


@dataclass(frozen=True)
class Cpu:
    """Attributes: name; physical and logical cores; the known `CPU_FEATURES` it has."""

    model: str
    architecture: str
    physical_cores: int
    logical_cores: int
    features: tuple[str, ...]


@dataclass(frozen=True)
class Jetson:
    """Attributes: module name; L4T release such as "36.4.3"; the JetPack it belongs to; power mode, None if unknown."""

    model: str
    l4t: str | None
    jetpack: str | None
    power_mode: str | None


def read_system_file(path: Path) -> str:
    """Read a file of the system, such as one below /sys; "" where there is none or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").replace("\0", "").strip()
    except OSError:
        return ""


def run_command(*command: str) -> str | None:
    """Return the standard output of a command; None if it is missing, fails or takes more than ten seconds."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()


def detect_cpu() -> Cpu:
    """Detect the CPU, from /proc where there is one."""
    info = read_system_file(_CPUINFO)
    name_match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info, re.MULTILINE)
    flags_match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    flags = set(flags_match.group(1).split()) if flags_match else set()
    return Cpu(
        model=name_match.group(1).strip() if name_match else platform.processor() or platform.machine(),
        architecture=platform.machine(),
        physical_cores=count_physical_cores(),
        logical_cores=count_usable_cores(),
        features=tuple(feature for feature in CPU_FEATURES if feature in flags),
    )


def find_openvino_problem() -> str:
    """Return why ONNX Runtime's OpenVINO plug-in, which checks the maker, refuses this CPU; empty if it does not."""
    vendor_match = re.search(r"^vendor_id\s*:\s*(\S+)", read_system_file(_CPUINFO), re.MULTILINE)
    vendor = vendor_match.group(1) if vendor_match else platform.machine()
    return "" if vendor == "GenuineIntel" else f"its plug-in for ONNX Runtime serves Intel CPUs, this is {vendor}"


def count_usable_cores() -> int:
    """Return how many logical cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_physical_cores() -> int:
    """Return how many physical cores this process may use: two threads of a core share its arithmetic units."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    threads = {
        read_system_file(_TOPOLOGY / f"cpu{core}" / "topology" / "thread_siblings_list") or str(core)
        for core in allowed
    }
    return max(1, len(threads))


def read_memory_bytes() -> tuple[int, int]:
    """Return the memory of the machine and the part available now, in bytes; zeros if unknown."""
    info = dict(re.findall(r"^(\w+):\s+(\d+) kB$", read_system_file(_MEMINFO), re.MULTILINE))
    return int(info.get("MemTotal", 0)) * 1024, int(info.get("MemAvailable", 0)) * 1024


def read_cache_bytes() -> int:
    """Return the size of the first core's largest cache in bytes; 0 if unknown."""
    sizes = [read_system_file(path / "size") for path in (_TOPOLOGY / "cpu0" / "cache").glob("index*")]
    units = {"K": 1024, "M": 1024**2}
    size_matches = [re.fullmatch(r"(\d+)([KM])", size) for size in sizes]
    return max(
        (int(size_match.group(1)) * units[size_match.group(2)] for size_match in size_matches if size_match), default=0
    )


def is_tegra() -> bool:
    """Return whether this is a Jetson."""
    return _TEGRA_RELEASE.exists() or "jetson" in read_system_file(_DEVICE_TREE_MODEL).lower()


def detect_jetson() -> Jetson | None:
    """Detect the Jetson that this runs on; None elsewhere."""
    if not is_tegra():
        return None
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", read_system_file(_TEGRA_RELEASE))
    l4t = f"{release.group(1)}.{release.group(2)}" if release else None
    jetpack = next((name for major, name in _JETPACK if l4t and int(l4t.split(".")[0]) >= major), None)
    mode = re.search(r"NV Power Mode:\s*(\S+)", run_command("nvpmodel", "-q") or "")
    return Jetson(read_system_file(_DEVICE_TREE_MODEL) or "Jetson", l4t, jetpack, mode.group(1) if mode else None)


def detect_gpus() -> tuple[tuple[Gpu, ...], str]:
    """Return the CUDA devices, and why there are none (empty where there are)."""
    try:
        devices = CudaDriver().list_gpus()
    except BackendError as error:
        return (), error.given
    return devices, "" if devices else "the NVIDIA driver sees no GPU"


def is_tensorrt_installed(target: str) -> bool:
    """Return whether a flavour's package is installed; it is not imported."""
    return importlib.util.find_spec(TENSORRT_MODULES[target]) is not None


def is_gpu_supported(target: str, gpu: Gpu) -> bool:
    """Return whether a flavour of TensorRT runs on a GPU at all."""
    if target == "rtx":
        return gpu.capability in _RTX_EARLY or gpu.capability >= (12, 0)
    return gpu.capability >= (7, 5)


def find_tensorrt_problem(target: str) -> str:
    """Return why this machine cannot run engines of a flavour (package, driver, GPU); empty if it can."""
    devices, reason = detect_gpus()
    if not devices:
        return reason
    if not is_gpu_supported(target, devices[0]):
        return f"{devices[0].name} has compute capability {devices[0].sm}, {target} serves {SUPPORTED_GPUS[target]}"
    return "" if is_tensorrt_installed(target) else "its package is not installed"


def can_run_tensorrt(target: str) -> bool:
    """Return whether this machine can run engines of a flavour."""
    return not find_tensorrt_problem(target)
