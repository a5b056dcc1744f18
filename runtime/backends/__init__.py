"""The backends by name, and the choice of one for an engine directory.

A new backend is a module here with a class that satisfies `base.Backend`, and one line of `BACKENDS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from runtime.backends.base import Backend, BackendOptions
from runtime.backends.onnxruntime import PROVIDERS, installed
from runtime.directory.manifest import EngineRecord, Manifest
from runtime.system import hardware
from runtime.system.errors import BackendError, EngineError


@dataclass(frozen=True)
class BackendEntry:
    """A registered backend.

    Attributes:
        module, opens: where its class is; imported only when it is used.
        targets: engines it runs, in the manifest's words; empty: it needs none.
        against: what speaks against running a target's engines here; empty where nothing does.
    """

    module: str
    opens: str
    targets: tuple[str, ...]
    against: Callable[[str], str]


def _against_provider(target: str) -> str:
    if not installed(target):
        return f"its package is not installed ({PROVIDERS[target].install})"
    if target == "openvino":
        return hardware.against_openvino()
    return hardware.gpus()[1] if PROVIDERS[target].device == "cuda" else ""


BACKENDS = {
    "tensorrt": BackendEntry(
        "runtime.backends.native.tensorrt", "TensorRTBackend", ("tensorrt",), hardware.against_tensorrt
    ),
    "rtx": BackendEntry("runtime.backends.native.tensorrt", "RtxBackend", ("rtx",), hardware.against_tensorrt),
    "onnxruntime": BackendEntry(
        "runtime.backends.onnxruntime", "OnnxRuntimeBackend", ("cuda", "openvino", "cpu"), _against_provider
    ),
    "fake": BackendEntry("runtime.backends.fake", "FakeBackend", (), lambda target: ""),
}
"""In order of preference."""


@dataclass(frozen=True)
class Choice:
    """A backend for a directory: which of its engines it runs, and why it was chosen."""

    backend: str
    target: str
    options: BackendOptions
    reason: str

    def open(self) -> Backend:
        """Loads the backend's module and opens it."""
        entry = BACKENDS[self.backend]
        opened: Backend = getattr(importlib.import_module(entry.module), entry.opens)(self.options)
        return opened


def choose_backend(manifest: Manifest, backend: str | None, options: BackendOptions) -> Choice:
    """The asked backend, or the fastest one that has engines in the directory and can run here.

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
        return Choice("fake", manifest.targets()[0], options, "asked for")
    if options.provider is not None:
        return Choice("onnxruntime", _target_for_provider(manifest, options.provider), options, "asked for")
    names = [backend] if backend else [name for name in BACKENDS if name != "fake"]
    available, against = manifest.targets(), []
    for name in names:
        for target in BACKENDS[name].targets:
            if target not in available:
                continue
            if reason := BACKENDS[name].against(target):
                against.append(f"{target}: {reason}")
                continue
            provider = target if name == "onnxruntime" else None
            reason = f"fastest of {', '.join(available)} here" if len(available) > 1 else "the only one built"
            return Choice(name, target, replace(options, provider=provider), reason)
    raise BackendError(
        f"nothing here can run this directory's engines ({', '.join(available)})"
        + (f"; backend {backend} was asked for" if backend else "")
        + (f": {'; '.join(against)}" if against else ""),
        remedy="`flowturbo-export doctor` shows what to install; or build for this machine: "
        "flowturbo-export build-engines --from DIR --target auto",
    )


def _target_for_provider(manifest: Manifest, provider: str) -> str:
    """Engines of the provider's own target, or ONNX files of another target in a precision that it can keep."""
    if provider not in PROVIDERS:
        raise BackendError(f"provider {provider!r}", allowed=", ".join(PROVIDERS))
    runnable: list[EngineRecord] = [
        e for e in manifest.engines
        if e.path.endswith(".onnx") and e.graph == "predictor" and e.precision in PROVIDERS[provider].precisions
    ]  # fmt: skip
    by_target = {e.target for e in runnable}
    if not runnable:
        raise EngineError(
            f"this directory has no ONNX files that {provider} can run in their own precision",
            remedy=f"flowturbo-export build-engines --target {provider}",
        )
    return provider if provider in by_target else next(e.target for e in runnable)
