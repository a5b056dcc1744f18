"""How long a picture takes with each sampler: rounds that visit every sampler in turn, so that a drifting machine
slows all of them alike. Sampling and decoding are timed apart, because a decoder serves every sampler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.pipeline import Pipeline
from runtime.request import Request

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Latency:
    """Milliseconds per image, over the rounds."""

    median_ms: float
    p95_ms: float
    rounds: int


def time_samplers(
    pipeline: Pipeline,
    requests: Mapping[str, Request],
    vaes: Sequence[str],
    rounds: int,
    report: Report | None = None,
) -> dict[tuple[str, str], Latency]:
    """Latency of each request with each decoder, by (name of the request, decoder); one round more warms up.

    Args:
        requests: as many images each as are to be made at once (1 for the latency of a picture).
    """
    sampled: dict[str, list[float]] = {name: [] for name in requests}
    decoded: dict[str, list[float]] = {vae: [] for vae in vaes}
    images = {name: len(request.labels) for name, request in requests.items()}
    for turn in range(rounds + 1):
        for name, request in requests.items():
            started = time.perf_counter()
            latents = pipeline.run(replace(request, vae=None)).latents
            took = time.perf_counter() - started
            if turn:
                sampled[name].append(1e3 * took / images[name])
        for vae in vaes:
            started = time.perf_counter()
            pipeline.decode(latents, vae)
            if turn:
                decoded[vae].append(1e3 * (time.perf_counter() - started) / len(latents))
        if report is not None:
            report(turn, rounds)
    return {
        (name, vae): _summary(np.asarray(sampled[name]) + np.asarray(decoded[vae])) for name in requests for vae in vaes
    }


def _summary(ms: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Latency:
    return Latency(float(np.median(ms)), float(np.percentile(ms, 95)), len(ms))
