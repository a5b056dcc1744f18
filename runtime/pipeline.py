"""Engines and the sampling algebra to pictures: the torch-free runtime that users hold.

with Pipeline.load("engines/", resolution=256) as pipeline:
    images = pipeline.generate([207, 250], seeds=[0, 1], schedule="H1P5R3", guidance=4.0)  # uint8 [B, H, W, 3]
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends import Choice, choose_backend
from runtime.backends.base import BackendOptions, Engine, EngineFile, Ran
from runtime.conditioning import Conditioner
from runtime.errors import EngineError, NonFiniteError, RequestError
from runtime.guidance import guided_rows
from runtime.hashes import HashMemory, cache_folder
from runtime.images import to_uint8
from runtime.loop import Loop, Trunk, Usage
from runtime.manifest import EngineRecord, Manifest, check_file, read_manifest, rebuild_hint
from runtime.noise import noise_of_seeds
from runtime.plan import Callback
from runtime.request import Request, SamplerChoice, resolve_request, variant_of

Floats = NDArray[np.float32]
Images = NDArray[np.uint8]


@dataclass
class Result:
    """Latents [B, C, H, W] as sampled, images uint8 [B, P, P, 3] if there is a decoder, and what it took."""

    request: Request
    latents: Floats
    images: Images | None
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True)
class Batch:
    """Images `start` … of a request: latents [b, C, H, W] and, with a decoder, pictures uint8 [b, P, P, 3]."""

    start: int
    latents: Floats
    images: Images | None


class Pipeline:
    """One engine directory at one resolution on one backend. Close it, or use it as a context manager.

    Threads may share a pipeline: they take turns, batch by batch.
    """

    def __init__(self, folder: Path, manifest: Manifest, resolution: int, choice: Choice) -> None:
        self.folder, self.manifest, self.resolution, self.choice = folder, manifest, resolution, choice
        self._hashes = HashMemory()
        self._lock = threading.RLock()
        self._backend = choice.open()
        self._engines: dict[str, Engine] = {}
        self._closed = False
        try:
            networks = {"predictor": self._trunk("predictor", "conditioning")}
            if manifest.model.refiner is not None:
                networks["refiner"] = self._trunk("refiner", "refiner_conditioning")
        except BaseException:
            self.close()
            raise
        self._hashes.save()
        self._loop = Loop(self._backend, networks)

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
    ) -> Pipeline:
        """Opens an engine directory.

        Args:
            resolution: pixels a side; the only or the first built one if None.
            backend, provider: by name; the fastest that can run here if None.
            threads: CPU threads; one per physical core if None.
            allow_fallback: accept a slower provider than the one asked for.
            allow_foreign: try engines that another device or release built.

        Raises:
            EngineError: the directory or a file of it cannot be used.
            BackendError: no backend of this machine can run it, or not the one asked for.
            RequestError: the resolution was not built.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        resolution = manifest.resolutions[0] if resolution is None else resolution
        if resolution not in manifest.resolutions:
            raise RequestError(
                f"resolution {resolution}",
                allowed=", ".join(map(str, manifest.resolutions)),
                remedy=f"build it: flowturbo-export build-engines --resolution {resolution}",
            )
        if threads is not None and not 1 <= threads <= 1024:
            raise RequestError(f"{threads} threads", allowed="1 to 1024")
        options = BackendOptions(
            provider=provider,
            threads=threads,
            allow_fallback=allow_fallback,
            allow_foreign=allow_foreign,
            cache=cache_folder(),
        )
        return cls(folder, manifest, resolution, choose_backend(manifest, backend, options))

    @property
    def ran(self) -> Ran:
        """What really runs."""
        return self._backend.ran

    @property
    def precision(self) -> str:
        """What the networks compute in."""
        record = self.manifest.engine("predictor", self.resolution, self.choice.target)
        assert record is not None
        return record.precision

    def request(
        self,
        classes: int | str | Sequence[int | str],
        *,
        seeds: Sequence[int] | None = None,
        schedule: str | None = None,
        solver: str | None = None,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        guidance_channels: int | None = None,
        vae: str | None = None,
        force: bool = False,
    ) -> Request:
        """Resolves what was asked against what the directory can do; see `generate` for the arguments.

        Raises:
            RequestError: something in it is not possible; the message says what is.
        """
        return resolve_request(
            self.manifest,
            classes,
            seeds=seeds,
            guidance=guidance,
            guidance_channels=guidance_channels,
            sampler=SamplerChoice(schedule, solver, steps, force),
            vae=vae,
        )

    def generate(
        self,
        classes: int | str | Sequence[int | str],
        *,
        seeds: Sequence[int] | None = None,
        schedule: str | None = None,
        solver: str | None = None,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        guidance_channels: int | None = None,
        vae: str | None = None,
        callback: Callback | None = None,
    ) -> Images:
        """Pictures, uint8 [B, H, W, 3].

        Args:
            classes: label or name per image, or one.
            seeds: per image; 0, 1, 2 … if None. A picture depends on its seed alone.
            schedule: FlowTurbo blocks such as "H1P5R3"; or `solver` with `steps`; the directory's default if neither.
            guidance: scale, one for all or one per image; 1 is none.
            guidance_channels: the first so many latent channels are guided; 3 is the reference's habit.
            vae: decoder variant.
            callback: called after every evaluation with a dict of `index`, `evaluations`, `t`, `block`.

        Raises:
            RequestError: the request is not possible.
            NonFiniteError: a network or the decoder overflowed.
        """
        request = self.request(
            classes, seeds=seeds, schedule=schedule, solver=solver, steps=steps, guidance=guidance, vae=vae
        )
        if request.vae is None:
            raise RequestError(
                "this directory was built with --vae none: it makes latents only",
                remedy="use run() or rebuild with --vae",
            )
        images = self.run(request, callback=callback).images
        assert images is not None
        return images

    def run(self, request: Request, *, noise: Floats | None = None, callback: Callback | None = None) -> Result:
        """Carries out a request in batches of at most max-batch images.

        Args:
            noise: [B, C, H, W] float32 in place of the seeds' noise.
        """
        usage, latents, images = Usage(), [], []
        for batch in self.batches(request, usage, noise=noise, callback=callback):
            latents.append(batch.latents)
            images += [] if batch.images is None else [batch.images]
        return Result(request, np.concatenate(latents), np.concatenate(images) if images else None, usage)

    def batches(
        self, request: Request, usage: Usage, *, noise: Floats | None = None, callback: Callback | None = None
    ) -> Iterator[Batch]:
        """Carries out a request batch by batch, so that many pictures need the memory of a few.

        Args:
            usage: counts engine calls and time.
            noise: [B, C, H, W] float32 in place of the seeds' noise.
        """
        if noise is not None:
            self._check_noise(noise, request)
        for start in range(0, len(request.labels), self.manifest.max_batch):
            part = slice(start, start + self.manifest.max_batch)
            with self._lock:
                self._open()
                drawn = noise_of_seeds(request.seeds[part], self._latent_shape) if noise is None else noise[part]
                sampled = self._sample(request, part, drawn, usage, callback)
                pictures = None if request.vae is None else to_uint8(self._decode(sampled, request.vae, usage))
            yield Batch(start, sampled, pictures)

    def decode(self, latents: Floats, vae: str | None = None) -> Images:
        """Latents [B, C, H, W] as sampled to pictures, uint8 [B, P, P, 3]."""
        self._open()
        variant = variant_of(self.manifest, vae)
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
            parts = [self._decode(latents[i : i + size], variant, Usage()) for i in range(0, len(latents), size)]
        return to_uint8(np.concatenate(parts))

    def close(self) -> None:
        """Frees engines and memory; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for engine in self._engines.values():
            engine.close()
        self._backend.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        if self._closed:
            raise EngineError("the pipeline was closed", remedy="load it again: Pipeline.load(…)")

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        side = self.manifest.side(self.resolution)
        return self.manifest.model.channels, side, side

    def _check_noise(self, noise: Floats, request: Request) -> None:
        expected, found = (len(request.labels), *self._latent_shape), np.asarray(noise)
        if found.shape != expected or found.dtype != np.float32 or not np.isfinite(found).all():
            raise RequestError(
                f"noise of shape {list(found.shape)} and type {found.dtype}",
                allowed=f"finite float32 of shape {list(expected)}: one per image asked for",
            )

    def _sample(self, request: Request, part: slice, noise: Floats, usage: Usage, callback: Callback | None) -> Floats:
        labels, scales, images = list(request.labels[part]), list(request.scales[part]), len(noise)
        static = self.manifest.static_batch
        if static:  # a fixed batch is filled up with its last image
            missing = self.manifest.max_batch - images
            labels, scales = labels + labels[-1:] * missing, scales + scales[-1:] * missing
            noise = np.concatenate([noise, np.repeat(noise[-1:], missing, axis=0)])
        rows = guided_rows(
            labels,
            scales,
            self.manifest.model.null_label,
            self.manifest.model.channels,
            request.guidance_channels,
            double=static and any(scale != 1.0 for scale in scales),
        )
        return self._loop.run(request.sampler.plan, np.ascontiguousarray(noise), rows, usage, callback)[:images]

    def _decode(self, latents: Floats, vae: str, usage: Usage) -> Floats:
        engine = self._engine(f"decoder-{vae}")
        started, images = time.perf_counter(), len(latents)
        if self.manifest.static_batch:
            latents = np.concatenate([latents, np.repeat(latents[-1:], self.manifest.max_batch - images, axis=0)])
        source = self._backend.buffer(latents.shape, np.float32)
        source.upload(np.ascontiguousarray(latents))
        pixels = self._backend.buffer((len(latents), 3, self.resolution, self.resolution), np.float32)
        finite = self._backend.buffer((len(latents),), np.float32)
        engine.run({"latents": source}, {"images": pixels, "finite": finite})
        pictures, whole = pixels.numpy()[:images], finite.numpy()[:images]
        usage.add("decoder", time.perf_counter() - started)
        if not (whole == 1).all():
            raise NonFiniteError(
                f"the decoder {vae} overflowed: {int((whole != 1).sum())} of {images} pictures would be black",
                remedy="build its decoder in fp32: flowturbo-export build-engines --precision fp32 (or bf16)",
            )
        return pictures

    def _trunk(self, graph: str, conditioning: str) -> Trunk:
        spec = self.manifest.spec(graph, self.resolution)
        modulations = self.manifest.model.modulations[graph]
        return Trunk(self._engine(graph), spec, Conditioner(self._backend, self._engine(conditioning), modulations))

    def _engine(self, graph: str) -> Engine:
        if graph not in self._engines:
            self._engines[graph] = self._backend.load(self._engine_file(graph))
        return self._engines[graph]

    def _engine_file(self, graph: str) -> EngineFile:
        record = self.manifest.engine(graph, self.resolution, self.choice.target)
        if record is None:
            raise EngineError(
                f"{self.folder} has no {graph} for {self.choice.target} at {self.resolution} px",
                remedy=rebuild_hint(self.folder),
            )
        for file in self.manifest.files_of(record):
            found = check_file(self.folder, file, hashed=False)
            if self._hashes.sha256(found) != file.sha256:
                check_file(self.folder, file)  # reads it again and says what is wrong
        return engine_file(self.folder, self.manifest, record)


def engine_file(folder: Path, manifest: Manifest, record: EngineRecord) -> EngineFile:
    """What a backend is told of an engine."""
    return EngineFile(
        path=folder / record.path,
        graph=record.graph,
        precision=record.precision,
        spec=manifest.spec(record.graph, record.resolution),
        sha256="".join(file.sha256 for file in manifest.files_of(record)),
        static=manifest.static_batch,
        built=record.built,
    )


def describe(pipeline: Pipeline) -> dict[str, Any]:
    """What runs, for run.json and the terminal."""
    ran = pipeline.ran
    return {
        "backend": ran.backend,
        "provider": ran.provider,
        "device": ran.device,
        "precision": pipeline.precision,
        "target": pipeline.choice.target,
        "chosen": pipeline.choice.reason,
        "versions": dict(ran.versions),
        "notes": list(ran.notes),
    }
