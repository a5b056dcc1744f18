"""A quantised build and its wider twin side by side: evaluations in turn, pictures from the same seeds, sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.lowbit.layers import TRUNKS
from export.proof.twin import ReferenceBuild, locate_latents_cache
from export.proof.verify import choose_runner
from export.targets import resolve_graph_precision
from flowturbo.evaluation.quality.same_seed import latent_rms, psnr
from flowturbo.evaluation.quality.sampled_latents import SampledLatents, make_balanced_draw
from runtime.backends import BackendChoice
from runtime.backends.base import Backend, BackendOptions
from runtime.directory.manifest import Manifest
from runtime.pipeline import Pipeline, build_engine_file
from runtime.system.progress import Progress

Say = Callable[[str], None]
MAX_ROUNDS, BUDGET_S = 40, 60.0
"""Evaluations of each side that are timed at most, and seconds that they may take together."""
MIN_ROUNDS = 5
Side = tuple[Path, Manifest, BackendChoice, str]
"""Folder, what can be run of it, backend and its name."""


@dataclass(frozen=True)
class GateComparison:
    """A build and its twin, for one target at one resolution."""

    folder: Path
    manifest: Manifest
    reference: ReferenceBuild
    target: str
    precision: str
    resolution: int

    def find_sides(self) -> tuple[Side, Side]:
        """The build and the twin."""
        return self._find_side(self.folder, self.manifest), self._find_side(
            self.reference.folder, self.reference.manifest
        )

    def _find_side(self, folder: Path, manifest: Manifest) -> Side:
        return (folder, *choose_runner(manifest, self.target, BackendOptions()))

    def count_bytes(self, graphs: Sequence[str] | None = None) -> tuple[int, int]:
        """Size of the ONNX files, of some graphs or of all, of the build and of the twin."""
        builds = (self.manifest, self.precision), (self.reference.manifest, self.reference.precision)
        build_bytes, reference_bytes = (
            _count_file_bytes(m, resolve_graph_precision(self.target, p), self.resolution, graphs) for m, p in builds
        )
        return build_bytes, reference_bytes

    def count_trunk_weights(self) -> dict[str, int]:
        """Bytes by kind, of predictor and refiner together."""
        file_precision = resolve_graph_precision(self.target, self.precision)
        bytes_by_kind: dict[str, int] = {}
        for graph in TRUNKS:
            record = self.manifest.find_graph(graph, self.resolution, file_precision)
            for kind, size in (record.weights if record else {}).items():
                bytes_by_kind[kind] = bytes_by_kind.get(kind, 0) + size
        return bytes_by_kind


def measure_evaluation_ms(sides: Sequence[Side], resolution: int) -> list[float]:
    """Median milliseconds of one guided predictor evaluation of one image, of each side; they take turns."""
    with ExitStack() as stack:
        predictors = []
        for folder, manifest, choice, _ in sides:
            predictors.append(_TimedPredictor(folder, manifest, choice, resolution))
            stack.callback(predictors[-1].close)
        times_ms: list[list[float]] = [[] for _ in predictors]
        started = time.monotonic()
        while len(times_ms[0]) < MAX_ROUNDS and (
            len(times_ms[0]) <= MIN_ROUNDS or time.monotonic() - started < BUDGET_S
        ):
            for predictor, times in zip(predictors, times_ms, strict=True):
                times.append(predictor.measure_ms())
    return [float(np.median(times[1:])) for times in times_ms]  # the first warms up


class _TimedPredictor:
    """A predictor that is loaded, with buffers of one guided image."""

    def __init__(self, folder: Path, manifest: Manifest, choice: BackendChoice, resolution: int) -> None:
        record = next(e for e in manifest.engines if (e.graph, e.resolution) == ("predictor", resolution))
        self._backend: Backend = choice.open()
        self._engine = self._backend.load(build_engine_file(folder, manifest, record))
        spec, images = manifest.build_spec("predictor", resolution), manifest.max_batch if manifest.static_batch else 1
        sizes = {"B": images, "N": 2 * images}
        random = np.random.Generator(np.random.Philox(0))
        self._inputs: dict[str, Any] = {}
        for name, tensor in spec.inputs.items():
            shape = tensor.resolve_shape(sizes)
            self._inputs[name] = self._backend.allocate(shape, tensor.numpy_dtype)
            if name in ("base", "mods"):
                self._inputs[name].upload(random.standard_normal(shape, dtype=np.float32))
        self._inputs["a"].upload(np.eye(*self._inputs["a"].shape, dtype=np.float32))  # x = base for one image
        self._inputs["atol"].upload(np.ones(self._inputs["atol"].shape, np.float32))  # the error is over a tolerance
        self._outputs = {
            n: self._backend.allocate(t.resolve_shape(sizes), t.numpy_dtype) for n, t in spec.outputs.items()
        }

    def measure_ms(self) -> float:
        started = time.perf_counter()
        self._engine.run(self._inputs, self._outputs)
        self._outputs["v_rms"].numpy()  # waits for the device
        return 1e3 * (time.perf_counter() - started)

    def close(self) -> None:
        self._engine.close()
        self._backend.close()


class _SayProgress(Progress):
    def __init__(self, say: Say) -> None:
        self._say = say

    def update(self, task: str, done: int, total: int) -> None:
        self._say(f"{task} ({done} of {total})")


def compare_images(comparison: GateComparison, images: int, say: Say) -> tuple[Any, Any]:
    """Per image, from the same noise: distance of the latents, and decibels of the pictures (None without decoder).

    Latents are kept beside the twin, so that a gate that was stopped goes on.
    """
    latents: list[Any] = []
    pictures: list[Any] = []
    draw = make_balanced_draw(sorted(comparison.manifest.model.classes), images)
    for folder, manifest, choice, _ in comparison.find_sides():
        with Pipeline(folder, manifest, comparison.resolution, choice, None) as pipeline:
            label = f"gate at {comparison.resolution} px: {images} images in {pipeline.precision}"
            sampled = SampledLatents(pipeline, draw, {}, locate_latents_cache(comparison.folder))
            chunks = sampled.read_chunks(progress=_SayProgress(say), task=label)
            batches = [(chunk.latents, pipeline.decode(chunk.latents) if manifest.vaes else None) for chunk in chunks]
        latents.append(np.concatenate([array for array, _ in batches]))
        pictures.append(np.concatenate([array for _, array in batches]) if manifest.vaes else None)
    decibels = None if pictures[0] is None or pictures[1] is None else psnr(*pictures)
    return latent_rms(*latents), decibels


def _count_file_bytes(
    manifest: Manifest, file_precision: str, resolution: int, graphs: Sequence[str] | None = None
) -> int:
    """Size of a set of ONNX files, of some or of all its graphs."""
    records = [g for g in manifest.graphs if (g.precision, g.resolution) == (file_precision, resolution)]
    # A tiled decoder comes on top of the whole one, and the twin has none.
    counted = [g for g in records if (g.graph in graphs if graphs else not g.graph.startswith("head-"))]
    return sum(manifest.find_file(path).bytes for g in counted for path in (g.path, g.data) if path is not None)
