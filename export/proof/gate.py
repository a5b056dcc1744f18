"""The gate of quantised builds: what they are worth beside their wider twin, measured in the same run.

No gain is assumed. Build and twin (fp32 on a CPU, fp16 for a GPU; `twin.py`) evaluate in turn and make the same
pictures; a build that is not faster, not smaller or too far from its twin is refused without --force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from export.build_request import BuildRequest
from export.lowbit.layers import TRUNKS
from export.proof.comparison import GateComparison, compare_images, measure_evaluation_ms
from export.proof.twin import CompileEngines, ReferenceBuild, build_reference, remove_references
from export.proof.verify import NOT_EXECUTED, choose_runner
from export.stage import BuildStage
from export.targets import QUANTISED_PRECISIONS
from runtime.backends.base import BackendOptions
from runtime.backends.onnxruntime import is_provider_installed
from runtime.directory.records import GateRecord, Manifest
from runtime.system.errors import FlowTurboError, ProofError
from runtime.system.hardware import detect_cpu, find_openvino_problem

Say = Callable[[str], None]
MIN_IMAGES = 64


@dataclass(frozen=True)
class GateLimits:
    """What has to be reached.

    Attributes:
        images: that are compared, at least `MIN_IMAGES`.
        psnr_db: median of the pictures against the twin's.
        latent_rms: median distance of the latents, where there is no decoder.
    """

    images: int = MIN_IMAGES
    psnr_db: float = 30.0
    latent_rms: float = 0.15


def gate_quantised(
    request: BuildRequest,
    manifest: Manifest,
    stage: BuildStage,
    limits: GateLimits,
    compile_reference: CompileEngines,
    force: bool,
    say: Say,
) -> Manifest:
    """The manifest with a record per quantised target and resolution; as it is where nothing is quantised.

    Args:
        stage: where the build's files are, and its twin while it is judged.
        compile_reference: compiles the twin for its target.

    Raises:
        ProofError: a target is not worth it, and `force` is not set.
    """
    quantised_targets = select_quantised(request.precisions)
    references = (
        (
            target_name,
            precision_name,
            build_reference(request, manifest, target_name, precision_name, stage, compile_reference, say),
        )
        for target_name, precision_name in quantised_targets.items()
    )
    return gate_build(manifest, stage, references, limits, force, say)


def select_quantised(precisions: Mapping[str, str]) -> dict[str, str]:
    """The targets (→ precision) that a gate judges."""
    return {target: precision for target, precision in precisions.items() if precision in QUANTISED_PRECISIONS}


def gate_build(
    manifest: Manifest,
    stage: BuildStage,
    references: Iterable[tuple[str, str, ReferenceBuild]],
    limits: GateLimits,
    force: bool,
    say: Say,
) -> Manifest:
    """The manifest with a record per target and resolution, measured beside its twin.

    Args:
        stage: where the build's files are; twins in it are removed when the build is kept.
        references: target, precision and twin; each is asked for when the one before was measured.

    Raises:
        ProofError: a target is not worth it, and `force` is not set.
    """
    records: list[GateRecord] = []
    notes: list[str] = []
    for target, precision, reference in references:
        notes += reference.notes
        for resolution in manifest.resolutions:
            comparison = GateComparison(stage.folder, manifest, reference, target, precision, resolution)
            records.append(_measure_gate(comparison, limits, say))
            notes += note_faster_backend(comparison, records[-1])
    failures = _list_failures(records)
    if failures and not force:
        raise _make_gate_error(failures, records, f"; what was made waits for that in {stage.folder}")
    remove_references(stage)
    gated_targets = {record.target for record in records}
    other_records = [record for record in manifest.gates if record.target not in gated_targets]
    return replace(manifest, gates=(*other_records, *records), notes=(*manifest.notes, *notes, *failures))


def recheck_gate(manifest: Manifest, limits: GateLimits) -> str:
    """Judges a directory that nothing was changed in, by what was measured when it was built.

    Returns:
        Why it has to be built again to be judged; empty if it passes, or if nothing in it is quantised.

    Raises:
        ProofError: it was kept in spite of its gate, or misses these limits.
    """
    quantised_targets = {
        e.target for e in manifest.engines if e.graph == "predictor" and e.precision in QUANTISED_PRECISIONS
    }
    if ungated_targets := sorted(quantised_targets - {record.target for record in manifest.gates}):
        return f"not judged beside a wider build: {', '.join(ungated_targets)}"
    if any(record.images < limits.images for record in manifest.gates):
        return f"judged by fewer than {limits.images} images"
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
    """One line of what was measured."""
    speed_text = "speed not measured (no device)"
    if record.evaluation_ms is not None and record.twin_ms is not None:
        ratio = record.twin_ms / record.evaluation_ms
        speed_text = f"an evaluation {ratio:.2f} × as fast ({record.evaluation_ms:.1f} ms against {record.twin_ms:.1f})"
    picture_text = (
        "no decoder" if record.psnr_db is None else f"pictures {record.psnr_db:.1f} dB (median of {record.images})"
    )
    return (
        f"{record.target} {record.precision} against {record.against} on {record.by}: {speed_text}, files "
        f"{record.bytes / record.twin_bytes:.2f} × the size (trunks "
        f"{record.trunk_bytes / record.twin_trunk_bytes:.2f}{_format_trunk_share(record)}), {picture_text}, latents "
        f"{record.latent_rms:.3f} apart"
    )


def _format_trunk_share(record: GateRecord) -> str:
    """How much of the trunks is really quantised, and what the rest is: "; 84 % of their weight bytes are int8, …"."""
    if record.quantised_share is None:
        return ""  # a directory from before this was recorded
    total = sum(record.trunk_weights.values())
    others = {"scales": "scales", "wide": "layers kept wide", "rest": "first and last layer, biases, positions"}
    shares = [
        f"{100 * record.trunk_weights[kind] / total:.1f} % {label}"
        for kind, label in others.items()
        if record.trunk_weights[kind]
    ]
    quantised_type = record.precision.removesuffix("-weights")
    return f"; {100 * record.quantised_share:.1f} % of their weight bytes are {quantised_type}, {', '.join(shares)}"


def find_failures(record: GateRecord, limits: GateLimits) -> tuple[str, ...]:
    """Why a target is not worth it; empty if it is. Weights alone are a memory option: they need not be faster."""
    failures = []
    times_ms = (record.evaluation_ms, record.twin_ms)
    if (
        record.precision == "int8"
        and times_ms[0] is not None
        and times_ms[1] is not None
        and times_ms[0] >= times_ms[1]
    ):
        failures.append(
            f"it is not faster than {record.against}: {times_ms[0]:.1f} ms an evaluation against "
            f"{times_ms[1]:.1f} ms on "
            f"this {record.cpu}"
        )
    if record.bytes >= record.twin_bytes:
        failures.append(f"it is not smaller than {record.against}: {record.bytes} bytes against {record.twin_bytes}")
    if record.psnr_db is not None and not record.psnr_db >= limits.psnr_db:
        failures.append(f"its pictures have {record.psnr_db:.1f} dB (median), {limits.psnr_db:g} dB are asked for")
    if record.psnr_db is None and not record.latent_rms <= limits.latent_rms:
        failures.append(f"its latents are {record.latent_rms:.3f} apart (median), {limits.latent_rms:g} are allowed")
    return tuple(failures)


def _measure_gate(comparison: GateComparison, limits: GateLimits, say: Say) -> GateRecord:
    say(f"gate at {comparison.resolution} px: {comparison.precision} against {comparison.reference.precision}")
    sides = comparison.find_sides()
    runner = sides[0][3]
    times_ms: Sequence[float | None] = (
        (None, None) if NOT_EXECUTED in runner else measure_evaluation_ms(sides, comparison.resolution)
    )
    latent_distances, decibels = compare_images(comparison, max(limits.images, MIN_IMAGES), say)
    (build_bytes, reference_bytes), (trunk_bytes, reference_trunk_bytes) = (
        comparison.count_bytes(),
        comparison.count_bytes(TRUNKS),
    )
    record = GateRecord(
        resolution=comparison.resolution,
        target=comparison.target,
        precision=comparison.precision,
        against=comparison.reference.precision,
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
        psnr_db=None if decibels is None else _cap_db(float(np.median(decibels))),
        psnr_p10_db=None if decibels is None else _cap_db(float(np.percentile(decibels, 10))),
        target_db=limits.psnr_db,
        trunk_weights=comparison.count_trunk_weights(),
    )
    return replace(record, failures=find_failures(record, limits))


def _cap_db(decibels: float) -> float:
    """Equal pictures have infinite decibels, which JSON has not."""
    return min(decibels, 120.0)


def note_faster_backend(comparison: GateComparison, record: GateRecord) -> list[str]:
    """A note where OpenVINO in bf16 is faster still than a quantised build on this CPU: measured, where it can run.

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
    engines = tuple(
        replace(engine, target="openvino", precision="bf16") for engine in comparison.reference.manifest.engines
    )
    try:
        runner = choose_runner(replace(comparison.reference.manifest, engines=engines), "openvino", BackendOptions())
        int8_ms, bf16_ms = measure_evaluation_ms(
            (comparison.find_sides()[0], (comparison.reference.folder, *runner)), comparison.resolution
        )
    except FlowTurboError as error:
        return [f"OpenVINO in bf16 was not tried: {error.given}"]
    if bf16_ms >= int8_ms:
        return []
    return [
        f"OpenVINO in bf16 is faster than {record.precision} here ({bf16_ms:.1f} ms an evaluation against "
        f"{int8_ms:.1f}, "
        f"taking turns): {openvino_options}"
    ]
