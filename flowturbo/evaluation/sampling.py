"""Latents of an engine directory, made chunk by chunk and kept on disk: a killed run loses one chunk.

What is kept is named by everything it depends on, so that two requests share a folder only if they are the same.

Letters: N images in all, B images of a chunk, C latent channels, H = W latent side.
"""

from __future__ import annotations

import json
import re
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowturbo.evaluation.images import digest
from runtime.files import make_folder, replacing, write_json
from runtime.loop import Usage
from runtime.pipeline import Pipeline
from runtime.request import Request

Floats = NDArray[np.float32]
Report = Callable[[int, int], None]
"""Called with images done and images wanted."""

_NOT_A_NAME = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Draw:
    """What to draw: a label and a seed per image."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, where: slice) -> Draw:
        return Draw(self.labels[where], self.seeds[where])


def balanced_draw(classes: Sequence[int], num: int, first_seed: int = 0) -> Draw:
    """`num` images spread evenly over `classes`, with seeds that count up from `first_seed`.

    Classes take turns, so that every part of the set, such as a split of the Inception Score, holds all of them.
    """
    spread = [classes[i * len(classes) // num] for i in range(num)] if num < len(classes) else list(classes)
    labels = tuple(spread[i % len(spread)] for i in range(num))
    return Draw(labels, tuple(range(first_seed, first_seed + num)))


@dataclass(frozen=True)
class Chunk:
    """Images `start` … of a draw: latents [B, C, H, W], the engine calls that made them, and what they took."""

    start: int
    latents: Floats
    calls: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


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

    def __init__(self, pipeline: Pipeline, draw: Draw, sampler: Mapping[str, Any], cache: Path | None) -> None:
        self._pipeline, self._sampler = pipeline, dict(sampler)
        self.request: Request = pipeline.request(draw.labels, seeds=draw.seeds, **self._sampler)
        self.draw, self.size = draw, pipeline.manifest.max_batch
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
            "batch": self.size,
            "sampler": request.sampler.name,
            "options": self._sampler,
            "guidance_channels": request.guidance_channels,
            "images": len(self.draw),
            "draw": digest([request.labels, request.seeds, request.scales]),
        }

    @property
    def key(self) -> str:
        """Name of the folder: the sampler, and a hash of `about`."""
        return f"{_NOT_A_NAME.sub('_', self.request.sampler.name)}-{digest(self.about)}"

    def chunks(self, shard: tuple[int, int] = (0, 1), report: Report | None = None) -> Iterator[Chunk]:
        """The chunks of this shard in order, made where they are not on disk yet.

        Args:
            shard: (i, n) for every n-th chunk from the i-th on: n processes share a cache and the work.
            report: told of progress within the shard.
        """
        starts = range(0, len(self.draw), self.size)[shard[0] :: shard[1]]
        wanted = sum(min(self.size, len(self.draw) - start) for start in starts)
        done = 0
        for start in starts:
            chunk = self.read(start)
            done += len(chunk.latents)
            if report is not None:
                report(done, wanted)
            yield chunk

    def all(self, report: Report | None = None) -> Floats:
        """All latents [N, C, H, W]: for the thousands that fit into memory."""
        return np.concatenate([chunk.latents for chunk in self.chunks(report=report)])

    def read(self, start: int) -> Chunk:
        """The chunk that begins at image `start`, from disk or made now."""
        path = None if self.folder is None else self.folder / f"{start:07d}.npz"
        if path is not None and (kept := _read_chunk(path, start)) is not None:
            return kept
        part, usage = self.draw.part(slice(start, start + self.size)), Usage()
        request = self._pipeline.request(part.labels, seeds=part.seeds, **self._sampler)
        started = time.perf_counter()
        (batch,) = self._pipeline.batches(replace(request, vae=None), usage)
        chunk = Chunk(start, batch.latents, dict(usage.calls), time.perf_counter() - started)
        if path is not None:
            with replacing(path) as aside, open(aside, "wb") as file:
                np.savez(file, latents=chunk.latents, calls=json.dumps(chunk.calls), seconds=chunk.seconds)
        return chunk


def _read_chunk(path: Path, start: int) -> Chunk | None:
    """A kept chunk; None where there is none or it is damaged, so that it is made again."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return Chunk(start, kept["latents"], json.loads(str(kept["calls"])), float(kept["seconds"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
