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
from export.proof.twin import Twin, kept_beside
from export.proof.verify import runner_for
from export.targets import graph_precision
from flowturbo.evaluation.quality.same_seed import latent_rms, psnr
from flowturbo.evaluation.quality.sampled_latents import SampledLatents, balanced_draw
from runtime.backends import Choice
from runtime.backends.base import Backend, BackendOptions
from runtime.directory.manifest import Manifest
from runtime.pipeline import Pipeline, engine_file

Say = Callable[[str], None]
ROUNDS, BUDGET_S = 40, 60.0
"""Evaluations of each side that are timed at most, and seconds that they may take together."""
LEAST_ROUNDS = 5
Side = tuple[Path, Manifest, Choice, str]
"""Folder, what can be run of it, backend and its name."""


@dataclass(frozen=True)
class Pair:
    """A build and its twin, for one target at one resolution."""

    folder: Path
    manifest: Manifest
    twin: Twin
    target: str
    precision: str
    resolution: int

    def sides(self) -> tuple[Side, Side]:
        """The build and the twin."""
        return self._side(self.folder, self.manifest), self._side(self.twin.folder, self.twin.manifest)

    def _side(self, folder: Path, manifest: Manifest) -> Side:
        return (folder, *runner_for(manifest, self.target, BackendOptions()))

    def bytes(self, graphs: Sequence[str] | None = None) -> tuple[int, int]:
        """Size of the ONNX files, of some graphs or of all, of the build and of the twin."""
        sets = (self.manifest, self.precision), (self.twin.manifest, self.twin.precision)
        mine, other = (_bytes(m, graph_precision(self.target, p), self.resolution, graphs) for m, p in sets)
        return mine, other

    def trunk_weights(self) -> dict[str, int]:
        """Bytes by kind, of predictor and refiner together."""
        files = graph_precision(self.target, self.precision)
        found: dict[str, int] = {}
        for graph in TRUNKS:
            record = self.manifest.graph(graph, self.resolution, files)
            for kind, size in (record.weights if record else {}).items():
                found[kind] = found.get(kind, 0) + size
        return found


def evaluation_ms(sides: Sequence[Side], resolution: int) -> list[float]:
    """Median milliseconds of one guided predictor evaluation of one image, of each side; they take turns."""
    with ExitStack() as stack:
        opened = []
        for folder, manifest, choice, _ in sides:
            opened.append(_Evaluation(folder, manifest, choice, resolution))
            stack.callback(opened[-1].close)
        took: list[list[float]] = [[] for _ in opened]
        began = time.monotonic()
        while len(took[0]) < ROUNDS and (len(took[0]) <= LEAST_ROUNDS or time.monotonic() - began < BUDGET_S):
            for one, times in zip(opened, took, strict=True):
                times.append(one.milliseconds())
    return [float(np.median(times[1:])) for times in took]  # the first warms up


class _Evaluation:
    """A predictor that is loaded, with buffers of one guided image."""

    def __init__(self, folder: Path, manifest: Manifest, choice: Choice, resolution: int) -> None:
        record = next(e for e in manifest.engines if (e.graph, e.resolution) == ("predictor", resolution))
        self._backend: Backend = choice.open()
        self._engine = self._backend.load(engine_file(folder, manifest, record))
        spec, images = manifest.spec("predictor", resolution), manifest.max_batch if manifest.static_batch else 1
        sizes = {"B": images, "N": 2 * images}
        random = np.random.Generator(np.random.Philox(0))
        self._inputs: dict[str, Any] = {}
        for name, tensor in spec.inputs.items():
            shape = tensor.sized(sizes)
            self._inputs[name] = self._backend.buffer(shape, tensor.numpy)
            if name in ("base", "mods"):
                self._inputs[name].upload(random.standard_normal(shape, dtype=np.float32))
        self._inputs["a"].upload(np.eye(*self._inputs["a"].shape, dtype=np.float32))  # x = base for one image
        self._inputs["atol"].upload(np.ones(self._inputs["atol"].shape, np.float32))  # the error is over a tolerance
        self._outputs = {n: self._backend.buffer(t.sized(sizes), t.numpy) for n, t in spec.outputs.items()}

    def milliseconds(self) -> float:
        began = time.perf_counter()
        self._engine.run(self._inputs, self._outputs)
        self._outputs["v_rms"].numpy()  # waits for the device
        return 1e3 * (time.perf_counter() - began)

    def close(self) -> None:
        self._engine.close()
        self._backend.close()


def compared(pair: Pair, images: int, say: Say) -> tuple[Any, Any]:
    """Per image, from the same noise: distance of the latents, and decibels of the pictures (None without decoder).

    Latents are kept beside the twin, so that a gate that was stopped goes on.
    """
    latents: list[Any] = []
    pictures: list[Any] = []
    draw = balanced_draw(sorted(pair.manifest.model.classes), images)
    for folder, manifest, choice, _ in pair.sides():
        with Pipeline(folder, manifest, pair.resolution, choice, None) as pipeline:
            what = f"gate at {pair.resolution} px: {images} images in {pipeline.precision}"
            sampled = SampledLatents(pipeline, draw, {}, kept_beside(pair.folder))
            chunks = sampled.chunks(report=lambda done, of, what=what: say(f"{what} ({done} of {of})"))  # type: ignore[misc]
            made = [(c.latents, pipeline.decode(c.latents) if manifest.vaes else None) for c in chunks]
        latents.append(np.concatenate([one for one, _ in made]))
        pictures.append(np.concatenate([one for _, one in made]) if manifest.vaes else None)
    seen = None if pictures[0] is None or pictures[1] is None else psnr(*pictures)
    return latent_rms(*latents), seen


def _bytes(manifest: Manifest, files: str, resolution: int, graphs: Sequence[str] | None = None) -> int:
    """Size of a set of ONNX files, of some or of all its graphs."""
    records = [g for g in manifest.graphs if (g.precision, g.resolution) == (files, resolution)]
    # A tiled decoder comes on top of the whole one, and the twin has none.
    chosen = [g for g in records if (g.graph in graphs if graphs else not g.graph.startswith("head-"))]
    return sum(manifest.file(path).bytes for g in chosen for path in (g.path, g.data) if path is not None)
