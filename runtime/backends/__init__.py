"""The backends by name, and the choice of one for an engine directory.

A new backend is a module here with a class that satisfies `base.Backend`, and one line of `BACKENDS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from runtime.backends.base import Backend, BackendOptions
from runtime.backends.onnxruntime import PROVIDERS, is_provider_installed
from runtime.directory.records import EngineRecord, Manifest
from runtime.system import hardware
from runtime.system.errors import BackendError, EngineError


@dataclass(frozen=True)
class BackendEntry:
    """A registered backend.

    Attributes:
        module, class_name: of its class; imported only when it is used.
        targets: targets of the engines that it runs; empty if it needs none.
        find_problem: returns why a target's engines cannot run here; empty if they can.
    """

    module: str
    class_name: str
    targets: tuple[str, ...]
    find_problem: Callable[[str], str]


def _find_provider_problem(target: str) -> str:
    if not is_provider_installed(target):
        return f"its package is not installed ({PROVIDERS[target].install})"
    if target == "openvino":
        return hardware.find_openvino_problem()
    return hardware.detect_gpus()[1] if PROVIDERS[target].device == "cuda" else ""


BACKENDS = {
    "tensorrt": BackendEntry(
        "runtime.backends.native.tensorrt", "TensorRTBackend", ("tensorrt",), hardware.find_tensorrt_problem
    ),
    "rtx": BackendEntry("runtime.backends.native.tensorrt", "RtxBackend", ("rtx",), hardware.find_tensorrt_problem),
    "onnxruntime": BackendEntry(
        "runtime.backends.onnxruntime", "OnnxRuntimeBackend", ("cuda", "openvino", "cpu"), _find_provider_problem
    ),
    "fake": BackendEntry("runtime.backends.fake", "FakeBackend", (), lambda target: ""),
}
"""In order of preference."""


@dataclass(frozen=True)
class BackendChoice:
    """A backend for a directory: which of its engines it runs, and why it was chosen."""

    backend: str
    target: str
    options: BackendOptions
    reason: str

    def open(self) -> Backend:
        """Load the backend's module and open it."""
        entry = BACKENDS[self.backend]
        backend: Backend = getattr(importlib.import_module(entry.module), entry.class_name)(self.options)
        return backend


def choose_backend(manifest: Manifest, backend: str | None, options: BackendOptions) -> BackendChoice:
    """Choose the asked backend, or the fastest one that has engines in the directory and can run here.

    Raises:
        BackendError: unknown, or no backend of this machine can run the directory's engines.
    """
    if backend is not None and backend not in BACKENDS:
        raise BackendError(f"backend {backend!r}", allowed=", ".join(BACKENDS))
    if options.provider is not None and backend not in (None, "onnxruntime"):
        raise BackendError(
            f"--provider {options.provider} with backend {backend}", remedy="providers are onnxruntime's"
        )
    if backend == "fake":
        return BackendChoice("fake", manifest.list_targets()[0], options, "asked for")
    if options.provider is not None:
        return BackendChoice("onnxruntime", _find_provider_target(manifest, options.provider), options, "asked for")
    names = [backend] if backend else [name for name in BACKENDS if name != "fake"]
    available, problems = manifest.list_targets(), []
    for name in names:
        for target in BACKENDS[name].targets:
            if target not in available:
                continue
            if problem := BACKENDS[name].find_problem(target):
                problems.append(f"{target}: {problem}")
                continue
            provider = target if name == "onnxruntime" else None
            problem = f"fastest of {', '.join(available)} here" if len(available) > 1 else "the only one built"
            return BackendChoice(name, target, replace(options, provider=provider), problem)
    raise BackendError(
        f"nothing here can run this directory's engines ({', '.join(available)})"
        + (f"; backend {backend} was asked for" if backend else "")
        + (f": {'; '.join(problems)}" if problems else ""),
        remedy="`flowturbo-export doctor` shows what to install; or build for this machine: "
        "flowturbo-export build-engines --from DIR --target auto",
    )


def _find_provider_target(manifest: Manifest, provider: str) -> str:
    """Return the provider's own target, or another one with ONNX files in a precision that the provider computes in."""
    if provider not in PROVIDERS:
        raise BackendError(f"provider {provider!r}", allowed=", ".join(PROVIDERS))
    runnable: list[EngineRecord] = [
        e for e in manifest.engines
        if e.path.endswith(".onnx") and e.graph == "predictor" and e.precision in PROVIDERS[provider].precisions
    ]  # fmt: skip
    targets = {e.target for e in runnable}
    if not runnable:
        raise EngineError(
            f"this directory has no ONNX files that {provider} can run in their own precision",
            remedy=f"flowturbo-export build-engines --target {provider}",
        )
    return provider if provider in targets else next(e.target for e in runnable)
