"""What is benchmarked: a condition, something that makes its pictures, and one sample of how long that took."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.speed.timed_pipeline import Clock, TimedPipeline
from runtime.directory.records import Manifest
from runtime.execution.fixed_loop import Usage
from runtime.images import encode_png
from runtime.request import Request, RequestOptions
from runtime.run_report import count_nfe
from runtime.sampling.controllers import Journal
from runtime.sampling.sde import Diffusion
from runtime.system.errors import RequestError
from runtime.system.json_codec import to_json

Floats = NDArray[np.float32]

ENGINES = "engines"
"""`implementation` of a condition that runs engines; a baseline's is its name, such as torch:eager."""


@dataclass(frozen=True)
class Condition:
    """Everything that decides how long a picture takes, but the machine.

    Attributes:
        engine: label of the engine directory; the checkpoints of a baseline are those of this directory.
        implementation: `ENGINES`, or the baseline's name.
        runner, precision: what really runs.
        settings: of the sampler, whole.
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
        """What is computed, whoever computes it: equal for conditions whose times may be divided."""
        return json.dumps(
            [
                *(self.sampler, to_json(self.settings), self.guidance, self.guidance_channels),
                *(list(self.guidance_interval), self.resolution, self.batch, self.vae),
            ],
            sort_keys=True,
        )

    @property
    def name(self) -> str:
        """For tables: "engines H1P5R3 256 px × 4"."""
        label = self.engine if self.implementation == ENGINES else self.implementation
        return f"{label} {self.sampler} {self.resolution} px × {self.batch}"


@dataclass
class Sample:
    """One run of a condition: `batch` pictures.

    Attributes:
        image_ms: from the request to encoded PNGs of the whole batch.
        png_ms: of these, the encoding.
        calls: of these, every engine call by stage, on the device's clock.
    """

    image_ms: float
    png_ms: float
    calls: Mapping[str, Sequence[float]]

    @property
    def host_ms(self) -> float:
        """The rest: noise, coefficients, buffers, conversion to 8 bits, waiting."""
        return self.image_ms - self.png_ms - sum(map(sum, self.calls.values()))


class Subject(Protocol):
    """Makes the pictures of a condition; `latents` are those of the last sample, `nfe` what they took.

    `clock_name` is what its calls are timed by, `MONOTONIC` or `CUDA_EVENTS`; whole runs go by the monotonic clock.
    """

    condition: Condition
    latents: Floats
    nfe: dict[str, float]

    @property
    def clock_name(self) -> str: ...

    def sample(self) -> Sample: ...


@dataclass
class EngineSubject:
    """An engine directory through the pipeline that users run."""

    condition: Condition
    pipeline: TimedPipeline
    request: Request
    clock: Clock = time.perf_counter_ns
    latents: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    nfe: dict[str, float] = field(default_factory=dict)

    @property
    def clock_name(self) -> str:
        return self.pipeline.recorder.timer.name

    def sample(self) -> Sample:
        if self.condition.conditioning == "fresh":
            self.pipeline.forget_modulations()
        self.pipeline.recorder.take()
        start_ns = self.clock()
        latents, images, journals = self._generate()
        encode_start_ns = self.clock()
        for image in images:
            encode_png(image, {})
        end_ns = self.clock()
        self.latents = latents
        self.nfe = count_nfe(self.request, journals)
        return Sample((end_ns - start_ns) / 1e6, (end_ns - encode_start_ns) / 1e6, self.pipeline.recorder.take())

    def _generate(self) -> tuple[Floats, Sequence[NDArray[np.uint8]], list[Journal]]:
        batches = list(self.pipeline.generate_batches(self.request, Usage()))
        images = [image for batch in batches if batch.images is not None for image in batch.images]
        return (
            np.concatenate([batch.latents for batch in batches]),
            images,
            [j for batch in batches for j in batch.journals],
        )


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
    """A condition of an engine directory.

    Args:
        classes: taken in turn for the images of a batch; any known ones if empty.
        seed: of the first image.
        decode: False leaves the decoder out.

    Raises:
        RequestError: the directory cannot do it.
    """
    known_classes = [str(label) for label in sorted(pipeline.manifest.model.classes)]
    class_names = [(list(classes) or known_classes)[i % len(classes or known_classes)] for i in range(batch)]
    seeds = range(seed, seed + batch)
    request_options: RequestOptions = {**options, "seeds": seeds}
    request = pipeline.request(class_names, **request_options)
    request = request if decode else replace(request, vae=None)
    condition = describe_condition(
        label, ENGINES, describe_runner(pipeline), pipeline.precision, request, pipeline, conditioning
    )
    return EngineSubject(condition, pipeline, request)


def describe_condition(
    label: str,
    implementation: str,
    runner: str,
    precision: str,
    request: Request,
    pipeline: TimedPipeline,
    conditioning: str,
) -> Condition:
    """Describes a request."""
    interval, tile = request.sampler.interval, pipeline.decode_tile
    return Condition(
        engine=label,
        implementation=implementation,
        runner=runner,
        precision=precision,
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


def describe_runner(pipeline: TimedPipeline) -> str:
    """What really runs: "onnxruntime CPUExecutionProvider (cpu, 2 threads)"."""
    return f"{pipeline.ran.backend} {pipeline.ran.provider} ({pipeline.ran.device})"


def check_batch(batch: int, manifest: Manifest) -> str:
    """A warning where a batch is split, or "".

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


def request_to_json(classes: Sequence[str], options: RequestOptions, *, decode: bool) -> dict[str, Any]:
    """What was asked, for a process of its own."""
    return {"classes": list(classes), "options": to_json(options), "decode": decode}


def request_from_json(data: Mapping[str, Any]) -> tuple[list[str], RequestOptions]:
    """The classes and options of it."""
    options = dict(data["options"])
    if options.get("diffusion") is not None:
        options["diffusion"] = Diffusion(**options["diffusion"])
    return list(data["classes"]), options  # type: ignore[return-value]
