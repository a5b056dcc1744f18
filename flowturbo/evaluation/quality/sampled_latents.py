"""Latents of an engine directory, made chunk by chunk and cached on disk: a killed run loses one chunk.

A hash of everything that the latents depend on names their folder, so only equal requests share one.

Letters: N images in all, B images of a chunk, C latent channels, H = W latent side.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.pipeline import Pipeline
from runtime.request import Request, RequestOptions
from runtime.run_report import count_nfe
from runtime.system.array_store import hash_json, load_arrays, save_arrays
from runtime.system.files import make_folder, write_json
from runtime.system.json_codec import to_json
from runtime.system.progress import SILENT, Progress

Floats = NDArray[np.float32]
_NOT_A_NAME = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class SampleDraw:
    """A label and a seed per image."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, selection: slice) -> SampleDraw:
        return SampleDraw(self.labels[selection], self.seeds[selection])


def make_balanced_draw(classes: Sequence[int], num: int, first_seed: int = 0) -> SampleDraw:
    """Spread `num` images evenly over `classes`, with seeds that count up from `first_seed`.

    Classes take turns, so that every part of the set, such as a split of the Inception Score, holds all of them.
    """
    spread_classes = [classes[i * len(classes) // num] for i in range(num)] if num < len(classes) else list(classes)
    labels = tuple(spread_classes[i % len(spread_classes)] for i in range(num))
    return SampleDraw(labels, tuple(range(first_seed, first_seed + num)))


@dataclass(frozen=True)
class LatentChunk:
    """Images `start` … of a draw: latents [B, C, H, W], evaluations of an image by network, and their cost.

    Unlike seconds by the clock, CPU seconds do not grow when other work shares the machine.
    """

    start: int
    latents: Floats
    nfe: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class SampledLatents:
    """The latents of one sampler for one draw, in chunks of max-batch images; each is made once and then read.

    Args:
        pipeline: an open pipeline.
        draw: labels and seeds.
        sampler: keyword arguments of `Pipeline.request` (schedule, solver, steps, guidance, …).
        cache: folder that holds one folder per sampler and draw; None caches nothing.

    Raises:
        RequestError: the engines cannot do what the sampler asks for.
    """

    def __init__(self, pipeline: Pipeline, draw: SampleDraw, sampler: RequestOptions, cache: Path | None) -> None:
        self._pipeline, self._sampler = pipeline, sampler
        self.request = self._make_request(draw)
        self.draw, self.chunk_size = draw, pipeline.manifest.max_batch
        self.folder = None if cache is None else cache / self.key
        if self.folder is not None:
            make_folder(self.folder)
            write_json(self.folder / "about.json", self.about)

    def _make_request(self, draw: SampleDraw) -> Request:
        options: RequestOptions = {**self._sampler, "seeds": draw.seeds}
        return self._pipeline.request(draw.labels, **options)

    @property
    def about(self) -> dict[str, Any]:
        """Return everything that the latents depend on."""
        pipeline, request = self._pipeline, self.request
        return {
            "engine": pipeline.manifest.engine_hash,
            "resolution": pipeline.resolution,
            "provider": pipeline.ran.provider,
            "precision": pipeline.precision,
            "batch": self.chunk_size,
            "sampler": request.sampler.name,
            "options": to_json(self._sampler),
            "settings": to_json(request.sampler.settings),  # of a calibrated sampler, its hash too
            "guidance_channels": request.guidance_channels,
            "images": len(self.draw),
            "draw": hash_json([request.labels, request.seeds, request.scales]),
        }

    @property
    def key(self) -> str:
        """Return the name of the folder: the sampler, and a hash of `about`."""
        return f"{_NOT_A_NAME.sub('_', self.request.sampler.name)}-{hash_json(self.about)}"

    def read_chunks(
        self, shard: tuple[int, int] = (0, 1), progress: Progress = SILENT, task: str = "latents"
    ) -> Iterator[LatentChunk]:
        """Read the chunks of this shard in order; make those that are not on disk yet.

        Args:
            shard: (i, n) for every n-th chunk from the i-th on: n processes share a cache and the work.
            progress, task: `progress.update(task, …)` receives the images of the shard that are done.
        """
        starts = range(0, len(self.draw), self.chunk_size)[shard[0] :: shard[1]]
        total = sum(min(self.chunk_size, len(self.draw) - start) for start in starts)
        done = 0
        for start in starts:
            chunk = self.read(start)
            done += len(chunk.latents)
            progress.update(task, done, total)
            yield chunk

    def read_all(self, progress: Progress = SILENT, task: str = "latents") -> Floats:
        """Return all latents [N, C, H, W]: for the thousands that fit into memory."""
        return np.concatenate([chunk.latents for chunk in self.read_chunks(progress=progress, task=task)])

    def read(self, start: int) -> LatentChunk:
        """Return the chunk that begins at image `start`, from disk or made now."""
        path = None if self.folder is None else self.folder / f"{start:07d}.npz"
        cached = None if path is None else load_arrays(path)
        if cached is not None and {"latents", "nfe", "took"} <= cached.keys():
            seconds, cpu_seconds = map(float, cached["took"])
            return LatentChunk(start, cached["latents"], json.loads(str(cached["nfe"])), seconds, cpu_seconds)
        chunk_draw = self.draw.select(slice(start, start + self.chunk_size))
        request = self._make_request(chunk_draw)
        start_time, cpu_start_time = time.perf_counter(), time.process_time()
        result = self._pipeline.run(replace(request, vae=None))
        durations = time.perf_counter() - start_time, time.process_time() - cpu_start_time
        chunk = LatentChunk(start, result.latents, count_nfe(request, result.journals), *durations)
        if path is not None:
            nfe = np.asarray(json.dumps(chunk.nfe))
            save_arrays(path, {"latents": chunk.latents, "nfe": nfe, "took": np.asarray(durations)})
        return chunk
