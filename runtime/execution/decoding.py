"""Latents to pictures with a directory's decoders: whole or in tiles, as many at a time as memory has room for.

A decoder needs by far the most memory of all graphs, and it grows with the picture. Where the networks share the host's
memory (a CPU, a Jetson), what is free is looked at before a decoder is opened: first fewer pictures go together, which
changes nothing, then tiles stand in, which is said, because their picture is near to the whole decoder's, not equal.

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

from runtime.backends.base import Backend, Engine, filled, run_once
from runtime.directory.manifest import GPU_TARGETS, HOST_TARGETS, Manifest
from runtime.execution.fixed_loop import Usage
from runtime.execution.tiling import TiledDecoder
from runtime.system.errors import NonFiniteError, RequestError
from runtime.system.hardware import is_tegra, memory_bytes

Floats = NDArray[np.float32]
Tile = int | Literal["auto"] | None
"""Pixels a side of a tile; "auto" for tiles only where memory is short; None for whole pictures always."""

TOGETHER = 4
"""Pictures of one decoder call. A picture fills the machine by itself: more at once are no faster (on a CPU slower, for
they leave the caches) and need more memory (`benchmarks/batches.py`)."""
GAPS = 1.5
"""What an allocator takes for what is alive together: 1.3 to 1.5 times as much on ONNX Runtime's CPU provider, for VAEs
of SD's size (`benchmarks/tiles.py`)."""
SHARE = 0.9
"""Of the free memory, what a decoder may take: other programs live too."""


@dataclass(frozen=True)
class DecodePlan:
    """How a variant's latents are decoded.

    Attributes:
        together: pictures of one call.
        tile: pixels a side of a tile; None for whole pictures.
        short: why it is not decoded whole, although nobody asked for tiles; or why it may fail. Empty otherwise.
    """

    together: int = TOGETHER
    tile: int | None = None
    short: str = ""


def plan_decoding(manifest: Manifest, target: str, resolution: int, vae: str, tile: Tile, free: int) -> DecodePlan:
    """Chooses how to decode before the decoder is opened.

    Args:
        free: bytes that are free where engines of this target keep what they compute; 0 if unknown.

    Raises:
        RequestError: no decoder of these tiles was built.
    """
    together = manifest.max_batch if manifest.static_batch else TOGETHER
    tiles = [size for size in manifest.tiles(target) if size < resolution]
    if isinstance(tile, int):
        _check_tile(tile, tiles)
        return DecodePlan(1, tile)
    need = _need(manifest, target, f"decoder-{vae}", resolution)
    if need is None or free == 0:
        return DecodePlan(together)
    room = SHARE * free
    if manifest.static_batch or target in GPU_TARGETS:  # TensorRT takes memory for the largest batch when it opens
        least, fits = manifest.max_batch, together if need.of(manifest.max_batch) <= room else 0
    else:
        least, fits = 1, next((count for count in range(together, 0, -1) if need.of(count) <= room), 0)
    if fits:
        return DecodePlan(fits)
    at_least = together if manifest.static_batch else 1
    if tile is None:
        return DecodePlan(at_least)
    wanted = f"a decoder of {resolution} px needs about {_mb(need.of(least))} of memory, {_mb(free)} are free"
    if tiles:
        return DecodePlan(1, tiles[-1], f"{wanted}: decoded in tiles of {tiles[-1]} px")
    none_built = "and no decoder of tiles was built: --tile of flowturbo-export build-engines"
    return DecodePlan(at_least, None, f"{wanted}, {none_built}")


@dataclass(frozen=True)
class _Need:
    """Bytes of a graph's weights, and of what it computes for one picture."""

    weights: int
    activations: int

    def of(self, images: int) -> int:
        return self.weights + int(GAPS * images * self.activations)


def _need(manifest: Manifest, target: str, graph: str, resolution: int) -> _Need | None:
    """From the ONNX file that an engine is, or was built from; None where the directory does not say."""
    engine = manifest.engine(graph, resolution, target)
    if engine is None:
        return None
    files = [g for g in manifest.graphs if (g.graph, g.resolution) == (graph, resolution)]
    found = next((g for g in files if g.path == engine.path), None) or next(
        (g for g in files if (g.computes or g.precision) == engine.precision), None
    )
    return None if found is None or not found.activation_bytes else _Need(found.weight_bytes, found.activation_bytes)


def free_memory(target: str) -> int:
    """Bytes free for engines of a target, where that is the host's memory; 0 where it is not, or nobody says."""
    shared = target in HOST_TARGETS or is_tegra()
    return memory_bytes()[1] if shared else 0


