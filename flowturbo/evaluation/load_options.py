"""How evaluation opens engine directories."""

from __future__ import annotations

from typing import TypedDict

from runtime.execution.decoding import TileChoice


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `Pipeline.load` but the resolution; its defaults where a key is missing."""

    backend: str | None
    provider: str | None
    threads: int | None
    allow_fallback: bool
    allow_foreign: bool
    decode_tile: TileChoice
