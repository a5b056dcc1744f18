"""The check that plots can be drawn, before hours of work that end with one."""

from __future__ import annotations

import importlib.util

from runtime.system.errors import BackendError


def check_matplotlib(extra: str) -> None:
    """Raise BackendError if matplotlib is missing; `extra` is the extra of this package that brings it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendError("matplotlib is not installed", remedy=f"pip install 'flowturbo[{extra}]'")
