"""Other implementations of the same job, found by entry point, so that the runtime depends on none of them.

A package offers some under the entry-point group `flowturbo.baselines`: the name is what users type, the object a
`BaselinePlugin`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.speed.conditions import Condition, Sample
from flowturbo.evaluation.speed.timed_pipeline import STAGES, Clock
from runtime.directory.manifest import Manifest
from runtime.images import encode_png
from runtime.request import Request
from runtime.run_report import nfe_of
from runtime.system.errors import BackendError, ProofError, RequestError

Floats = NDArray[np.float32]
Calls = dict[str, list[float]]
"""Milliseconds of every call, by stage."""

GROUP = "flowturbo.baselines"
TOLERANCE = {"fp32": 1e-3, "fp16": 0.15, "bf16": 0.15, "int8": 0.5}
"""Relative rms by which latents may differ, by the coarser precision of the two. Another seed's latents differ by about
1.4; guidance multiplies rounding by about its scale, and a trajectory adds it up."""


class Baseline(Protocol):
    """One way to run the checkpoints that engines were built from.

    `name` is what users type and reports show, `runner` and `precision` what really runs, `timed_by` what its calls
    are timed by: `MONOTONIC` or `CUDA_EVENTS` of `flowturbo.evaluation.speed.timed_pipeline`.
    """

    name: str
    runner: str
    precision: str
    timed_by: str

    def run(self, request: Request, calls: Calls) -> tuple[Floats, NDArray[np.uint8] | None]:
        """Latents [B, C, H, W] and, where the request has a decoder, pictures [B, P, P, 3].

        Args:
            calls: takes the milliseconds of every network call, by stage.
        """


@dataclass(frozen=True)
class BaselineOptions:
    """What a baseline is opened for.

    Attributes:
        checkpoints: role (predictor, refiner, vae) → file or folder, where the user named them.
        cuda: run on the GPU, as the engines do.
    """

    manifest: Manifest
    resolution: int
    checkpoints: Mapping[str, Path]
    threads: int | None
    cuda: bool


class BaselinePlugin(Protocol):
    """What an entry point leads to."""

    modes: tuple[str, ...]

    def open(self, modes: Sequence[str], options: BaselineOptions) -> Sequence[Baseline]:
        """Loads the checkpoints.

        Raises:
            CheckpointError: they are missing, or not those that the engines were built from.
            BackendError: a mode cannot run here.
        """

    def matrix_products(self) -> Mapping[str, float]:
        """FLOP/s of a large matrix product by precision, where the library can do better than NumPy's."""


@dataclass
class BaselineSubject:
    """A baseline as something to be measured."""

    condition: Condition
    baseline: Baseline
    request: Request
    clock: Clock = time.perf_counter_ns
    latents: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    nfe: dict[str, float] = field(default_factory=dict)

    @property
    def timed_by(self) -> str:
        return self.baseline.timed_by

    def sample(self) -> Sample:
        calls: Calls = {stage: [] for stage in STAGES}
        started = self.clock()
        self.latents, images = self.baseline.run(self.request, calls)
        encoding = self.clock()
        for image in [] if images is None else images:
            encode_png(image, {})
        ended = self.clock()
        self.nfe = nfe_of(self.request, [])
        return Sample((ended - started) / 1e6, (ended - encoding) / 1e6, calls)


def plugins() -> dict[str, EntryPoint]:
    """Installed baselines by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def asked_baselines(texts: Sequence[str]) -> dict[str, list[str]]:
    """ "torch" or "torch:eager,torch:compile-bf16" → modes by plug-in; an empty list means all.

    Raises:
        RequestError: no such plug-in is installed.
    """
    known, asked, whole = plugins(), dict[str, list[str]](), set[str]()
    for word in (word.strip() for text in texts for word in text.split(",")):
        name, _, mode = word.partition(":")
        if name not in known:
            raise RequestError(
                f"baseline {word!r}", allowed=", ".join(known) or "none is installed", remedy="--baseline torch"
            )
        asked.setdefault(name, [])
        if not mode:
            whole.add(name)
        elif mode not in asked[name]:
            asked[name].append(mode)
    return {name: [] if name in whole else modes for name, modes in asked.items()}


def load_plugin(name: str) -> BaselinePlugin:
    """The plug-in, whose libraries are imported here and not before.

    Raises:
        BackendError: a library that it needs is missing.
    """
    try:
        plugin: BaselinePlugin = plugins()[name].load()
    except ImportError as error:
        raise BackendError(
            f"the baseline {name} needs {error.name or error}, which is not installed",
            remedy="pip install 'flowturbo[export]', or leave --baseline out",
        ) from error
    return plugin


def open_baselines(asked: Mapping[str, Sequence[str]], options: BaselineOptions) -> list[Baseline]:
    """Every asked baseline of one engine directory.

    Raises:
        RequestError: no such mode.
    """
    opened: list[Baseline] = []
    for name, modes in asked.items():
        plugin = load_plugin(name)
        if unknown := [mode for mode in modes if mode not in plugin.modes]:
            raise RequestError(
                f"baseline {name}:{unknown[0]}", allowed=", ".join(f"{name}:{mode}" for mode in plugin.modes)
            )
        opened += plugin.open(modes or plugin.modes, options)
    return opened


def check_agreement(subject: BaselineSubject, engine: Condition, latents: Floats) -> float:
    """Relative rms between a baseline's latents and an engine's, for the same seeds.

    Raises:
        ProofError: they make other pictures, so that their times may not be divided.
    """
    own, theirs = subject.latents.astype(np.float64), latents.astype(np.float64)
    off = float(np.sqrt(np.mean((own - theirs) ** 2) / np.mean(theirs**2)))
    limit = max(
        TOLERANCE.get(precision, TOLERANCE["int8"]) for precision in (subject.baseline.precision, engine.precision)
    )
    if not off <= limit:
        raise ProofError(
            f"{subject.baseline.name} makes another picture than {engine.name}: "
            f"latents differ by {off:.3g} relative rms",
            allowed=f"{limit:g}",
            remedy="name the checkpoints that the engines were built from, and look at flowturbo-export verify",
        )
    return off
