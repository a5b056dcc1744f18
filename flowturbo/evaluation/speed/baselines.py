"""The checkpoints in PyTorch as a baseline of the benchmark. Torch is imported only where a baseline is opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.speed.conditions import Condition, Subject
from flowturbo.evaluation.speed.timed_pipeline import STAGES
from runtime.directory.records import Manifest
from runtime.sampling.controllers import Journal
from runtime.system.errors import BackendError, ProofError, RequestError

if TYPE_CHECKING:
    from flowturbo.evaluation.speed.torch_baseline import TorchBaseline, TorchBaselines

Floats = NDArray[np.float32]
StageCallTimes = dict[str, list[float]]
"""Milliseconds of every call, by stage."""

BASELINE_NAME = "torch"
BASELINE_MODES = ("eager", "eager-bf16", "compile", "compile-bf16")
LATENT_RMS_TOLERANCE = {"fp32": 1e-3, "fp16": 0.15, "bf16": 0.15, "int8": 0.5}
"""Relative rms by which latents may differ, by the coarser precision of the two. Latents of other seeds differ by about
1.4; guidance multiplies rounding by about its scale, and a trajectory adds it up."""


@dataclass(frozen=True)
class BaselineOptions:
    """The engines that a baseline is compared with, and its checkpoints.

    Attributes:
        checkpoints: role (predictor, refiner, vae) → file or folder, where the user named them.
        cuda: run on the GPU, as the engines do.
    """

    manifest: Manifest
    resolution: int
    checkpoints: Mapping[str, Path]
    threads: int | None
    cuda: bool


@dataclass
class BaselineSubject(Subject):
    """A baseline as something to be measured."""

    baseline: TorchBaseline
    calls: StageCallTimes = field(default_factory=dict, kw_only=True)

    @property
    def clock_name(self) -> str:
        return self.baseline.clock_name

    def make_images(self) -> tuple[Floats, Iterable[NDArray[np.uint8]], list[Journal]]:
        self.calls = {stage: [] for stage in STAGES}
        latents, images = self.baseline.run(self.request, self.calls)
        return latents, [] if images is None else images, []

    def take_calls(self) -> StageCallTimes:
        return self.calls


def parse_baselines(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the modes of "torch" (all) or "torch:eager,torch:compile-bf16", each once.

    Raises:
        RequestError: there is no such baseline or mode.
    """
    modes: list[str] = []
    for spec in (spec.strip() for text in texts for spec in text.split(",")):
        name, _, mode = spec.partition(":")
        if name != BASELINE_NAME:
            raise RequestError(f"baseline {spec!r}", allowed=BASELINE_NAME, remedy="--baseline torch")
        if mode not in ("", *BASELINE_MODES):
            raise RequestError(f"baseline {spec}", allowed=", ".join(f"{name}:{mode}" for mode in BASELINE_MODES))
        modes.append(mode)
    return BASELINE_MODES if "" in modes else tuple(dict.fromkeys(modes))


def import_torch_baselines() -> TorchBaselines:
    """Import torch, and return what opens the baselines.

    Raises:
        BackendError: torch, or a library beside it, is missing.
    """
    try:
        from flowturbo.evaluation.speed.torch_baseline import PLUGIN
    except ImportError as error:
        raise BackendError(
            f"the baseline torch needs {error.name or error}, which is not installed",
            remedy="pip install 'flowturbo[export]', or leave --baseline out",
        ) from error
    return PLUGIN


def check_agreement(subject: BaselineSubject, engine: Condition, latents: Floats) -> float:
    """Return the relative rms between a baseline's latents and an engine's, for the same seeds.

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
