"""Latents of an engine directory, made chunk by chunk and kept on disk: a killed run loses one chunk.

What is kept is named by everything it depends on, so that two requests share a folder only if they are the same.

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

from flowturbo.evaluation.progress import CountCallback
from flowturbo.evaluation.quality.array_cache import hash_json, load_arrays, save_arrays
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.run_report import count_nfe
from runtime.system.files import make_folder, write_json
from runtime.system.json_codec import to_json

Floats = NDArray[np.float32]
_NOT_A_NAME = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class SampleDraw:
    """What to draw: a label and a seed per image."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, selection: slice) -> SampleDraw:
        return SampleDraw(self.labels[selection], self.seeds[selection])


def make_balanced_draw(classes: Sequence[int], num: int, first_seed: int = 0) -> SampleDraw:
    """`num` images spread evenly over `classes`, with seeds that count up from `first_seed`.

    Classes take turns, so that every part of the set, such as a split of the Inception Score, holds all of them.
    """
    spread_classes = [classes[i * len(classes) // num] for i in range(num)] if num < len(classes) else list(classes)
    labels = tuple(spread_classes[i % len(spread_classes)] for i in range(num))
    return SampleDraw(labels, tuple(range(first_seed, first_seed + num)))


@dataclass(frozen=True)
class LatentChunk:
    """Images `start` … of a draw: latents [B, C, H, W], evaluations of an image by network, and what they took.

    CPU seconds do not grow when other work shares the machine, as seconds by the clock do.
    """

    start: int
    latents: Floats
    nfe: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class SampledLatents:
    """The latents of one sampler for one draw, max-batch images a chunk, each made once and then read.

    Args:
        pipeline: an open pipeline.
        draw: labels and seeds.
        sampler: keyword arguments of `Pipeline.request` (schedule, solver, steps, guidance, …).
        cache: folder that holds one folder per sampler and draw; None keeps nothing.

    Raises:
        RequestError: the engines cannot do what the sampler asks for.
    """

    def __init__(self, pipeline: Pipeline, draw: SampleDraw, sampler: Mapping[str, Any], cache: Path | None) -> None:
        self._pipeline, self._sampler = pipeline, dict(sampler)
        self.request: Request = pipeline.request(draw.labels, seeds=draw.seeds, **self._sampler)
        self.draw, self.chunk_size = draw, pipeline.manifest.max_batch
        self.folder = None if cache is None else cache / self.key
        if self.folder is not None:
            make_folder(self.folder)
            write_json(self.folder / "about.json", self.about)

    @property
    def about(self) -> dict[str, Any]:
        """Everything the latents depend on."""
        pipeline, request = self._pipeline, self.request
        return {
            "engine": pipeline.manifest.engine_hash,
            "resolution": pipeline.resolution,
            "provider": pipeline.ran.provider,
            "precision": pipeline.precision,
            "batch": self.chunk_size,
            "sampler": request.sampler.name,
            "options": to_json(self._sampler),
            "settings": to_json(request.sampler.settings),  # a saved sampler's hash too, whatever its name
            "guidance_channels": request.guidance_channels,
            "images": len(self.draw),
            "draw": hash_json([request.labels, request.seeds, request.scales]),
        }

    @property
    def key(self) -> str:
        """Name of the folder: the sampler, and a hash of `about`."""
        return f"{_NOT_A_NAME.sub('_', self.request.sampler.name)}-{hash_json(self.about)}"

    def read_chunks(
        self, shard: tuple[int, int] = (0, 1), report: CountCallback | None = None
    ) -> Iterator[LatentChunk]:
        """The chunks of this shard in order, made where they are not on disk yet.

        Args:
            shard: (i, n) for every n-th chunk from the i-th on: n processes share a cache and the work.
            report: told of progress within the shard.
        """
        starts = range(0, len(self.draw), self.chunk_size)[shard[0] :: shard[1]]
        total = sum(min(self.chunk_size, len(self.draw) - start) for start in starts)
        done = 0
        for start in starts:
            chunk = self.read(start)
            done += len(chunk.latents)
            if report is not None:
                report(done, total)
            yield chunk

    def read_all(self, report: CountCallback | None = None) -> Floats:
        """All latents [N, C, H, W]: for the thousands that fit into memory."""
        return np.concatenate([chunk.latents for chunk in self.read_chunks(report=report)])

    def read(self, start: int) -> LatentChunk:
        """The chunk that begins at image `start`, from disk or made now."""
        path = None if self.folder is None else self.folder / f"{start:07d}.npz"
        cached = None if path is None else load_arrays(path)
        if cached is not None and {"latents", "nfe", "took"} <= cached.keys():
            seconds, cpu_seconds = map(float, cached["took"])
            return LatentChunk(start, cached["latents"], json.loads(str(cached["nfe"])), seconds, cpu_seconds)
        chunk_draw = self.draw.select(slice(start, start + self.chunk_size))
        request = self._pipeline.request(chunk_draw.labels, seeds=chunk_draw.seeds, **self._sampler)
        start_time, cpu_start_time = time.perf_counter(), time.process_time()
        result = self._pipeline.run(replace(request, vae=None))
        durations = time.perf_counter() - start_time, time.process_time() - cpu_start_time
        chunk = LatentChunk(start, result.latents, count_nfe(request, result.journals), *durations)
        if path is not None:
            nfe = np.asarray(json.dumps(chunk.nfe))
            save_arrays(path, {"latents": chunk.latents, "nfe": nfe, "took": np.asarray(durations)})
        return chunk