def _mb(count: float) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _check_tile(tile: int, built: list[int]) -> None:
    if tile not in built:
        raise RequestError(
            f"tiles of {tile} pixels",
            allowed=f"{', '.join(map(str, built)) or 'none: no decoder of tiles was built for this resolution'}",
            remedy=f"build them: flowturbo-export build-engines --tile {tile}, or leave --tile out",
        )


class Decoders:
    """The decoders of a directory at one resolution on one backend.

    Args:
        target: what the engines were built for.
        tile: see `Tile`.
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
        tile: Tile,
        engine: Callable[[str, int], Engine],
    ) -> None:
        self._backend, self._manifest, self._target, self._resolution = backend, manifest, target, resolution
        self._tile, self._engine = tile, engine
        self._plans: dict[str, DecodePlan] = {}
        if isinstance(tile, int):
            _check_tile(tile, [size for size in manifest.tiles(target) if size < resolution])

    @property
    def tile(self) -> int | None:
        """Pixels a side of the tiles that are, or were last, decoded in; None for whole pictures."""
        asked = self._tile if isinstance(self._tile, int) else None
        return next((plan.tile for plan in reversed(self._plans.values()) if plan.tile), asked)

    @property
    def notes(self) -> list[str]:
        """What a reader of the pictures has to know."""
        tile, short = self.tile, [plan.short for plan in self._plans.values() if plan.short]
        near = f"decoded in tiles of {tile} pixels, near to the whole decoder's picture, not equal"
        return [*([] if tile is None else [near]), *dict.fromkeys(short)]

    def decode(self, latents: Floats, vae: str, usage: Usage) -> Floats:
        """Latents [B, C, S, S] as sampled to pictures [B, 3, P, P] in [0, 1].

        Warns where memory is short, and of what is done about it.

        Raises:
            NonFiniteError: the decoder overflowed.
        """
        images, plan = len(latents), self._plan(vae)
        if self._manifest.static_batch:
            latents = filled(latents, self._manifest.max_batch)
        started = time.perf_counter()
        decode = self._whole if plan.tile is None else self._in_tiles
        pictures, finite, calls = decode(latents, vae, plan)
        pictures, finite = pictures[:images], finite[:images]
        usage.add("decoder", time.perf_counter() - started, calls)
        if not (finite == 1).all():
            raise NonFiniteError(
                f"the decoder {vae} overflowed: {int((finite != 1).sum())} of {images} pictures would be black",
                remedy="build its decoder in fp32: flowturbo-export build-engines --precision fp32 (or bf16)",
            )
        return pictures

    def _plan(self, vae: str) -> DecodePlan:
        """Made before a variant is opened, and kept: what it holds then is no longer free."""
        if vae not in self._plans:
            free = free_memory(self._target)
            plan = plan_decoding(self._manifest, self._target, self._resolution, vae, self._tile, free)
            if plan.short:
                warnings.warn(plan.short, stacklevel=4)
            self._plans[vae] = plan
        return self._plans[vae]

    def _whole(self, latents: Floats, vae: str, plan: DecodePlan) -> tuple[Floats, Floats, int]:
        """Pictures, whether each is finite, and engine calls; a few pictures at a time."""
        count = plan.together
        parts = [self._run(f"decoder-{vae}", latents[i : i + count]) for i in range(0, len(latents), count)]
        pictures, finite = (np.concatenate([part[name] for part in parts]) for name in ("images", "finite"))
        return pictures, finite, len(parts)

    def _in_tiles(self, latents: Floats, vae: str, plan: DecodePlan) -> tuple[Floats, Floats, int]:
        """The same in tiles; one picture at a time where the engines take one."""
        graph, tile = f"tile-{vae}", plan.tile
        assert tile is not None
        count = len(latents) if self._manifest.static_batch else 1
        spec, side = self._manifest.spec(graph, tile), self._manifest.side(self._resolution)
        decoder = TiledDecoder(self._backend, self._engine(graph, tile), spec, count, side)
        pictures, finite = [], []
        for i in range(0, len(latents), count):
            decoded = decoder.decode(self._run(f"head-{vae}", latents[i : i + count])["features"])
            pictures.append(decoded[0])
            finite.append(decoded[1])
        return np.concatenate(pictures), np.concatenate(finite), decoder.calls + len(pictures)

    def _run(self, graph: str, latents: Floats) -> dict[str, Floats]:
        """The outputs of a graph that takes latents, on the host."""
        engine, spec = self._engine(graph, self._resolution), self._manifest.spec(graph, self._resolution)
        return run_once(self._backend, engine, spec, latents)
