"""The gate of quantised builds: compare them with a reference build in a wider type, measured in the same run.

No gain is assumed. The build and its reference (fp32 on a CPU, fp16 for a GPU; `reference_build.py`) evaluate in turns
and make pictures from the same seeds. A build that is not faster, not smaller, or too far from its reference is refused
without --force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from export.lowbit.layers import TRUNKS
from export.proof.reference_build import ReferenceBuild, locate_latents_cache, remove_references
from export.proof.verify import NOT_EXECUTED, choose_runner
from export.stage import BuildStage
from export.targets import QUANTISED_PRECISIONS, resolve_graph_precision
from flowturbo.evaluation.quality.same_seed import latent_rms, psnr
from flowturbo.evaluation.quality.sampled_latents import SampledLatents, make_balanced_draw
from flowturbo.evaluation.speed.rounds import Rounds, time_calls
from runtime.backends import BackendChoice
from runtime.backends.base import BackendOptions, Buffer
from runtime.backends.onnxruntime import is_provider_installed
from runtime.directory.records import GateRecord, Manifest
from runtime.pipeline import Pipeline, build_engine_file
from runtime.system.errors import FlowTurboError, ProofError
from runtime.system.hardware import detect_cpu, find_openvino_problem
from runtime.system.progress import SILENT, Progress

MIN_IMAGES = 64
MAX_DB = 120.0
"""Stands for the infinite decibels of equal pictures, which JSON cannot hold."""
MAX_ROUNDS, BUDGET_S = 40, 60.0
"""Evaluations of each side that are timed at most, and seconds that they may take together."""
MIN_ROUNDS = 5
Side = tuple[Path, Manifest, BackendChoice, str]
"""Folder, what can be run of it, backend and its name."""


@dataclass(frozen=True)
class GateLimits:
    """What a quantised build has to reach.

    Attributes:
        images: number that is compared, at least `MIN_IMAGES`.
        psnr_db: median of the pictures against those of the reference, in dB.
        latent_rms: median distance of the latents, where there is no decoder.
    """

    images: int = MIN_IMAGES
    psnr_db: float = 30.0
    latent_rms: float = 0.15


def gate_build(
    manifest: Manifest,
    stage: BuildStage,
    references: Iterable[tuple[str, str, ReferenceBuild]],
    limits: GateLimits,
    force: bool,
    progress: Progress,
) -> Manifest:
    """Measure every quantised target beside its reference, and return the manifest with the records.

    Args:
        stage: holds the build's files; references in it are removed when the build passes.
        references: target, its precision, and the build to compare with; each is taken when the one before is measured.

    Raises:
        ProofError: a target is not worth it, and `force` is not set.
    """
    records: list[GateRecord] = []
    notes: list[str] = []
    for target, precision, reference in references:
        notes += reference.notes
        for resolution in manifest.resolutions:
            comparison = GateComparison(stage.folder, manifest, reference, target, precision, resolution)
            records.append(comparison.measure(limits, progress))
            notes += note_faster_backend(comparison, records[-1])
    failures = _list_failures(records)
    if failures and not force:
        raise _make_gate_error(failures, records, f"; what was made waits for that in {stage.folder}")
    remove_references(stage)
    gated_targets = {record.target for record in records}
    other_records = [record for record in manifest.gates if record.target not in gated_targets]
    return replace(manifest, gates=(*other_records, *records), notes=(*manifest.notes, *notes, *failures))


def recheck_gate(manifest: Manifest, limits: GateLimits) -> str:
    """Check an unchanged directory by what was measured when it was built.

    Returns:
        Why it has to be built again to be measured; empty if it passes, or if nothing in it is quantised.

    Raises:
        ProofError: --force built it in spite of its gate, or it misses these limits.
    """
    quantised_targets = {
        e.target for e in manifest.engines if e.graph == "predictor" and e.precision in QUANTISED_PRECISIONS
    }
    if ungated_targets := sorted(quantised_targets - {record.target for record in manifest.gates}):
        return f"not compared with a wider build: {', '.join(ungated_targets)}"
    if any(record.images < limits.images for record in manifest.gates):
        return f"compared on fewer than {limits.images} images"
    records = [replace(record, failures=find_failures(record, limits)) for record in manifest.gates]
    if failures := _list_failures(records):
        raise _make_gate_error(failures, records)
    return ""


def _list_failures(records: Sequence[GateRecord]) -> list[str]:
    return [f"{r.target} {r.precision} at {r.resolution} px: {failure}" for r in records for failure in r.failures]


def _make_gate_error(failures: Sequence[str], records: Sequence[GateRecord], note: str = "") -> ProofError:
    return ProofError(
        "the build is not worth it:\n  " + "\n  ".join([*failures, *map(format_gate, records)]),
        remedy="build in a wider precision; or keep sensitive layers wide (flowturbo-calibrate sensitivity, then "
        f"--choice); or --force to build it all the same{note}",
    )


def format_gate(record: GateRecord) -> str:
    """Format what was measured as one line."""
    speed_text = "speed not measured (no device)"
    if record.evaluation_ms is not None and record.twin_ms is not None:
        ratio = record.twin_ms / record.evaluation_ms
        speed_text = f"an evaluation {ratio:.2f} × as fast ({record.evaluation_ms:.1f} ms against {record.twin_ms:.1f})"
    picture_text = (
        "no decoder" if record.psnr_db is None else f"pictures {record.psnr_db:.1f} dB (median of {record.images})"
    )
    weights_text = ""
    if record.quantised_share is not None:  # directories from before this was recorded have none
        total = sum(record.trunk_weights.values())
        labels = {"scales": "scales", "wide": "layers kept wide", "rest": "first and last layer, biases, positions"}
        quantised_type = record.precision.removesuffix("-weights")
        shares = [f"{100 * record.quantised_share:.1f} % of their weight bytes are {quantised_type}"]
        shares += [
            f"{100 * record.trunk_weights[kind] / total:.1f} % {label}"
            for kind, label in labels.items()
            if record.trunk_weights[kind]
        ]
        weights_text = f"; {', '.join(shares)}"
    return (
        f"{record.target} {record.precision} against {record.against} on {record.by}: {speed_text}, files "
        f"{record.bytes / record.twin_bytes:.2f} × the size (trunks "
        f"{record.trunk_bytes / record.twin_trunk_bytes:.2f}{weights_text}), {picture_text}, latents "
        f"{record.latent_rms:.3f} apart"
    )


def find_failures(record: GateRecord, limits: GateLimits) -> tuple[str, ...]:
    """Return why a target is not worth it; empty if it is.

    Weights in int8 or int4 alone save memory: such a build need not be faster.
    """
    failures = []
    build_ms, reference_ms = record.evaluation_ms, record.twin_ms
    if record.precision == "int8" and build_ms is not None and reference_ms is not None and build_ms >= reference_ms:
        failures.append(
            f"it is not faster than {record.against}: {build_ms:.1f} ms an evaluation against "
            f"{reference_ms:.1f} ms on this {record.cpu}"
        )
    if record.bytes >= record.twin_bytes:
        failures.append(f"it is not smaller than {record.against}: {record.bytes} bytes against {record.twin_bytes}")
    if record.psnr_db is not None and not record.psnr_db >= limits.psnr_db:
        failures.append(f"its pictures have {record.psnr_db:.1f} dB (median), {limits.psnr_db:g} dB are asked for")
    if record.psnr_db is None and not record.latent_rms <= limits.latent_rms:
        failures.append(f"its latents are {record.latent_rms:.3f} apart (median), {limits.latent_rms:g} are allowed")
    return tuple(failures)


@dataclass(frozen=True)
class GateComparison:
    """A quantised build and its reference, for one target at one resolution.

    Attributes:
        folder, manifest: the quantised build.
        reference: the build in a wider type.
        target, precision: of the quantised engines.
        resolution: pixels a side.
    """

    folder: Path
    manifest: Manifest
    reference: ReferenceBuild
    target: str
    precision: str
    resolution: int

    def measure(self, limits: GateLimits, progress: Progress) -> GateRecord:
        """Time both sides in turns, compare their pictures and sizes, and check the result against `limits`."""
        progress.stage(f"gate at {self.resolution} px: {self.precision} against {self.reference.precision}")
        sides = self.find_sides()
        runner = sides[0][3]
        times_ms: Sequence[float | None] = (
            (None, None) if NOT_EXECUTED in runner else measure_evaluation_ms(sides, self.resolution)
        )
        latent_distances, decibels = compare_images(self, max(limits.images, MIN_IMAGES), progress)
        build_bytes, reference_bytes = self.count_bytes()
        trunk_bytes, reference_trunk_bytes = self.count_bytes(TRUNKS)
        record = GateRecord(
            resolution=self.resolution,
            target=self.target,
            precision=self.precision,
            against=self.reference.precision,
            by=runner,
            cpu=detect_cpu().model,
            images=len(latent_distances),
            evaluation_ms=times_ms[0],
            twin_ms=times_ms[1],
            bytes=build_bytes,
            twin_bytes=reference_bytes,
            trunk_bytes=trunk_bytes,
            twin_trunk_bytes=reference_trunk_bytes,
            latent_rms=float(np.median(latent_distances)),
            psnr_db=None if decibels is None else min(float(np.median(decibels)), MAX_DB),
            psnr_p10_db=None if decibels is None else min(float(np.percentile(decibels, 10)), MAX_DB),
            target_db=limits.psnr_db,
            trunk_weights=self.count_trunk_weights(),
        )
        return replace(record, failures=find_failures(record, limits))

    def find_sides(self) -> tuple[Side, Side]:
        """Return what runs the build, and what runs the reference."""
        options = BackendOptions()
        return (self.folder, *choose_runner(self.manifest, self.target, options)), (
            self.reference.folder,
            *choose_runner(self.reference.manifest, self.target, options),
        )

    def count_bytes(self, graphs: Sequence[str] | None = None) -> tuple[int, int]:
        """Return the sizes of the ONNX files of the build and of the reference; of `graphs` alone if they are named."""

        def count(manifest: Manifest, precision: str) -> int:
            key = (resolve_graph_precision(self.target, precision), self.resolution)
            records = [graph for graph in manifest.graphs if (graph.precision, graph.resolution) == key]
            # A tiled decoder comes on top of the whole one, and the reference has none.
            counted = [g for g in records if (g.graph in graphs if graphs else not g.graph.startswith("head-"))]
            return sum(manifest.find_file(path).bytes for g in counted for path in (g.path, g.data) if path is not None)

        return count(self.manifest, self.precision), count(self.reference.manifest, self.reference.precision)

    def count_trunk_weights(self) -> dict[str, int]:
        """Count the bytes of predictor and refiner together, by kind."""
        file_precision = resolve_graph_precision(self.target, self.precision)
        bytes_by_kind: dict[str, int] = {}
        for graph in TRUNKS:
            record = self.manifest.find_graph(graph, self.resolution, file_precision)
            for kind, size in (record.weights if record else {}).items():
                bytes_by_kind[kind] = bytes_by_kind.get(kind, 0) + size
        return bytes_by_kind


def measure_evaluation_ms(sides: Sequence[Side], resolution: int) -> list[float]:
    """Time one guided predictor evaluation of one image on each side, in turns; return the medians in ms."""
    with ExitStack() as stack:
        calls: dict[str, Callable[[], object]] = {}
        for index, (folder, manifest, choice, _) in enumerate(sides):
            predictor = _TimedPredictor(folder, manifest, choice, resolution)
            stack.callback(predictor.close)
            calls[f"{index}: {folder.name}"] = predictor.run
        limit = Rounds(MAX_ROUNDS, duration=BUDGET_S / len(sides), warmup=1, min_repeats=MIN_ROUNDS)
        return [float(np.median(times_ms)) for times_ms in time_calls(calls, limit).values()]


class _TimedPredictor:
    """A predictor that is loaded, with buffers of one guided image."""

    def __init__(self, folder: Path, manifest: Manifest, choice: BackendChoice, resolution: int) -> None:
        record = next(e for e in manifest.engines if (e.graph, e.resolution) == ("predictor", resolution))
        self._backend = choice.open()
        self._engine = self._backend.load(build_engine_file(folder, manifest, record))
        spec, images = manifest.build_spec("predictor", resolution), manifest.max_batch if manifest.static_batch else 1
        sizes = {"B": images, "N": 2 * images}
        random = np.random.Generator(np.random.Philox(0))
        self._inputs: dict[str, Buffer] = {}
        for name, tensor in spec.inputs.items():
            shape = tensor.resolve_shape(sizes)
            self._inputs[name] = self._backend.allocate(shape, tensor.numpy_dtype)
            if name in ("base", "mods"):
                self._inputs[name].upload(random.standard_normal(shape, dtype=np.float32))
        shape = self._inputs["point_coef"].shape
        self._inputs["point_coef"].upload(np.eye(*shape, dtype=np.float32))  # x = base for one image
        self._inputs["atol"].upload(np.ones(self._inputs["atol"].shape, np.float32))  # the error is over a tolerance
        self._outputs = {
            n: self._backend.allocate(t.resolve_shape(sizes), t.numpy_dtype) for n, t in spec.outputs.items()
        }

    def run(self) -> None:
        self._engine.run(self._inputs, self._outputs)
        self._outputs["slope_rms"].numpy()  # waits for the device

    def close(self) -> None:
        self._engine.close()
        self._backend.close()


def compare_images(comparison: GateComparison, images: int, progress: Progress = SILENT) -> tuple[Any, Any]:
    """Sample both sides from the same noise, and compare image by image.

    Latents are stored beside the reference build, so that a gate that was stopped goes on.

    Returns:
        Distances of the latents [images], and decibels of the pictures [images], which are None without a decoder.
    """
    latents: list[Any] = []
    pictures: list[Any] = []
    draw = make_balanced_draw(sorted(comparison.manifest.model.classes), images)
    for folder, manifest, choice, _ in comparison.find_sides():
        with Pipeline(folder, manifest, comparison.resolution, choice, None) as pipeline:
            label = f"gate at {comparison.resolution} px: {images} images in {pipeline.precision}"
            sampled = SampledLatents(pipeline, draw, {}, locate_latents_cache(comparison.folder))
            chunks = sampled.read_chunks(progress=progress, task=label)
            batches = [(chunk.latents, pipeline.decode(chunk.latents) if manifest.vaes else None) for chunk in chunks]
        latents.append(np.concatenate([array for array, _ in batches]))
        pictures.append(np.concatenate([array for _, array in batches]) if manifest.vaes else None)
    decibels = None if pictures[0] is None or pictures[1] is None else psnr(*pictures)
    return latent_rms(*latents), decibels


def note_faster_backend(comparison: GateComparison, record: GateRecord) -> list[str]:
    """Return a note where OpenVINO in bf16 is faster than a quantised build on this CPU, as measured if it can run.

    Only a CPU with AMX multiplies bf16 faster than float32; elsewhere there is nothing to try.
    """
    if (
        comparison.target != "cpu"
        or record.evaluation_ms is None
        or "amx_bf16" not in detect_cpu().features
        or find_openvino_problem()
    ):
        return []
    openvino_options = "--target openvino --precision bf16"
    if not is_provider_installed("openvino"):
        return [f"this CPU has AMX, so OpenVINO in bf16 may be faster still than {record.precision}; it is not "
                f"installed and was not tried: pip install 'flowturbo[openvino]', then {openvino_options}"]  # fmt: skip
    reference = comparison.reference
    engines = tuple(replace(engine, target="openvino", precision="bf16") for engine in reference.manifest.engines)
    try:
        runner = choose_runner(replace(reference.manifest, engines=engines), "openvino", BackendOptions())
        sides = (comparison.find_sides()[0], (reference.folder, *runner))
        build_ms, bf16_ms = measure_evaluation_ms(sides, comparison.resolution)
    except FlowTurboError as error:
        return [f"OpenVINO in bf16 was not tried: {error.given}"]
    if bf16_ms >= build_ms:
        return []
    return [
        f"OpenVINO in bf16 is faster than {record.precision} here ({bf16_ms:.1f} ms an evaluation against "
        f"{build_ms:.1f}, taking turns): {openvino_options}"
    ]
