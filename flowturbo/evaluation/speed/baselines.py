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
from runtime.directory.records import Manifest
from runtime.images import encode_png
from runtime.request import Request
from runtime.run_report import count_nfe
from runtime.system.errors import BackendError, ProofError, RequestError

Floats = NDArray[np.float32]
StageCallTimes = dict[str, list[float]]
"""Milliseconds of every call, by stage."""

ENTRY_POINT_GROUP = "flowturbo.baselines"
LATENT_RMS_TOLERANCE = {"fp32": 1e-3, "fp16": 0.15, "bf16": 0.15, "int8": 0.5}
"""Relative rms by which latents may differ, by the coarser precision of the two. Another seed's latents differ by about
1.4; guidance multiplies rounding by about its scale, and a trajectory adds it up."""


class Baseline(Protocol):
    """One way to run the checkpoints that engines were built from.

    `name` is what users type and reports show, `runner` and `precision` what really runs, `clock_name` what its calls
    are timed by: `MONOTONIC` or `CUDA_EVENTS` of `flowturbo.evaluation.speed.timed_pipeline`.
    """

    name: str
    runner: str
    precision: str
    clock_name: str

    def run(self, request: Request, calls: StageCallTimes) -> tuple[Floats, NDArray[np.uint8] | None]:
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

    def measure_matrix_products(self) -> Mapping[str, float]:
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
    def clock_name(self) -> str:
        return self.baseline.clock_name

    def sample(self) -> Sample:
        calls: StageCallTimes = {stage: [] for stage in STAGES}
        start_ns = self.clock()
        self.latents, images = self.baseline.run(self.request, calls)
        encode_start_ns = self.clock()
        for image in [] if images is None else images:
            encode_png(image, {})
        end_ns = self.clock()
        self.nfe = count_nfe(self.request, [])
        return Sample((end_ns - start_ns) / 1e6, (end_ns - encode_start_ns) / 1e6, calls)


def find_plugins() -> dict[str, EntryPoint]:
    """Installed baselines by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def parse_baselines(texts: Sequence[str]) -> dict[str, list[str]]:
    """ "torch" or "torch:eager,torch:compile-bf16" → modes by plug-in; an empty list means all.

    Raises:
        RequestError: no such plug-in is installed.
    """
    installed, modes_by_plugin, with_all_modes = find_plugins(), dict[str, list[str]](), set[str]()
    for spec in (spec.strip() for text in texts for spec in text.split(",")):
        name, _, mode = spec.partition(":")
        if name not in installed:
            raise RequestError(
                f"baseline {spec!r}", allowed=", ".join(installed) or "none is installed", remedy="--baseline torch"
            )
        modes_by_plugin.setdefault(name, [])
        if not mode:
            with_all_modes.add(name)
        elif mode not in modes_by_plugin[name]:
            modes_by_plugin[name].append(mode)
    return {name: [] if name in with_all_modes else modes for name, modes in modes_by_plugin.items()}


def load_plugin(name: str) -> BaselinePlugin:
    """The plug-in, whose libraries are imported here and not before.

    Raises:
        BackendError: a library that it needs is missing.
    """
    try:
        plugin: BaselinePlugin = find_plugins()[name].load()
    except ImportError as error:
        raise BackendError(
            f"the baseline {name} needs {error.name or error}, which is not installed",
            remedy="pip install 'flowturbo[export]', or leave --baseline out",
        ) from error
    return plugin


def open_baselines(modes_by_plugin: Mapping[str, Sequence[str]], options: BaselineOptions) -> list[Baseline]:
    """Every asked baseline of one engine directory.

    Raises:
        RequestError: no such mode.
    """
    baselines: list[Baseline] = []
    for name, modes in modes_by_plugin.items():
        plugin = load_plugin(name)
        if unknown_modes := [mode for mode in modes if mode not in plugin.modes]:
            raise RequestError(
                f"baseline {name}:{unknown_modes[0]}", allowed=", ".join(f"{name}:{mode}" for mode in plugin.modes)
            )
        baselines += plugin.open(modes or plugin.modes, options)
    return baselines


def check_agreement(subject: BaselineSubject, engine: Condition, latents: Floats) -> float:
    """Relative rms between a baseline's latents and an engine's, for the same seeds.

    Raises:
        ProofError: they make other pictures, so that their times may not be divided.
    """
    baseline_latents, engine_latents = subject.latents.astype(np.float64), latents.astype(np.float64)
    rms_error = float(np.sqrt(np.mean((baseline_latents - engine_latents) ** 2) / np.mean(engine_latents**2)))
    limit = max(
        LATENT_RMS_TOLERANCE.get(precision, LATENT_RMS_TOLERANCE["int8"])
        for precision in (subject.baseline.precision, engine.precision)
    )
    if not rms_error <= limit:
        raise ProofError(
            f"{subject.baseline.name} makes another picture than {engine.name}: "
            f"latents differ by {rms_error:.3g} relative rms",
            allowed=f"{limit:g}",
            remedy="name the checkpoints that the engines were built from, and look at flowturbo-export verify",
        )
    return rms_error
