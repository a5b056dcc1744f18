"""Decode latents to pictures: whole or in tiles, as many at a time as memory has room for.

A decoder needs by far the most memory of all graphs, and it grows with the picture. Where the networks share the host's
memory (a CPU, a Jetson), free memory is read before a decoder is opened. First fewer pictures are decoded together,
which changes nothing. Then tiles are used, with a warning: their picture is near to the whole decoder's, not equal.

Letters: B images, C latent channels, S latent side, P pixels a side, E channels of features.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, Engine, pad_batch, run_once
from runtime.directory.records import GPU_TARGETS, HOST_TARGETS, GraphRecord, Manifest
from runtime.execution.fixed_loop import Usage
from runtime.execution.tiling import TiledDecoder
from runtime.system.errors import NonFiniteError, RequestError
from runtime.system.hardware import is_tegra, read_memory_bytes

Floats = NDArray[np.float32]
TileChoice = int | Literal["auto"] | None
"""Pixels a side of a tile; "auto" for tiles only where memory is short; None for whole pictures always."""

DECODE_BATCH = 4
"""Pictures of one decoder call. One picture uses the whole machine: more at once are no faster (on a CPU slower, as
they leave the caches) and need more memory (`benchmarks/batches.py`)."""
ALLOCATOR_OVERHEAD = 1.5
"""Memory that an allocator takes over that of live tensors: 1.3 to 1.5 times on ONNX Runtime's CPU provider, for VAEs
of SD's size (`benchmarks/tiles.py`)."""
MEMORY_SHARE = 0.9
"""Share of the free memory that a decoder may take: other programs need some too."""


@dataclass(frozen=True)
class DecodePlan:
    """How a variant's latents are decoded.

    Attributes:
        batch_size: pictures of one call.
        tile: pixels a side of a tile; None for whole pictures.
        warning: why it is not decoded whole, although nobody asked for tiles; or why it may fail. Empty otherwise.
    """

    batch_size: int = DECODE_BATCH
    tile: int | None = None
    warning: str = ""


def plan_decoding(
    manifest: Manifest, target: str, resolution: int, vae: str, tile: TileChoice, free_bytes: int
) -> DecodePlan:
    """Choose how to decode, before the decoder is opened.

    Args:
        free_bytes: bytes that are free where engines of this target keep what they compute; 0 if unknown.

    Raises:
        RequestError: no decoder of these tiles was built.
    """
    batch_size = manifest.max_batch if manifest.static_batch else DECODE_BATCH
    tiles = [size for size in manifest.list_tiles(target) if size < resolution]
    if isinstance(tile, int):
        _check_tile(tile, tiles)
        return DecodePlan(1, tile)
    graph = _find_decoder_graph(manifest, target, f"decoder-{vae}", resolution)
    if graph is None or free_bytes == 0:
        return DecodePlan(batch_size)

    def count_bytes(images: int) -> int:
        return graph.weight_bytes + int(ALLOCATOR_OVERHEAD * images * graph.activation_bytes)

    # TensorRT takes memory for the largest batch when it opens an engine.
    is_fixed = manifest.static_batch or target in GPU_TARGETS
    min_images = manifest.max_batch if is_fixed else 1
    for images in (batch_size,) if is_fixed else range(batch_size, 0, -1):
        if count_bytes(manifest.max_batch if is_fixed else images) <= MEMORY_SHARE * free_bytes:
            return DecodePlan(images)
    fallback_size = batch_size if manifest.static_batch else 1
    if tile is None:
        return DecodePlan(fallback_size)
    need, free = _format_bytes(count_bytes(min_images)), _format_bytes(free_bytes)
    shortage = f"a decoder of {resolution} px needs about {need} of memory, {free} are free"
    if tiles:
        return DecodePlan(1, tiles[-1], f"{shortage}: decoded in tiles of {tiles[-1]} px")
    no_tiles = "and no decoder of tiles was built: --tile of flowturbo-export build-engines"
    return DecodePlan(fallback_size, None, f"{shortage}, {no_tiles}")


def _find_decoder_graph(manifest: Manifest, target: str, graph: str, resolution: int) -> GraphRecord | None:
    """Return the ONNX file that an engine is, or was built from; None where the directory does not know its memory."""
    engine = manifest.find_engine(graph, resolution, target)
    files = [g for g in manifest.graphs if (g.graph, g.resolution) == (graph, resolution)]
    if engine is None:
        return None
    same_file = (g for g in files if g.path == engine.path)
    same_precision = (g for g in files if (g.computes or g.precision) == engine.precision)
    record = next(same_file, None) or next(same_precision, None)
    return record if record is not None and record.activation_bytes else None


