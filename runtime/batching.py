"""Cut a request into parts that are evaluated together, and run each over the fixed or the adaptive loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from runtime.backends.base import pad_batch
from runtime.directory.records import HOST_TARGETS, Manifest
from runtime.execution.adaptive_loop import AdaptiveLoop, ImageBranchFactory, Trajectory
from runtime.execution.fixed_loop import DrawNoise, FixedLoop, Floats, Usage
from runtime.request import Request
from runtime.sampling.controllers import Journal
from runtime.sampling.guidance import FULL_INTERVAL, BranchBatch, ImageCondition, build_branches
from runtime.sampling.plan import Callback
from runtime.system.hardware import read_cache_bytes

CACHE_SHARE = 0.5
"""Share of the CPU's last cache that the activations of one evaluation may take."""
DEFAULT_CACHE_BYTES = 32 * 1024**2
"""Assumed size of that cache where the system does not say."""


def choose_batch_size(manifest: Manifest, target: str, resolution: int) -> int:
    """Return how many images are evaluated together: max-batch, but on a CPU as many as its caches hold.

    A small network is faster in batches; one that fills the cores by itself is slower once its activations leave the
    caches (`benchmarks/batches.py`, docs/speed.md).
    """
    engine = manifest.find_engine("predictor", resolution, target)
    graph = None if engine is None else manifest.find_engine_graph(engine)
    if target not in HOST_TARGETS or manifest.static_batch or graph is None or not graph.activation_bytes:
        return manifest.max_batch
    available_bytes = CACHE_SHARE * (read_cache_bytes() or DEFAULT_CACHE_BYTES)
    return max(1, min(manifest.max_batch, int(available_bytes // graph.activation_bytes)))


def split_request(request: Request, max_images: int) -> Iterator[slice]:
    """Cut a request into parts that are evaluated together: `max_images` images, and twice as many rows.

    An image with more rows than that is a part by itself. All images of a joint sampler stay together.
    """
    is_joint = request.sampler.adaptive_solver is not None and request.sampler.adaptive_solver.is_joint
    start, rows = 0, 0
    for index, image in enumerate(request.conditions):
        image_rows = image.count_branches(guided=True)
        is_full = index - start == max_images or rows + image_rows > 2 * max_images
        if is_full and index > start and not is_joint:
            yield slice(start, index)
            start, rows = index, 0
        rows += image_rows
    yield slice(start, len(request.conditions))


def group_parts(parts: Iterable[slice], max_batch: int) -> Iterator[list[slice]]:
    """Group parts that are decoded and returned together: at most max-batch images."""
    batch: list[slice] = []
    for part in parts:
        if batch and part.stop - batch[0].start > max_batch:
            yield batch
            batch = []
        batch.append(part)
    yield batch


def sample_part(
    loop: FixedLoop,
    manifest: Manifest,
    request: Request,
    part: slice,
    noise: Floats,
    draw_noise: DrawNoise,
    usage: Usage,
    callback: Callback | None = None,
) -> tuple[Floats, list[Journal]]:
    """Return the latents of a part of a request, [b, C, H, W], and a journal per image of an adaptive sampler.

    Args:
        noise: of the part's images, [b, C, H, W].
        draw_noise: their further normal draws.
    """
    conditions, num_images = request.conditions[part], len(noise)
    solver, control = request.sampler.adaptive_solver, request.sampler.control
    branch_factory = _make_branch_factory(manifest, request, conditions)
    if solver is None:
        padded_noise = np.ascontiguousarray(_pad_to_batch(noise, manifest))
        latents = loop.run(
            request.sampler.plan,
            padded_noise,
            lambda guided: branch_factory(range(num_images), guided),
            usage,
            callback,
            lambda index: _pad_to_batch(draw_noise(index), manifest),
        )
        return latents[:num_images], []
    if solver.is_joint:
        # The reference's mode: both branches of every image are images, and one norm steers them all. Row n is image n,
        # and `row_image` still names the conditional image whose point it is evaluated at.
        branches = build_branches(conditions, noise.shape[1], request.guidance_channels)
        noise = np.ascontiguousarray(noise[branches.row_image])
        journal = Journal()
        trajectory = Trajectory(solver.steps(control, journal, noise), tuple(range(len(noise))))
        latents = AdaptiveLoop(loop, lambda images, guided: branches, usage, callback).run([trajectory], noise)
        return latents[:num_images], [replace(journal) for _ in conditions]
    journals = [Journal() for _ in conditions]
    # An unguided image has no reason to stop at the edges of the guidance interval.
    controls = [control if image.scale != 1.0 else replace(control, interval=FULL_INTERVAL) for image in conditions]
    trajectories = [Trajectory(solver.steps(controls[i], journals[i], noise[i]), (i,)) for i in range(num_images)]
    return AdaptiveLoop(loop, branch_factory, usage, callback).run(trajectories, noise), journals


def _pad_to_batch(arrays: Floats, manifest: Manifest) -> Floats:
    """Fill a fixed batch up with its last image."""
    return pad_batch(arrays, manifest.max_batch) if manifest.static_batch else arrays


def _make_branch_factory(
    manifest: Manifest, request: Request, conditions: Sequence[ImageCondition]
) -> ImageBranchFactory:
    """Return the rows of some images of a batch: the same object for the same images, so that it is uploaded once."""

    @lru_cache(maxsize=64)
    def build(images: tuple[int, ...], guided: bool) -> BranchBatch:
        selected = [conditions[i] for i in images]
        if manifest.static_batch:
            selected += selected[-1:] * (manifest.max_batch - len(selected))
        guided = guided and any(image.scale != 1.0 for image in selected)
        return build_branches(
            selected,
            manifest.model.channels,
            request.guidance_channels,
            guided=guided,
            double=manifest.static_batch and guided,
        )

    return lambda images, guided: build(tuple(images), guided)
