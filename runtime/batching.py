"""A part of a request over the loops: how many images go together, which rows are evaluated, fixed or closed loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from runtime.directory.manifest import HOST_TARGETS, Manifest
from runtime.execution.adaptive_loop import Actor, ClosedLoop, RowsFor
from runtime.execution.fixed_loop import Drawn, Floats, Loop, Usage
from runtime.request import Request
from runtime.sampling.controllers import Journal
from runtime.sampling.guidance import EVERYWHERE, Branches, Rows, rows_of
from runtime.sampling.plan import Callback
from runtime.system.hardware import last_cache_bytes

CACHE_SHARE = 0.5
"""Of the CPU's last cache, what the activations of one evaluation may take."""
CACHE_BYTES = 32 * 1024**2
"""Taken for that cache where the system does not say."""


def images_at_once(manifest: Manifest, target: str, resolution: int) -> int:
    """Images that are evaluated together: max-batch, but on a CPU as many as its caches hold.

    A small network gains by company; one that fills the cores by itself loses by what leaves the caches
    (`benchmarks/batches.py`, docs/speed.md).
    """
    engine = manifest.engine("predictor", resolution, target)
    graph = None if engine is None else manifest.graph_of(engine)
    if target not in HOST_TARGETS or manifest.static_batch or graph is None or not graph.activation_bytes:
        return manifest.max_batch
    room = CACHE_SHARE * (last_cache_bytes() or CACHE_BYTES)
    return max(1, min(manifest.max_batch, int(room // graph.activation_bytes)))


def parts_of(request: Request, most: int) -> Iterator[slice]:
    """Cuts a request into parts that are evaluated together: `most` images, and twice as many rows.

    An image of more rows than that goes alone. All images of a joint sampler stay together.
    """
    joint = request.sampler.rule is not None and request.sampler.rule.joint
    start, rows = 0, 0
    for place, image in enumerate(request.branches):
        own = image.rows(guided=True)
        full = place - start == most or rows + own > 2 * most
        if full and place > start and not joint:
            yield slice(start, place)
            start, rows = place, 0
        rows += own
    yield slice(start, len(request.branches))


def batches_of(parts: Iterable[slice], max_batch: int) -> Iterator[list[slice]]:
    """Parts that are decoded and handed out together: at most max-batch images."""
    batch: list[slice] = []
    for part in parts:
        if batch and part.stop - batch[0].start > max_batch:
            yield batch
            batch = []
        batch.append(part)
    yield batch


def sample(
    loop: Loop,
    manifest: Manifest,
    request: Request,
    part: slice,
    noise: Floats,
    drawn: Drawn,
    usage: Usage,
    callback: Callback | None = None,
) -> tuple[Floats, list[Journal]]:
    """Latents of a part of a request, [b, C, H, W], and a journal per image where the sampler keeps one.

    Args:
        noise: of the part's images, [b, C, H, W].
        drawn: their further normal draws.
    """
    branches, count = request.branches[part], len(noise)
    rows_for = _rows_for(manifest, request, branches)
    if request.sampler.rule is not None:
        return _closed(loop, request, branches, rows_for, noise, usage, callback)
    filled = _filled(noise, manifest)
    latents = loop.run(
        request.sampler.plan,
        np.ascontiguousarray(filled),
        lambda guided: rows_for(range(count), guided),
        usage,
        callback,
        lambda index: _filled(drawn(index), manifest),
    )
    return latents[:count], []


def _filled(arrays: Floats, manifest: Manifest) -> Floats:
    """A fixed batch is filled up with its last image."""
    missing = manifest.max_batch - len(arrays) if manifest.static_batch else 0
    return np.concatenate([arrays, np.repeat(arrays[-1:], missing, axis=0)]) if missing else arrays


def _rows_for(manifest: Manifest, request: Request, branches: Sequence[Branches]) -> RowsFor:
    """Rows of some images of a batch; the same object for the same images, so that it is uploaded once."""

    @lru_cache(maxsize=64)
    def made(images: tuple[int, ...], guided: bool) -> Rows:
        asked = [branches[i] for i in images]
        if manifest.static_batch:
            asked += asked[-1:] * (manifest.max_batch - len(asked))
        guided = guided and any(image.scale != 1.0 for image in asked)
        return rows_of(
            asked,
            manifest.model.channels,
            request.guidance_channels,
            guided=guided,
            double=manifest.static_batch and guided,
        )

    return lambda images, guided: made(tuple(images), guided)


def _closed(
    loop: Loop,
    request: Request,
    branches: Sequence[Branches],
    rows_for: RowsFor,
    noise: Floats,
    usage: Usage,
    callback: Callback | None,
) -> tuple[Floats, list[Journal]]:
    rule, control = request.sampler.rule, request.sampler.control
    assert rule is not None
    if rule.joint:
        return _joint(loop, request, branches, noise, usage, callback)
    journals = [Journal() for _ in branches]
    # An unguided image has no reason to stop at the edges of the guidance interval.
    own = [control if image.scale != 1.0 else replace(control, interval=EVERYWHERE) for image in branches]
    actors = [Actor(rule.steps(own[i], journals[i], noise[i]), (i,)) for i in range(len(branches))]
    return ClosedLoop(loop, rows_for, usage, callback).run(actors, noise), journals


def _joint(
    loop: Loop,
    request: Request,
    branches: Sequence[Branches],
    noise: Floats,
    usage: Usage,
    callback: Callback | None,
) -> tuple[Floats, list[Journal]]:
    """The reference's mode: both branches of every image are images of their own, and one norm steers them all.

    Row n of the rows is image n, and `pair` still names the conditional image whose point it is evaluated at.
    """
    rule = request.sampler.rule
    assert rule is not None
    rows = rows_of(branches, noise.shape[1], request.guidance_channels)
    twins = np.ascontiguousarray(noise[rows.pair])
    journal = Journal()
    actor = Actor(rule.steps(request.sampler.control, journal, twins), tuple(range(len(twins))))
    latents = ClosedLoop(loop, lambda images, guided: rows, usage, callback).run([actor], twins)
    return latents[: len(branches)], [replace(journal) for _ in branches]
