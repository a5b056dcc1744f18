"""Options of the commands that open an engine directory: what runs the engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from runtime.backends import BACKENDS
from runtime.backends.onnxruntime import PROVIDERS
from runtime.execution.decoding import TileChoice
from runtime.pipeline import Pipeline
from runtime.system.option_fields import option


@dataclass(frozen=True)
class RunnerOptions:
    """What runs the engines, see `Pipeline.load`."""

    backend: str | None = option(
        None, help="What runs the engines.", choices=tuple(BACKENDS), default_text="the fastest that can run here"
    )
    provider: str | None = option(
        None, help="ONNX Runtime execution provider.", choices=tuple(PROVIDERS), advanced=True
    )
    threads: int | None = option(
        None, help="CPU threads.", minimum=1, maximum=1024, default_text="physical cores", advanced=True
    )
    allow_fallback: bool = option(False, help="Accept a slower provider than the one asked for.", advanced=True)
    allow_foreign: bool = option(False, help="Try engines that another device or release built.", advanced=True)


@dataclass(frozen=True)
class PipelineOptions(RunnerOptions):
    """How an engine directory is opened."""

    resolution: int | None = option(None, help="Pixels a side; must have been built.", default_text="the first built")

    def load(self, folder: Path, decode_tile: TileChoice = "auto") -> Pipeline:
        """Open an engine directory; see `Pipeline.load`."""
        return Pipeline.load(
            folder,
            resolution=self.resolution,
            backend=self.backend,
            provider=self.provider,
            threads=self.threads,
            allow_fallback=self.allow_fallback,
            allow_foreign=self.allow_foreign,
            decode_tile=decode_tile,
        )


class _TileType(click.ParamType):  # type: ignore[type-arg]  # generic in click's newest releases only
    """Pixels, "auto", or "none"."""

    name = "auto|none|px"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value)
        if text not in ("auto", "none") and not text.isdecimal():
            self.fail(f"{value!r} is not auto, none, or a number of pixels", param, ctx)
        return int(text) if text.isdecimal() else text


TILE = _TileType()
