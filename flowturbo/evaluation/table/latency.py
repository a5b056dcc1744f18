"""Time a picture with each sampler, in turns. Sampling and decoding are timed apart: a decoder serves every sampler."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.speed.rounds import Rounds, TimedCall, measure_in_turns
from flowturbo.evaluation.speed.timed_pipeline import Clock
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.sampling.noise import sample_noise
from runtime.system.errors import BackendError
from runtime.system.progress import SILENT, Progress

MAX_SAMPLER_MS, MIN_SAMPLER_ROUNDS = 2000.0, 3
"""After `MIN_SAMPLER_ROUNDS`, a sampler is timed until its runs add up to `MAX_SAMPLER_MS`: a long run varies less."""

LatentSampler = Callable[[], NDArray[np.float32]]
"""Makes latents [B, C, H, W]; all samplers of a measurement have the same B."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds per image, over the rounds."""

    median_ms: float
    p95_ms: float
    rounds: int


def time_samplers(
    pipeline: Pipeline,
    samplers: Mapping[str, LatentSampler],
    vaes: Sequence[str],
    rounds: int,
    progress: Progress = SILENT,
    clock: Clock = time.perf_counter_ns,
) -> dict[tuple[str, str], Latency]:
    """Return the latency of each sampler with each decoder, by (name of the sampler, decoder).

    Args:
        samplers: each makes as many latents as are to be made at once (1 for the latency of a picture).
        rounds: timed rounds; one more warms up.
    """
    latents: dict[str, NDArray[np.float32]] = {}

    def sample_latents(name: str) -> None:
        latents[name] = samplers[name]()

    def decode_latents(vae: str) -> None:
        pipeline.decode(next(iter(latents.values())), vae)

    subjects = [TimedCall(name, partial(sample_latents, name), clock) for name in samplers]
    subjects += [TimedCall(vae, partial(decode_latents, vae), clock) for vae in vaes]
    sampler_limit = Rounds(rounds, MAX_SAMPLER_MS / 1e3, warmup=1, min_repeats=MIN_SAMPLER_ROUNDS)
    limits = [sampler_limit] * len(samplers) + [Rounds(rounds, duration=None, warmup=1)] * len(vaes)
    series = measure_in_turns(subjects, limits, progress=progress, clock=clock).series
    batch = len(next(iter(latents.values())))
    image_ms = [np.asarray([sample.image_ms for sample in one.samples]) / batch for one in series]
    latencies = {}
    for name, sampling_ms in zip(samplers, image_ms, strict=False):
        for vae, decoding_ms in zip(vaes, image_ms[len(samplers) :], strict=True):
            ms = sampling_ms + decoding_ms[: len(sampling_ms)]
            latencies[name, vae] = Latency(float(np.median(ms)), float(np.percentile(ms, 95)), len(ms))
    return latencies


def make_engine_sampler(pipeline: Pipeline, request: Request) -> LatentSampler:
    """Return what samples with the engines, without their decoder."""
    return lambda: pipeline.run(replace(request, vae=None)).latents


def make_eager_sampler(checkpoint: Path, request: Request, steps: int) -> LatentSampler:
    """Return guided Heun in uncompiled PyTorch, float32, as the reference repositories run it. Needs torch.

    Args:
        request: its labels, seeds, scale and guided channels.

    Raises:
        BackendError: torch is missing.
        CheckpointError: no predictor.
    """
    try:
        import torch

        from flowturbo.checkpoints import load_network
        from flowturbo.training.preview import sample_heun
    except ImportError as error:
        raise BackendError("an eager baseline needs torch", remedy="pip install 'flowturbo[export]'") from error
    model = load_network(checkpoint, "predictor").model
    config = model.config
    shape = (config.out_channels, config.latent_size, config.latent_size)
    labels = torch.tensor(request.labels)

    def sample() -> NDArray[np.float32]:
        noise = torch.from_numpy(sample_noise(request.seeds, shape))
        latents = sample_heun(model, noise, labels, steps, request.scales[0], request.guidance_channels)
        return np.asarray(latents.numpy(), np.float32)

    return sample
