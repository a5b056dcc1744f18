"""Report what this machine has, what would be used on it, and the pip line for what is missing.

This runs on the base install: packages are looked up, not imported, except a provider that is asked for its devices.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runtime.backends import BACKENDS
from runtime.backends.base import BackendOptions
from runtime.backends.native.trt_api import (
    FLAVOUR_NAMES,
    FLAVOURS,
    find_installed_version,
    format_install_hint,
)
from runtime.backends.onnxruntime import PROVIDERS, OnnxRuntimeBackend, is_provider_installed
from runtime.directory.records import GPU_TARGETS
from runtime.system import hardware
from runtime.system.cuda_driver import Gpu
from runtime.system.errors import BackendError
from runtime.system.hardware import TENSORRT_MODULES
from runtime.system.version import VERSION

PACKAGES = (
    "numpy", "pillow", "click", "rich", "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-openvino",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13", "polygraphy", "torch", "onnx", "onnxscript", "diffusers", "safetensors",
)  # fmt: skip
_EXTRAS = {
    "cpu": ("onnxruntime",),
    "openvino": ("onnxruntime", "onnxruntime_ep_openvino"),
    "cuda": ("onnxruntime",),
    "tensorrt": ("tensorrt", "polygraphy"),
    "rtx": ("tensorrt_rtx", "polygraphy"),
    "export": ("torch", "onnx", "onnxscript", "diffusers", "safetensors"),
    "train": ("torch", "diffusers", "safetensors", "matplotlib"),
}
"""Extras of the package flowturbo → modules they bring."""
_PURPOSES = {
    "cpu": "run engines on the CPU",
    "openvino": "run engines on x86 CPUs, the fastest way on those with AMX",
    "cuda": "run engines on an NVIDIA GPU through ONNX Runtime",
    "tensorrt": "build and run TensorRT engines",
    "rtx": "build TensorRT-RTX engines (no GPU needed) and run them on RTX GPUs",
    "export": "build engines from checkpoints",
    "train": "train models",
}


Report = dict[str, Any]
"""A report, or a part of one: JSON-able data."""


def choose_target() -> tuple[str, str]:
    """Choose what `--target auto` means here: the fastest target that is installed and has its hardware, and why."""
    reasons: list[str] = []
    for entry in BACKENDS.values():  # from fastest to slowest
        for target in entry.targets:
            # A GPU target is built before it is run.
            missing = [module for module in _EXTRAS[target] if target in GPU_TARGETS and not _is_installed(module)]
            problem = f"{', '.join(missing)} not installed" if missing else entry.find_problem(target)
            if not problem:
                rejected = f" (not {'; not '.join(reasons)})" if reasons else ""
                return target, f"the fastest that is installed and has its hardware{rejected}"
            reasons.append(f"{target}: {problem}")
    return "cpu", f"nothing that runs engines is installed: {PROVIDERS['cpu'].install}"


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _find_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect_doctor_report() -> Report:
    """Collect everything that the command prints, as JSON-able data.

    Keys: flowturbo, python, platform, cpu, memory_bytes, gpus, gpu_problem, driver, jetson, tensorrt, providers,
    packages, target, problems, missing.
    """
    gpus, gpu_problem = hardware.detect_gpus()
    cpu = asdict(hardware.detect_cpu())
    total, available = hardware.read_memory_bytes()
    target, reason = choose_target()
    jetson = hardware.detect_jetson()
    tensorrt = {}
    for flavour in FLAVOURS:
        version = find_installed_version(flavour)
        problem = hardware.find_tensorrt_problem(flavour) if gpus else "no NVIDIA GPU"
        tensorrt[flavour] = {
            "name": FLAVOUR_NAMES[flavour],
            "version": version,
            "builds": version is not None and _is_installed("polygraphy") and (flavour == "rtx" or bool(gpus)),
            "runs": not problem,
            "why_not": problem,
        }
    return {
        "flowturbo": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {**cpu, "features": list(cpu["features"])},
        "memory_bytes": {"total": total, "available": available},
        "gpus": [{**asdict(gpu), "capability": gpu.sm} for gpu in gpus],
        "gpu_problem": gpu_problem,
        "driver": hardware.run_command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "jetson": asdict(jetson) if jetson else None,
        "tensorrt": tensorrt,
        "providers": {provider: _inspect_provider(provider) for provider in PROVIDERS},
        "packages": {name: _find_version(name) for name in PACKAGES},
        "target": {"name": target, "reason": reason},
        "problems": _find_problems(jetson),
        "missing": _list_missing_extras(gpus),
    }


def _inspect_provider(provider: str) -> Report:
    """Whether an ONNX Runtime provider really finds its devices."""
    if not is_provider_installed(provider):
        return {"works": False, "why_not": "not installed", "device": None}
    if provider == "openvino" and (problem := hardware.find_openvino_problem()):
        return {"works": False, "why_not": problem, "device": None}
    try:
        backend = OnnxRuntimeBackend(BackendOptions(provider=provider))
    except BackendError as error:
        return {"works": False, "why_not": error.given, "device": None}
    device = backend.ran.device
    backend.close()
    return {"works": True, "why_not": "", "device": device}


def _find_problems(jetson: hardware.Jetson | None) -> list[str]:
    """What is installed and does not work, or not well."""
    problems = []
    if _find_version("onnxruntime") and _find_version("onnxruntime-gpu"):
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: pip uninstall both,"
            " then install one of flowturbo[cpu] and flowturbo[cuda]"
        )
    if sys.version_info >= (3, 14):
        problems.append(f"Python {platform.python_version()} is newer than what is tested: 3.10 to 3.13")
    if jetson is None:
        return problems
    version = find_installed_version("tensorrt")
    spec = importlib.util.find_spec(TENSORRT_MODULES["tensorrt"]) if version else None
    if spec is not None and "site-packages" in str(spec.origin):
        problems.append(
            f"TensorRT {version} comes from pip, which lacks the Jetson's GPU: {format_install_hint('tensorrt')}"
        )
    if version and version.startswith("11") and (jetson.l4t or "").startswith("36"):
        problems.append(f"TensorRT {version} does not support JetPack 6, which stays on 10.3")
    if jetson.power_mode and not jetson.power_mode.startswith("MAXN"):
        problems.append(f"power mode {jetson.power_mode}: `nvpmodel` and `jetson_clocks` give more (docs/jetson.md)")
    return problems


def _list_missing_extras(gpus: tuple[Gpu, ...]) -> list[dict[str, str]]:
    """Extras with packages that are not installed, and a note where one is of no use on this machine."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    reasons_against = {
        "openvino": "" if x86 else "not on this kind of CPU",
        "cuda": "on a Jetson TensorRT serves" if hardware.is_tegra() else "" if gpus else "no NVIDIA GPU here",
        "tensorrt": "" if gpus else "no NVIDIA GPU here",
        "rtx": "" if x86 else "not on this kind of CPU",
    }
    missing = []
    for extra, modules in _EXTRAS.items():
        absent = [module for module in modules if not _is_installed(module)]
        if extra == "cuda" and not absent and not is_provider_installed("cuda"):
            absent = ["CUDAExecutionProvider"]
        if absent:
            install = format_install_hint("tensorrt") if extra == "tensorrt" else f"pip install 'flowturbo[{extra}]'"
            lacks, note = ", ".join(absent), reasons_against.get(extra, "")
            missing.append({"to": _PURPOSES[extra], "lacks": lacks, "install": install, "note": note})
    return missing


