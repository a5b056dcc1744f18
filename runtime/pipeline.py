"""Engines and the sampling algebra to pictures: the torch-free runtime that users hold.

with Pipeline.load("engines/", resolution=256) as pipeline:
    images = pipeline.generate([207, 250], seeds=[0, 1], sampler="H1P5R3", guidance=4.0)  # uint8 [B, H, W, 3]
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends import BackendChoice, choose_backend
from runtime.backends.base import BackendOptions, Engine, EngineFile, RuntimeInfo, pad_batch, run_once
from runtime.batching import choose_batch_size, group_parts, sample_part, split_request
from runtime.directory.manifest import check_file, read_manifest
from runtime.directory.onnx_reader import check_onnx_file
from runtime.directory.records import EngineRecord, Manifest, format_rebuild_hint
from runtime.execution.conditioning import Conditioner
from runtime.execution.decoding import Decoders, TileChoice
from runtime.execution.fixed_loop import FixedLoop, LoadedNetwork, Usage
from runtime.images import convert_to_uint8
from runtime.request import Request, RequestOptions, resolve_request, resolve_vae
from runtime.sampling.controllers import Journal
from runtime.sampling.noise import NoiseStream
from runtime.sampling.plan import Callback
from runtime.system.errors import EngineError, RequestError
from runtime.system.hashes import find_cache_folder, sha256_cached

if TYPE_CHECKING:
    from typing_extensions import Unpack  # for Python before 3.11; nothing of it is needed to run

Floats = NDArray[np.float32]
Images = NDArray[np.uint8]


MAX_LATENT_RMS = 20.0
"""Root mean square of final latents above which a picture cannot be one."""


@dataclass
class Result:
    """Latents [B, C, H, W] as sampled, images uint8 [B, P, P, 3] if there is a decoder, and what it took.

    `journals` hold the steps of every image where the sampler chose them, and are empty otherwise.
    """

    request: Request
    latents: Floats
    images: Images | None
    usage: Usage = field(default_factory=Usage)
    journals: list[Journal] = field(default_factory=list)


@dataclass(frozen=True)
class ImageBatch:
    """Images `start` … of a request: latents [b, C, H, W] and, with a decoder, pictures uint8 [b, P, P, 3]."""

    start: int
    latents: Floats
    images: Images | None
    journals: list[Journal] = field(default_factory=list)


class Pipeline:
    """One engine directory at one resolution on one backend. Close it, or use it as a context manager.

    Threads may share a pipeline: they take turns, batch by batch.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, resolution: int, choice: BackendChoice, decode_tile: TileChoice = "auto"
    ) -> None:
        self.folder, self.manifest, self.resolution, self.choice = folder, manifest, resolution, choice
        self._absolute_folder, self._decode_tile = folder.absolute(), decode_tile  # for copies
        self._lock = threading.RLock()
        self._is_forked = False
        _OPEN_PIPELINES.add(self)
        self._backend = choice.open()
        self._engines: dict[str, Engine] = {}
        self._is_closed = False
        try:
            self.decoders = Decoders(self._backend, manifest, choice.target, resolution, decode_tile, self._load_engine)
            networks = {"predictor": self._load_network("predictor", "conditioning")}
            if manifest.model.refiner is not None:
                networks["refiner"] = self._load_network("refiner", "refiner_conditioning")
        except BaseException:
            self.close()
            raise
        self._loop = FixedLoop(self._backend, networks)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        resolution: int | None = None,
        backend: str | None = None,
        provider: str | None = None,
        threads: int | None = None,
        allow_fallback: bool = False,
        allow_foreign: bool = False,
        decode_tile: TileChoice = "auto",
    ) -> Pipeline:
        """Open an engine directory.

        Args:
            resolution: pixels a side; the only or the first built one if None.
            backend, provider: by name; the fastest that can run here if None.
            threads: CPU threads; one per physical core if None.
            allow_fallback: accept a slower provider than the one asked for.
            allow_foreign: try engines that another device or release built.
            decode_tile: decode in tiles of so many pixels, which must have been built: slower, in less memory; "auto"
                does so where memory is short, and warns; None never.

        Raises:
            EngineError: the directory or a file of it cannot be used.
            BackendError: no backend of this machine can run it, or not the one asked for.
            RequestError: the resolution or the tile was not built.
        """
        folder = Path(folder)
        if threads is not None:
            is_number = isinstance(threads, int | np.integer) and not isinstance(threads, bool)
            if not is_number or not 1 <= threads <= 1024:
                raise RequestError(f"{threads!r} threads", allowed="1 to 1024", remedy="give a whole number")
        for option, value in (("backend", backend), ("provider", provider)):
            if value is not None and not isinstance(value, str):
                raise RequestError(f"{option} {value!r}", allowed="a name")
        manifest = read_manifest(folder)
        resolution = manifest.resolutions[0] if resolution is None else resolution
        if resolution not in manifest.resolutions:
            raise RequestError(
                f"resolution {resolution}",
                allowed=", ".join(map(str, manifest.resolutions)),
                remedy=f"build it: flowturbo-export build-engines --resolution {resolution}",
            )
        options = BackendOptions(
            provider=provider,
            threads=None if threads is None else int(threads),
            allow_fallback=allow_fallback,
            allow_foreign=allow_foreign,
            cache=find_cache_folder(),
        )
        choice = choose_backend(manifest, backend, options)
        return cls(folder, manifest, resolution, choice, decode_tile)

    @property
    def ran(self) -> RuntimeInfo:
        """The backend, provider and device that run."""
        return self._backend.ran

    @property
    def decode_tile(self) -> int | None:
        """Side in pixels of the tiles that pictures are decoded in, or were last; None for whole pictures."""
        return self.decoders.tile

    @property
    def precision(self) -> str:
        """Precision that the networks compute in."""
        return self._find_engine("predictor", self.resolution).precision

    def request(self, classes: int | str | Sequence[int | str], **options: Unpack[RequestOptions]) -> Request:
        """Resolve a request against what the directory can do.

        Args:
            classes: label or name per image, or one; "207:0.6,250:0.4" mixes classes.
            options: see `RequestOptions`: seeds, guidance, and sampler="H1P5R3", a saved sampler's name, or a
                solver's with steps=; adaptive= with tolerance= chooses the steps per image.

        Raises:
            RequestError: something in it is not possible; the message says what is.
        """
        return resolve_request(self.manifest, classes, options)

    def generate(
        self,
        classes: int | str | Sequence[int | str],
        *,
        callback: Callback | None = None,
        **options: Unpack[RequestOptions],
    ) -> Images:
        """Generate pictures, uint8 [B, H, W, 3].

        Args:
            classes: label or name per image, or one.
            callback: called after every evaluation with a dict of `index`, `evaluations`, `t`, `block`.
            options: those of `request`.

        Raises:
            RequestError: the request is not possible.
            NonFiniteError: a network or the decoder overflowed.
        """
        request = self.request(classes, **options)
        if request.vae is None:
            raise RequestError(
                "this directory was built with --vae none: it makes latents only",
                remedy="use run() or rebuild with --vae",
            )
        batches = self.generate_batches(request, Usage(), callback=callback)
        return np.concatenate([batch.images for batch in batches if batch.images is not None])

    def run(self, request: Request, *, noise: Floats | None = None, callback: Callback | None = None) -> Result:
        """Carry out a request in batches of at most max-batch images.

        Args:
            noise: [B, C, H, W] float32 in place of the seeds' noise.
        """
        result = Result(request, np.empty((0, *self._latent_shape), np.float32), None)
        latents, images = [], []
        for batch in self.generate_batches(request, result.usage, noise=noise, callback=callback):
            latents.append(batch.latents)
            images += [] if batch.images is None else [batch.images]
            result.journals += batch.journals
        result.latents = np.concatenate(latents)
        result.images = np.concatenate(images) if images else None
        return result

    def generate_batches(
        self, request: Request, usage: Usage, *, noise: Floats | None = None, callback: Callback | None = None
    ) -> Iterator[ImageBatch]:
        """Carry out a request batch by batch, so that many pictures need the memory of a few.

        Args:
            usage: counts engine calls and time.
            noise: [B, C, H, W] float32 in place of the seeds' noise; data where the sampler goes backwards.
        """
        if noise is not None:
            expected_shape, array = (len(request.labels), *self._latent_shape), np.asarray(noise)
            if array.shape != expected_shape or array.dtype != np.float32 or not np.isfinite(array).all():
                raise RequestError(
                    f"noise of shape {list(array.shape)} and type {array.dtype}",
                    allowed=f"finite float32 of shape {list(expected_shape)}: one per image asked for",
                )
        for parts in self.split_batches(request):
            with self._lock:
                self._check_open()
                latent_parts: list[Floats] = []
                journals: list[Journal] = []
                for part in parts:
                    stream = NoiseStream(request.seeds[part], self._latent_shape)
                    start = stream.initial if noise is None else noise[part]
                    part_latents, part_journals = sample_part(
                        self._loop, self.manifest, request, part, start, stream.draw, usage, callback
                    )
                    latent_parts.append(part_latents)
                    journals += part_journals
                latents = np.concatenate(latent_parts)
                norms = np.sqrt(np.square(latents, dtype=np.float64).mean(axis=(1, 2, 3)))
                for index in np.flatnonzero(norms > MAX_LATENT_RMS):
                    warnings.warn(
                        f"the latents of image {parts[0].start + index} have a root mean square of {norms[index]:.3g}; "
                        "those of pictures have about 1. The sampler or its start has diverged: the picture shows "
                        "nothing",
                        stacklevel=2,
                    )
                pictures = (
                    None if request.vae is None else convert_to_uint8(self.decoders.decode(latents, request.vae, usage))
                )
            yield ImageBatch(parts[0].start, latents, pictures, journals)

    def split_batches(self, request: Request) -> list[list[slice]]:
        """Return the batches of a request: images that are decoded together, in parts that are evaluated together.

        A callback is called after every evaluation of every part.
        """
        max_images = choose_batch_size(self.manifest, self.choice.target, self.resolution)
        return list(group_parts(split_request(request, max_images), self.manifest.max_batch))

    def reverse(
        self, latents: Floats, classes: int | str | Sequence[int | str], **options: Unpack[RequestOptions]
    ) -> Floats:
        """Return the noise [B, C, H, W] from which a deterministic sampler makes these latents.

        Args:
            latents: [B, C, H, W] float32 as sampled, or as `encode` gives them.
            classes, options: as for `request`; stochastic solvers and schedules with R blocks are refused.
        """
        reverse_options: RequestOptions = {"guidance": 1.0, **options, "backwards": True}
        request = self.request(classes, **reverse_options)
        return self.run(replace(request, vae=None), noise=latents).latents

    def encode(self, images: Images) -> Floats:
        """Return the mean latents [B, C, H, W] of pictures, uint8 [B, P, P, 3], scaled as sampled latents are.

        Raises:
            RequestError: the directory was built without an encoder, or the pictures have another size.
        """
        self._check_open()
        if self.manifest.find_engine("encoder", self.resolution, self.choice.target) is None:
            raise RequestError("this directory has no encoder", remedy="build it with --encoder")
        expected_shape = (self.resolution, self.resolution, 3)
        if images.ndim != 4 or images.shape[1:] != expected_shape or images.dtype != np.uint8 or not len(images):
            raise RequestError(
                f"pictures of shape {list(images.shape)} and type {images.dtype}",
                allowed=f"uint8 {['B', *expected_shape]}, at least one",
            )
        pixels = (images.transpose(0, 3, 1, 2) / 255).astype(np.float32)
        size, spec = self.manifest.max_batch, self.manifest.build_spec("encoder", self.resolution)
        latents = []
        with self._lock:
            for i in range(0, len(pixels), size):
                part = pixels[i : i + size]
                padded = pad_batch(part, size) if self.manifest.static_batch else part
                latents.append(run_once(self._backend, self._load_engine("encoder"), spec, padded)["mean"][: len(part)])
        return np.concatenate(latents)

    def decode(self, latents: Floats, vae: str | None = None) -> Images:
        """Decode latents [B, C, H, W], as sampled, to pictures, uint8 [B, P, P, 3]."""
        self._check_open()
        variant = resolve_vae(self.manifest, vae)
        if variant is None:
            raise RequestError("this directory has no decoder", remedy="rebuild it with --vae")
        latents = np.asarray(latents)
        if latents.shape[1:] != self._latent_shape or latents.dtype != np.float32 or not len(latents):
            raise RequestError(
                f"latents of shape {list(latents.shape)} and type {latents.dtype}",
                allowed=f"float32 of shape {['B', *self._latent_shape]}, at least one",
            )
        size = self.manifest.max_batch
        with self._lock:
            parts = [
                self.decoders.decode(latents[i : i + size], variant, Usage()) for i in range(0, len(latents), size)
            ]
        return convert_to_uint8(np.concatenate(parts))

    def close(self) -> None:
        """Free engines and memory, after the batch of another thread is done; a second call does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            for engine in self._engines.values():
                engine.close()
            self._backend.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle a pipeline as its folder and options: the copy loads the engines again.

        Raises:
            EngineError: the pipeline was closed; or, from the copy, the folder is not there or holds other engines.
        """
        self._check_open()
        return Pipeline, (
            self._absolute_folder, self.manifest, self.resolution, self.choice, self._decode_tile
        )  # fmt: skip

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_forked:
            raise EngineError(
                "this process was forked while another thread was generating with the pipeline",
                remedy="load the pipeline in the child, or start the child by spawn",
            )
        if self._is_closed:
            raise EngineError("the pipeline was closed", remedy="load it again: Pipeline.load(…)")

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        side = self.manifest.compute_side(self.resolution)
        return self.manifest.model.channels, side, side

    def _load_network(self, graph: str, conditioning: str) -> LoadedNetwork:
        spec = self.manifest.build_spec(graph, self.resolution)
        modulations = self.manifest.model.modulations[graph]
        return LoadedNetwork(
            self._load_engine(graph), spec, Conditioner(self._backend, self._load_engine(conditioning), modulations)
        )

    def _load_engine(self, graph: str, resolution: int | None = None) -> Engine:
        """Load a graph's engine at the pipeline's resolution, or at another; once, after its files were checked."""
        if graph not in self._engines:
            record = self._find_engine(graph, resolution or self.resolution)
            for file in self.manifest.list_engine_files(record):
                path = check_file(self.folder, file, check_hash=False)
                if sha256_cached(path) != file.sha256:
                    check_file(self.folder, file)  # reads it again and says what is wrong
            onnx_record = self.manifest.find_engine_graph(record)
            if onnx_record is not None:
                check_onnx_file(self.folder, onnx_record, check_types=False)
            self._engines[graph] = self._backend.load(build_engine_file(self.folder, self.manifest, record))
        return self._engines[graph]

    def _find_engine(self, graph: str, resolution: int) -> EngineRecord:
        record = self.manifest.find_engine(graph, resolution, self.choice.target)
        if record is None:
            raise EngineError(
                f"{self.folder} has no {graph} for {self.choice.target} at {resolution} px",
                remedy=format_rebuild_hint(self.folder),
            )
        return record


