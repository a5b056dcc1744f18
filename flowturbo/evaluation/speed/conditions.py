"""What is benchmarked: conditions, and subjects that make their pictures."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.speed.rounds import Sample
from flowturbo.evaluation.speed.timed_pipeline import Clock, TimedPipeline
from runtime.directory.records import Manifest
from runtime.execution.fixed_loop import Usage
from runtime.images import encode_png
from runtime.request import Request, RequestOptions
from runtime.run_report import count_nfe
from runtime.sampling.controllers import Journal
from runtime.system.errors import RequestError
from runtime.system.json_codec import to_json

Floats = NDArray[np.float32]

ENGINES = "engines"
"""`implementation` of a condition that runs engines; a baseline's is its name, such as torch:eager."""


@dataclass(frozen=True)
class Condition:
    """Everything that decides how long a picture takes, except the machine.

    Attributes:
        engine: label of the engine directory; a baseline has the checkpoints of this directory.
        implementation: `ENGINES`, or the baseline's name.
        runner, precision: what really runs, for example "onnxruntime CPUExecutionProvider (cpu, 2 threads)".
        settings: all settings of the sampler.
        vae: decoder and, if it runs in tiles, their size; None for latents only.
        conditioning: "fresh" (every picture computes its modulations) or "kept" (they are there already).
    """

    engine: str
    implementation: str
    runner: str
    precision: str
    sampler: str
    settings: Mapping[str, Any]
    guidance: float
    guidance_channels: int
    guidance_interval: tuple[float, ...]
    resolution: int
    batch: int
    vae: str | None
    conditioning: str

    @property
    def task(self) -> str:
        """Return what is computed, by any implementation: equal for conditions whose times may be divided."""
        return json.dumps(
            [
                *(self.sampler, to_json(self.settings), self.guidance, self.guidance_channels),
                *(list(self.guidance_interval), self.resolution, self.batch, self.vae),
            ],
            sort_keys=True,
        )

    @property
    def name(self) -> str:
        """Return a name for tables: "engines H1P5R3 256 px × 4"."""
        return f"{self.label} {self.resolution} px × {self.batch}"

    @property
    def maker(self) -> str:
        """Return the engine directory's label, or the baseline's name."""
        return self.engine if self.implementation == ENGINES else self.implementation

    @property
    def label(self) -> str:
        """Return a short name for rows: "engines H1P5R3"."""
        return f"{self.maker} {self.sampler}"


@dataclass
class Subject(ABC):
    """Makes the pictures of a condition.

    Attributes:
        clock: of whole runs.
        latents, nfe: of the last sample: its latents, and the evaluations of each network.
    """

    condition: Condition
    request: Request
    clock: Clock = field(default=time.perf_counter_ns, kw_only=True)
    latents: Floats = field(default_factory=lambda: np.empty(0, np.float32), kw_only=True)
    nfe: dict[str, float] = field(default_factory=dict, kw_only=True)

    @property
    def name(self) -> str:
        return self.condition.name

    @property
    @abstractmethod
    def clock_name(self) -> str:
        """Return the clock that times its calls, `MONOTONIC` or `CUDA_EVENTS`."""

    @abstractmethod
    def make_images(self) -> tuple[Floats, Iterable[NDArray[np.uint8]], list[Journal]]:
        """Return latents [B, C, H, W], pictures, and the journals of adaptive samplers."""

    @abstractmethod
    def take_calls(self) -> Mapping[str, Sequence[float]]:
        """Return the milliseconds of every call of the last run by stage."""

    def sample(self) -> Sample:
        start_ns = self.clock()
        self.latents, images, journals = self.make_images()
        encode_start_ns = self.clock()
        for image in images:
            encode_png(image, {})
        end_ns = self.clock()
        self.nfe = count_nfe(self.request, journals)
        return Sample((end_ns - start_ns) / 1e6, (end_ns - encode_start_ns) / 1e6, self.take_calls())


@dataclass
class EngineSubject(Subject):
    """An engine directory in the pipeline that users run."""

    pipeline: TimedPipeline

    @property
    def clock_name(self) -> str:
        return self.pipeline.recorder.timer.name

    def sample(self) -> Sample:
        if self.condition.conditioning == "fresh":
            self.pipeline.forget_modulations()
        self.take_calls()
        return super().sample()

    def make_images(self) -> tuple[Floats, Iterable[NDArray[np.uint8]], list[Journal]]:
        batches = list(self.pipeline.generate_batches(self.request, Usage()))
        return (
            np.concatenate([batch.latents for batch in batches]),
            [image for batch in batches if batch.images is not None for image in batch.images],
            [journal for batch in batches for journal in batch.journals],
        )

    def take_calls(self) -> Mapping[str, Sequence[float]]:
        return self.pipeline.recorder.take()


def build_engine_subject(
    label: str,
    pipeline: TimedPipeline,
    classes: Sequence[str],
    batch: int,
    options: RequestOptions,
    *,
    conditioning: str,
    seed: int = 0,
    decode: bool = True,
) -> EngineSubject:
    """Return the subject of an engine directory.

    Args:
        classes: taken in turn for the images of a batch; any known ones if empty.
        seed: of the first image.
        decode: False leaves the decoder out.

    Raises:
        RequestError: the directory cannot do it.
    """
    class_names = list(classes) or [str(index) for index in sorted(pipeline.manifest.model.classes)]
    request_options: RequestOptions = {**options, "seeds": range(seed, seed + batch)}
    request = pipeline.request([class_names[i % len(class_names)] for i in range(batch)], **request_options)
    request = request if decode else replace(request, vae=None)
    interval, tile, ran = request.sampler.interval, pipeline.decode_tile, pipeline.ran
    condition = Condition(
        engine=label,
        implementation=ENGINES,
        runner=f"{ran.backend} {ran.provider} ({ran.device})",
        precision=pipeline.precision,
        sampler=request.sampler.name,
        settings=to_json(request.sampler.settings),
        guidance=request.scales[0],
        guidance_channels=request.guidance_channels,
        guidance_interval=(interval.start, interval.end),
        resolution=pipeline.resolution,
        batch=len(request.labels),
        vae=f"{request.vae} in tiles of {tile} px" if request.vae and tile else request.vae,
        conditioning=conditioning,
    )
    return EngineSubject(condition, request, pipeline)


def check_batch(batch: int, manifest: Manifest) -> str:
    """Return a warning where a batch is split, else "".

    Raises:
        RequestError: no such batch.
    """
    if not 1 <= batch <= 1024:
        raise RequestError(f"batch {batch}", allowed="1 to 1024 images, separated by commas: --batch 1,2,4,8")
    if batch > manifest.max_batch:
        num_parts = -(-batch // manifest.max_batch)
        return (
            f"batch {batch} runs in {num_parts} parts: these engines take at most {manifest.max_batch} images at once"
        )
    return ""