def print_doctor_report(report: Report, console: Console) -> None:
    """Print a report for people."""
    cpu, memory, jetson = report["cpu"], report["memory_bytes"], report["jetson"]
    rows = [
        ("flowturbo", f"{report['flowturbo']}, Python {report['python']}, {report['platform']}"),
        ("CPU", f"{cpu['model']}, {cpu['physical_cores']} cores; {', '.join(cpu['features']) or 'no known features'}"),
        ("memory", f"{memory['total'] / 2**30:.1f} GiB, {memory['available'] / 2**30:.1f} GiB free"),
    ]
    if jetson:
        parts = (jetson["model"], f"L4T {jetson['l4t']}", jetson["jetpack"], f"power mode {jetson['power_mode']}")
        rows.append(("Jetson", ", ".join(str(part) for part in parts)))
    for gpu in report["gpus"]:
        size = f"{gpu['memory_bytes'] / 2**30:.1f} GiB{' shared' if gpu['integrated'] else ''}"
        driver = f"driver {report['driver'] or 'unknown'}, CUDA {gpu['driver']}"
        rows.append(("GPU", f"{gpu['name']}, compute capability {gpu['capability']}, {size}, {driver}"))
    if not report["gpus"]:
        rows.append(("GPU", report["gpu_problem"]))
    for flavour in report["tensorrt"].values():
        builds = "builds engines here" if flavour["builds"] else "cannot build here"
        runs = "runs them" if flavour["runs"] else f"cannot run them: {flavour['why_not']}"
        text = f"{flavour['version']}; {builds}; {runs}" if flavour["version"] else "not installed"
        rows.append((flavour["name"], text))
    version = report["packages"]["onnxruntime"] or report["packages"]["onnxruntime-gpu"] or "not installed"
    rows.append(("ONNX Runtime", version))
    for name, provider in report["providers"].items():
        rows.append((f"  {name}", f"works: {provider['device']}" if provider["works"] else provider["why_not"]))
    rows.append(("auto is", f"{report['target']['name']}: {report['target']['reason']}"))
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in rows:
        table.add_row(f"[bold]{name}[/bold]", escape(text))
    console.print(table)
    for problem in report["problems"]:
        console.print(f"[bold red]problem[/bold red]  {escape(problem)}", soft_wrap=True)
    if report["missing"]:
        console.print("\n[bold]not installed[/bold]")
    for entry in report["missing"]:
        note = f"; {entry['note']}" if entry["note"] else ""
        console.print(f"  to {escape(entry['to'])} ({escape(entry['lacks'])}{note}):", soft_wrap=True)
        console.print(f"    {escape(entry['install'])}", soft_wrap=True)