_OPEN_PIPELINES: weakref.WeakSet[Pipeline] = weakref.WeakSet()


def _replace_locks() -> None:
    """Give the pipelines of a forked child new locks: whichever thread holds one is not in this process."""
    for pipeline in list(_OPEN_PIPELINES):
        # A batch that was half done stays half done: the backend waits for threads that are gone.
        pipeline._is_forked = not pipeline._lock.acquire(blocking=False)
        if pipeline._is_forked:
            pipeline._is_closed, pipeline._lock = True, threading.RLock()
        else:
            pipeline._lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_replace_locks)


def build_engine_file(folder: Path, manifest: Manifest, record: EngineRecord) -> EngineFile:
    """Describe an engine of a directory to a backend."""
    graph = manifest.find_engine_graph(record)
    return EngineFile(
        path=folder / record.path,
        graph=record.graph,
        precision=record.precision,
        spec=manifest.build_spec(record.graph, record.resolution),
        sha256="".join(file.sha256 for file in manifest.list_engine_files(record)),
        static=manifest.static_batch,
        built=record.built,
        pairs_fit=graph is not None and graph.pairs_fit,
    )


def describe_pipeline(pipeline: Pipeline) -> dict[str, Any]:
    """Describe what runs, for run.json and the terminal."""
    ran = pipeline.ran
    return {
        "backend": ran.backend,
        "provider": ran.provider,
        "device": ran.device,
        "precision": pipeline.precision,
        "target": pipeline.choice.target,
        "chosen": pipeline.choice.reason,
        "versions": dict(ran.versions),
        "decode_tile": pipeline.decode_tile,
        "notes": [*ran.notes, *pipeline.decoders.notes],
    }
