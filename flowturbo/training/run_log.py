"""What a run directory says, beside the options, so that the run can be repeated: command, versions, input files."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from runtime.system.hashes import sha256_cached
from runtime.system.version import VERSION

_START_KEYS = ("starts", "processes")  # these may differ between the starts of one run


def describe_file(path: Path) -> dict[str, str]:
    """A checkpoint that a run began with: where it lay and what it was."""
    return {"path": str(path), "sha256": sha256_cached(path)}


def describe_start(step: int, loop: Mapping[str, Any]) -> dict[str, Any]:
    """One start of a run: when, by which command, with which software, and the options of its loop."""
    return {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(sys.argv),
        "flowturbo": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "loop": dict(loop),
    }


def read_run_config(folder: Path) -> dict[str, Any]:
    """A run's config.json; empty if there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def list_changes(old_config: Mapping[str, Any], new_config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Options of a resumed run that are not what they were, one line each: "loop.lr 0.001 → 0.0005"."""
    for key in old_config.keys() & new_config.keys():
        name, old, new = f"{prefix}{key}", old_config[key], new_config[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from list_changes(old, new, f"{name}.")
        elif name not in _START_KEYS and old != json.loads(json.dumps(new)):
            yield f"{name} {old} → {new}"
