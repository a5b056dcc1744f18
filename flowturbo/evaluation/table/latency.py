"""How long a picture takes with each sampler: rounds that visit every sampler in turn, so that a drifting machine
slows all of them alike. Sampling and decoding are timed apart, because a decoder serves every sampler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.progress import CountCallback
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.sampling.noise import sample_noise
from runtime.system.errors import BackendError

MAX_SAMPLER_MS, MIN_SAMPLER_ROUNDS = 2000.0, 3
"""A sampler that has been timed so long in all is timed no more after so many rounds: a long run varies less."""


LatentSampler = Callable[[], NDArray[np.float32]]
"""Makes latents [B, C, H, W]."""


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
    report: CountCallback | None = None,
) -> dict[tuple[str, str], Latency]:
    """Latency of each sampler with each decoder, by (name of the sampler, decoder); one round more warms up.

    Args:
        samplers: each makes as many latents as are to be made at once (1 for the latency of a picture).
    """
    sampling_ms: dict[str, list[float]] = {name: [] for name in samplers}
    decoding_ms: dict[str, list[float]] = {vae: [] for vae in vaes}
    batch_sizes: dict[str, int] = {}
    for round_index in range(rounds + 1):
        for name, sample in samplers.items():
            if round_index > MIN_SAMPLER_ROUNDS and sum(sampling_ms[name]) * batch_sizes[name] > MAX_SAMPLER_MS:
                continue
            started = time.perf_counter()
            latents = sample()
            batch_sizes[name] = len(latents)
            if round_index:
                sampling_ms[name].append(1e3 * (time.perf_counter() - started) / len(latents))
        for vae in vaes:
            started = time.perf_counter()
            pipeline.decode(latents, vae)
            if round_index:
                decoding_ms[vae].append(1e3 * (time.perf_counter() - started) / len(latents))
        if report is not None:
            report(round_index, rounds)
    return {
        (name, vae): _summarise_latency(
            np.asarray(sampling_ms[name]) + np.asarray(decoding_ms[vae][: len(sampling_ms[name])])
        )
        for name in samplers
        for vae in vaes
    }


def make_engine_sampler(pipeline: Pipeline, request: Request) -> LatentSampler:
    """The engines, without their decoder."""
    return lambda: pipeline.run(replace(request, vae=None)).latents


def make_eager_sampler(checkpoint: Path, request: Request, steps: int) -> LatentSampler:
    """Guided Heun in uncompiled PyTorch, float32: what the reference repositories run. Needs torch.

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


def _summarise_latency(ms: NDArray[np.float64]) -> Latency:
    return Latency(float(np.median(ms)), float(np.percentile(ms, 95)), len(ms))