def read_free_memory(target: str) -> int:
    """Return the bytes free for engines of a target where they use the host's memory; 0 elsewhere or if unknown."""
    is_shared = target in HOST_TARGETS or is_tegra()
    return read_memory_bytes()[1] if is_shared else 0


def _format_bytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"


def _check_tile(tile: int, available: list[int]) -> None:
    if tile not in available:
        raise RequestError(
            f"tiles of {tile} pixels",
            allowed=f"{', '.join(map(str, available)) or 'none: no decoder of tiles was built for this resolution'}",
            remedy=f"build them: flowturbo-export build-engines --tile {tile}, or leave --tile out",
        )


class Decoders:
    """The decoders of a directory at one resolution on one backend.

    Args:
        target: what the engines were built for.
        tile: see `TileChoice`.
        engine: opens the engine of a graph at a resolution, once.

    Raises:
        RequestError: no decoder of these tiles was built.
    """

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        target: str,
        resolution: int,
        tile: TileChoice,
        load_engine: Callable[[str, int], Engine],
    ) -> None:
        self._backend, self._manifest, self._target, self._resolution = backend, manifest, target, resolution
        self._tile, self._load_engine = tile, load_engine
        self._plans: dict[str, DecodePlan] = {}
        if isinstance(tile, int):
            _check_tile(tile, [size for size in manifest.list_tiles(target) if size < resolution])

    @property
    def tile(self) -> int | None:
        """Side in pixels of the tiles that are used, or were last; None for whole pictures."""
        requested = self._tile if isinstance(self._tile, int) else None
        return next((plan.tile for plan in reversed(self._plans.values()) if plan.tile), requested)

    @property
    def notes(self) -> list[str]:
        """Notes that a reader of the pictures has to know."""
        tile, shortages = self.tile, [plan.warning for plan in self._plans.values() if plan.warning]
        tile_note = f"decoded in tiles of {tile} pixels, near to the whole decoder's picture, not equal"
        return [*([] if tile is None else [tile_note]), *dict.fromkeys(shortages)]

    def decode(self, latents: Floats, vae: str, usage: Usage) -> Floats:
        """Decode latents [B, C, S, S], as sampled, to pictures [B, 3, P, P] in [0, 1].

        Warns where memory is short, with what is done about it.

        Raises:
            NonFiniteError: the decoder overflowed.
        """
        num_images = len(latents)
        if vae not in self._plans:  # before its decoder is opened: the memory that it holds then is no longer free
            free_bytes = read_free_memory(self._target)
            plan = plan_decoding(self._manifest, self._target, self._resolution, vae, self._tile, free_bytes)
            if plan.warning:
                warnings.warn(plan.warning, stacklevel=3)
            self._plans[vae] = plan
        plan = self._plans[vae]
        if self._manifest.static_batch:
            latents = pad_batch(latents, self._manifest.max_batch)
        start_time = time.perf_counter()
        if plan.tile is None:
            size = plan.batch_size
            outputs = [self._run_graph(f"decoder-{vae}", latents[i : i + size]) for i in range(0, len(latents), size)]
            parts, calls = [(output["images"], output["finite"]) for output in outputs], len(outputs)
        else:
            parts, calls = self._decode_tiles(latents, vae, plan.tile)
        pictures, finite = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        pictures, finite = pictures[:num_images], finite[:num_images]
        usage.add("decoder", time.perf_counter() - start_time, calls)
        if not (finite == 1).all():
            raise NonFiniteError(
                f"the decoder {vae} overflowed: {int((finite != 1).sum())} of {num_images} pictures would be black",
                remedy="build its decoder in fp32: flowturbo-export build-engines --precision fp32 (or bf16)",
            )
        return pictures

    def _decode_tiles(self, latents: Floats, vae: str, tile: int) -> tuple[list[tuple[Floats, Floats]], int]:
        """Return (pictures, whether each is finite) of some latents at a time, and the number of engine calls."""
        graph, batch_size = f"tile-{vae}", len(latents) if self._manifest.static_batch else 1
        spec, side = self._manifest.build_spec(graph, tile), self._manifest.compute_side(self._resolution)
        decoder = TiledDecoder(self._backend, self._load_engine(graph, tile), spec, batch_size, side)
        parts = [
            decoder.decode(self._run_graph(f"head-{vae}", latents[i : i + batch_size])["features"])
            for i in range(0, len(latents), batch_size)
        ]
        return parts, decoder.calls + len(parts)

    def _run_graph(self, graph: str, latents: Floats) -> dict[str, Floats]:
        """Return the outputs of a graph that takes latents, on the host."""
        engine, spec = self._load_engine(graph, self._resolution), self._manifest.build_spec(graph, self._resolution)
        return run_once(self._backend, engine, spec, latents)
