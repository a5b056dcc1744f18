"""FlowTurbo at the edge: train a SiT and its velocity refiner, export them once, generate anywhere.

    from flowturbo import Pipeline

    with Pipeline.load("engines") as pipeline:
        images = pipeline.generate([207], seeds=[0])  # uint8 [B, H, W, 3]

Names are imported when they are first used: what generates needs no torch, what trains does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from runtime.system.version import VERSION as __version__

if TYPE_CHECKING:
    from flowturbo.checkpoints import Network, load_network, save_network
    from flowturbo.models.sit import SiT, SiTConfig
    from flowturbo.models.vae import Vae, load_vae
    from runtime.directory.manifest import read_manifest
    from runtime.directory.records import Manifest
    from runtime.pipeline import Pipeline, Result
    from runtime.request import Request
    from runtime.system.errors import (
        BackendError,
        CheckpointError,
        EngineError,
        FlowTurboError,
        NonFiniteError,
        OutputError,
        ProofError,
        RequestError,
    )

_NAMES_BY_MODULE = {
    "runtime.pipeline": ("Pipeline", "Result"),
    "runtime.request": ("Request",),
    "runtime.directory.manifest": ("read_manifest",),
    "runtime.directory.records": ("Manifest",),
    "runtime.system.errors": (
        "BackendError",
        "CheckpointError",
        "EngineError",
        "FlowTurboError",
        "NonFiniteError",
        "OutputError",
        "ProofError",
        "RequestError",
    ),
    "flowturbo.checkpoints": ("Network", "load_network", "save_network"),  # from here on: torch
    "flowturbo.models.sit": ("SiT", "SiTConfig"),
    "flowturbo.models.vae": ("Vae", "load_vae"),
}
_MODULE_BY_NAME = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = [
    "BackendError",
    "CheckpointError",
    "EngineError",
    "FlowTurboError",
    "Manifest",
    "Network",
    "NonFiniteError",
    "OutputError",
    "Pipeline",
    "ProofError",
    "Request",
    "RequestError",
    "Result",
    "SiT",
    "SiTConfig",
    "Vae",
    "__version__",
    "load_network",
    "load_vae",
    "read_manifest",
    "save_network",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_BY_NAME[name]), name)
    globals()[name] = value  # so that this is asked once per name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
