"""The gate of quantised builds: what they are worth beside their wider twin, measured in the same run.

No gain is assumed. The twin (fp32 on a CPU, fp16 for a GPU) is exported beside the build, both evaluate in turn, both
make the same pictures; a build that is not faster, not smaller or too far from its twin is refused without --force.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from export.layers import TRUNKS
from export.precision import QUANTISED, form_of, graph_precision
from export.recipe import PLAIN
from export.request import BuildRequest
from export.stage import Stage, stage_for
from export.verify import NOT_EXECUTED, runner_for
from flowturbo.evaluation.sameseed import latent_rms, psnr
from flowturbo.evaluation.sampling import balanced_draw
from runtime.backends import Choice
from runtime.backends.base import Backend, BackendOptions
from runtime.backends.onnxruntime import installed
from runtime.errors import BackendError, ProofError
from runtime.files import sha256_of
from runtime.hardware import against_openvino, cpu, tensorrt_usable
from runtime.manifest import GPU_TARGETS, EngineRecord, FileRecord, GateRecord, Manifest
from runtime.pipeline import Pipeline, engine_file

Say = Callable[[str], None]
LEAST_IMAGES = 64
ROUNDS, BUDGET_S = 40, 60.0
"""Evaluations of each side that are timed at most, and seconds that they may take together."""
LEAST_ROUNDS = 5

Compile = Callable[[Manifest, dict[str, str], Stage], Manifest]
"""Adds the engines of targets (→ precision) to a manifest whose ONNX files lie in a stage."""


@dataclass(frozen=True)
class GateLimits:
    """What has to be reached.

    Attributes:
        images: that are compared, at least `LEAST_IMAGES`.
        psnr_db: median of the pictures against the twin's.
        latent_rms: median distance of the latents, where there is no decoder.
    """

    images: int = LEAST_IMAGES
    psnr_db: float = 30.0
    latent_rms: float = 0.15


def gated(
    request: BuildRequest,
    manifest: Manifest,
    folder: Path,
    out: Path,
    limits: GateLimits,
    compiled: Compile,
    force: bool,
    say: Say,
) -> Manifest:
    """The manifest with a record per quantised target and resolution; as it is where nothing is quantised.

    Args:
        folder: where the build's files are.
        out: where they will go; the twin is made beside it, and removed when the build is kept.
        compiled: compiles the twin for its target.

    Raises:
        ProofError: a target is not worth it, and `force` is not set.
    """
    quantised = {t: p for t, p in request.precisions.items() if p in QUANTISED}
    if not quantised:
        return manifest
    records: list[GateRecord] = []
    notes: list[str] = []
    twins = []
    for target, precision in quantised.items():
        base = form_of(graph_precision(target, precision)).base
        with stage_for(out.with_name(f"{out.name}.twin"), f"{request.key}-{base}") as stage:
            twin = _twin(request, manifest, base, target, stage, compiled, say)
            for resolution in manifest.resolutions:
                pair = _Pair(folder, manifest, stage.folder, twin, target, resolution)
                records.append(_measured(pair, precision, base, limits, say))
                notes += _faster_elsewhere(pair, records[-1])
            twins.append(stage.folder)
    failures = _told(records)
    if failures and not force:
        raise _not_worth_it(failures, records)
    for folder in twins:
        shutil.rmtree(folder, ignore_errors=True)
    return replace(manifest, gates=tuple(records), notes=(*manifest.notes, *notes, *failures))


def judge_again(manifest: Manifest, limits: GateLimits) -> str:
    """Judges a directory that nothing was changed in, by what was measured when it was built.

    Returns:
        Why it has to be built again to be judged; empty if it passes.

    Raises:
        ProofError: it was kept in spite of its gate, or misses these limits.
    """
    if any(record.images < limits.images for record in manifest.gates):
        return f"judged by fewer than {limits.images} images"
    records = [replace(record, failures=verdict(record, limits)) for record in manifest.gates]
    if failures := _told(records):
        raise _not_worth_it(failures, records)
    return ""


def _told(records: Sequence[GateRecord]) -> list[str]:
    return [f"{r.target} {r.precision} at {r.resolution} px: {why}" for r in records for why in r.failures]


def _not_worth_it(failures: Sequence[str], records: Sequence[GateRecord]) -> ProofError:
    return ProofError(
        "the build is not worth it:\n  " + "\n  ".join([*failures, *map(summary, records)]),
        remedy="build in a wider precision; or keep sensitive layers wide (flowturbo-calibrate sensitivity, then "
        "--choice); or --force to build it all the same",
    )


def summary(record: GateRecord) -> str:
    """One line of what was measured."""
    speed = "speed not measured (no device)"
    if record.evaluation_ms is not None and record.twin_ms is not None:
        ratio = record.twin_ms / record.evaluation_ms
        speed = f"an evaluation {ratio:.2f} × as fast ({record.evaluation_ms:.1f} ms against {record.twin_ms:.1f})"
    seen = "no decoder" if record.psnr_db is None else f"pictures {record.psnr_db:.1f} dB (median of {record.images})"
    return (
        f"{record.target} {record.precision} against {record.against} on {record.by}: {speed}, files "
        f"{record.bytes / record.twin_bytes:.2f} × the size (trunks "
        f"{record.trunk_bytes / record.twin_trunk_bytes:.2f}), {seen}, latents {record.latent_rms:.3f} apart"
    )


def verdict(record: GateRecord, limits: GateLimits) -> tuple[str, ...]:
    """Why a target is not worth it; empty if it is. Weights alone are a memory option: they need not be faster."""
    failures = []
    timed = (record.evaluation_ms, record.twin_ms)
    if record.precision == "int8" and timed[0] is not None and timed[1] is not None and timed[0] >= timed[1]:
        failures.append(
            f"it is not faster than {record.against}: {timed[0]:.1f} ms an evaluation against {timed[1]:.1f} ms on "
            f"this {record.cpu}"
        )
    if record.bytes >= record.twin_bytes:
        failures.append(f"it is not smaller than {record.against}: {record.bytes} bytes against {record.twin_bytes}")
    if record.psnr_db is not None and not record.psnr_db >= limits.psnr_db:
        failures.append(f"its pictures have {record.psnr_db:.1f} dB (median), {limits.psnr_db:g} dB are asked for")
    if record.psnr_db is None and not record.latent_rms <= limits.latent_rms:
        failures.append(f"its latents are {record.latent_rms:.3f} apart (median), {limits.latent_rms:g} are allowed")
    return tuple(failures)


@dataclass(frozen=True)
class _Pair:
    """A build and its twin, for one target at one resolution."""

    folder: Path
    manifest: Manifest
    twin_folder: Path
    twin: Manifest
    target: str
    resolution: int

    def sides(self) -> list[tuple[Path, Manifest, Choice, str]]:
        """Folder, what can be run of it, backend and its name, of the build and of the twin."""
        return [
            (folder, *runner_for(manifest, self.target, BackendOptions()))
            for folder, manifest in ((self.folder, self.manifest), (self.twin_folder, self.twin))
        ]


def _twin(
    request: BuildRequest, manifest: Manifest, base: str, target: str, stage: Stage, compiled: Compile, say: Say
) -> Manifest:
    """The same networks in the wider type; an interrupted one goes on. Compiled where a device can time it."""
    from export.trace import load_model, trace

    plain = replace(request, recipe=PLAIN, tile=None)
    model = load_model(plain)
    for resolution in manifest.resolutions:
        for graph in trace(
            model,
            plain,
            resolution,
            base,
            stage.folder,
            stage.finished(resolution, base),
            lambda text: say(f"twin: {text}"),
        ):
            stage.add_graph(graph)
    graphs = tuple(stage.graphs)
    paths = [path for graph in graphs for path in (graph.path, graph.data) if path is not None]
    files = [(path, stage.folder / path) for path in paths]
    twin = replace(
        manifest,
        graphs=graphs,
        engines=(),
        files=tuple(FileRecord(path, sha256_of(file), file.stat().st_size) for path, file in files),
    )
    if target not in GPU_TARGETS or tensorrt_usable(target):
        return compiled(twin, {target: base}, stage)
    engines = tuple(EngineRecord(g.graph, g.resolution, target, base, g.path, executed=False) for g in graphs)
    return replace(twin, engines=engines)


def _measured(pair: _Pair, precision: str, base: str, limits: GateLimits, say: Say) -> GateRecord:
    say(f"gate at {pair.resolution} px: {precision} against {base}")
    sides = pair.sides()
    by = sides[0][3]
    timed: Sequence[float | None] = (None, None) if NOT_EXECUTED in by else evaluation_ms(sides, pair.resolution)
    rms, decibels = _compared(sides, pair.resolution, max(limits.images, LEAST_IMAGES), say)
    sets = (pair.manifest, graph_precision(pair.target, precision)), (pair.twin, base)
    bytes_, twin_bytes = (_bytes(manifest, files, pair.resolution) for manifest, files in sets)
    trunk, twin_trunk = (_bytes(manifest, files, pair.resolution, TRUNKS) for manifest, files in sets)
    record = GateRecord(
        resolution=pair.resolution,
        target=pair.target,
        precision=precision,
        against=base,
        by=by,
        cpu=cpu().model,
        images=len(rms),
        evaluation_ms=timed[0],
        twin_ms=timed[1],
        bytes=bytes_,
        twin_bytes=twin_bytes,
        trunk_bytes=trunk,
        twin_trunk_bytes=twin_trunk,
        latent_rms=float(np.median(rms)),
        psnr_db=None if decibels is None else _finite(float(np.median(decibels))),
        psnr_p10_db=None if decibels is None else _finite(float(np.percentile(decibels, 10))),
        target_db=limits.psnr_db,
    )
    return replace(record, failures=verdict(record, limits))


def _finite(decibels: float) -> float:
    """Equal pictures have infinite decibels, which JSON has not."""
    return min(decibels, 120.0)


def evaluation_ms(sides: Sequence[tuple[Path, Manifest, Choice, str]], resolution: int) -> list[float]:
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
        self._outputs = {n: self._backend.buffer(t.sized(sizes), t.numpy) for n, t in spec.outputs.items()}

    def milliseconds(self) -> float:
        began = time.perf_counter()
        self._engine.run(self._inputs, self._outputs)
        self._outputs["v_rms"].numpy()  # waits for the device
        return 1e3 * (time.perf_counter() - began)

    def close(self) -> None:
        self._engine.close()
        self._backend.close()


def _compared(
    sides: Sequence[tuple[Path, Manifest, Choice, str]], resolution: int, images: int, say: Say
) -> tuple[Any, Any]:
    """Per image, from the same noise: distance of the latents, and decibels of the pictures (None without decoder)."""
    made = []
    for folder, manifest, choice, _ in sides:
        with Pipeline(folder, manifest, resolution, choice) as pipeline:
            say(f"gate at {resolution} px: {images} images in {pipeline.precision}")
            draw = balanced_draw(sorted(manifest.model.classes), images)
            result = pipeline.run(pipeline.request(list(draw.labels), seeds=draw.seeds))
            made.append((result.latents, result.images))
    (found, pictures), (wider, wider_pictures) = made
    return latent_rms(found, wider), None if pictures is None or wider_pictures is None else psnr(
        pictures, wider_pictures
    )


def _bytes(manifest: Manifest, files: str, resolution: int, graphs: Sequence[str] | None = None) -> int:
    """Size of a set of ONNX files, of some or of all its graphs."""
    records = [g for g in manifest.graphs if (g.precision, g.resolution) == (files, resolution)]
    # A tiled decoder comes on top of the whole one, and the twin has none.
    chosen = [g for g in records if (g.graph in graphs if graphs else not g.graph.startswith("head-"))]
    return sum(manifest.file(path).bytes for g in chosen for path in (g.path, g.data) if path is not None)


def _faster_elsewhere(pair: _Pair, record: GateRecord) -> list[str]:
    """A note where OpenVINO in bf16 is faster still than int8 on this CPU; measured, where it can run."""
    usable = "amx_bf16" in cpu().features and installed("openvino") and not against_openvino()
    if pair.target != "cpu" or record.evaluation_ms is None or not usable:
        return []
    engines = tuple(replace(engine, target="openvino", precision="bf16") for engine in pair.twin.engines)
    try:
        side = (pair.twin_folder, *runner_for(replace(pair.twin, engines=engines), "openvino", BackendOptions()))
        (bf16,) = evaluation_ms([side], pair.resolution)
    except BackendError as error:
        return [f"OpenVINO in bf16 was not tried: {error.given}"]
    if bf16 >= record.evaluation_ms:
        return []
    return [
        f"OpenVINO in bf16 is faster than {record.precision} here ({bf16:.1f} ms an evaluation against "
        f"{record.evaluation_ms:.1f}): --target openvino --precision bf16"
    ]
