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
from export.proof.comparison import Pair, compared, evaluation_ms
from export.proof.twin import Compile, Twin, make_twin, remove_twins
from export.proof.verify import NOT_EXECUTED, runner_for
from export.stage import Stage
from export.targets import QUANTISED
from runtime.backends.base import BackendOptions
from runtime.backends.onnxruntime import installed
from runtime.directory.manifest import GateRecord, Manifest
from runtime.system.errors import FlowTurboError, ProofError
from runtime.system.hardware import against_openvino, cpu

Say = Callable[[str], None]
LEAST_IMAGES = 64


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
    stage: Stage,
    limits: GateLimits,
    compiled: Compile,
    force: bool,
    say: Say,
) -> Manifest:
    """The manifest with a record per quantised target and resolution; as it is where nothing is quantised.

    Args:
        stage: where the build's files are, and its twin while it is judged.
        compiled: compiles the twin for its target.

    Raises:
        ProofError: a target is not worth it, and `force` is not set.
    """
    wanted = quantised(request.precisions)
    twins = ((t, p, make_twin(request, manifest, t, p, stage, compiled, say)) for t, p in wanted.items())
    return judged(manifest, stage, twins, limits, force, say)


def quantised(precisions: Mapping[str, str]) -> dict[str, str]:
    """The targets (→ precision) that a gate judges."""
    return {target: precision for target, precision in precisions.items() if precision in QUANTISED}


def judged(
    manifest: Manifest,
    stage: Stage,
    twins: Iterable[tuple[str, str, Twin]],
    limits: GateLimits,
    force: bool,
    say: Say,
) -> Manifest:
    """The manifest with a record per target and resolution, measured beside its twin.

    Args:
        stage: where the build's files are; twins in it are removed when the build is kept.
        twins: target, precision and twin; each is asked for when the one before was measured.

    Raises:
        ProofError: a target is not worth it, and `force` is not set.
    """
    records: list[GateRecord] = []
    notes: list[str] = []
    for target, precision, twin in twins:
        notes += twin.notes
        for resolution in manifest.resolutions:
            pair = Pair(stage.folder, manifest, twin, target, precision, resolution)
            records.append(_measured(pair, limits, say))
            notes += faster_elsewhere(pair, records[-1])
    failures = _told(records)
    if failures and not force:
        raise _not_worth_it(failures, records, f"; what was made waits for that in {stage.folder}")
    remove_twins(stage)
    fresh = {record.target for record in records}
    kept = [record for record in manifest.gates if record.target not in fresh]
    return replace(manifest, gates=(*kept, *records), notes=(*manifest.notes, *notes, *failures))


def judge_again(manifest: Manifest, limits: GateLimits) -> str:
    """Judges a directory that nothing was changed in, by what was measured when it was built.

    Returns:
        Why it has to be built again to be judged; empty if it passes, or if nothing in it is quantised.

    Raises:
        ProofError: it was kept in spite of its gate, or misses these limits.
    """
    built = {e.target for e in manifest.engines if e.graph == "predictor" and e.precision in QUANTISED}
    if unjudged := sorted(built - {record.target for record in manifest.gates}):
        return f"not judged beside a wider build: {', '.join(unjudged)}"
    if any(record.images < limits.images for record in manifest.gates):
        return f"judged by fewer than {limits.images} images"
    records = [replace(record, failures=verdict(record, limits)) for record in manifest.gates]
    if failures := _told(records):
        raise _not_worth_it(failures, records)
    return ""


def _told(records: Sequence[GateRecord]) -> list[str]:
    return [f"{r.target} {r.precision} at {r.resolution} px: {why}" for r in records for why in r.failures]


def _not_worth_it(failures: Sequence[str], records: Sequence[GateRecord], kept: str = "") -> ProofError:
    return ProofError(
        "the build is not worth it:\n  " + "\n  ".join([*failures, *map(summary, records)]),
        remedy="build in a wider precision; or keep sensitive layers wide (flowturbo-calibrate sensitivity, then "
        f"--choice); or --force to build it all the same{kept}",
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
        f"{record.trunk_bytes / record.twin_trunk_bytes:.2f}{_held(record)}), {seen}, latents "
        f"{record.latent_rms:.3f} apart"
    )


def _held(record: GateRecord) -> str:
    """How much of the trunks is really quantised, and what the rest is: "; 84 % of their weight bytes are int8, …"."""
    if record.quantised_share is None:
        return ""  # a directory from before this was recorded
    total = sum(record.trunk_weights.values())
    others = {"scales": "scales", "wide": "layers kept wide", "rest": "first and last layer, biases, positions"}
    shown = [f"{100 * record.trunk_weights[kind] / total:.1f} % {what}" for kind, what in others.items()
             if record.trunk_weights[kind]]  # fmt: skip
    kind = record.precision.removesuffix("-weights")
    return f"; {100 * record.quantised_share:.1f} % of their weight bytes are {kind}, {', '.join(shown)}"


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


def _measured(pair: Pair, limits: GateLimits, say: Say) -> GateRecord:
    say(f"gate at {pair.resolution} px: {pair.precision} against {pair.twin.precision}")
    sides = pair.sides()
    by = sides[0][3]
    timed: Sequence[float | None] = (None, None) if NOT_EXECUTED in by else evaluation_ms(sides, pair.resolution)
    rms, decibels = compared(pair, max(limits.images, LEAST_IMAGES), say)
    (own, twin), (trunk, twin_trunk) = pair.bytes(), pair.bytes(TRUNKS)
    record = GateRecord(
        resolution=pair.resolution,
        target=pair.target,
        precision=pair.precision,
        against=pair.twin.precision,
        by=by,
        cpu=cpu().model,
        images=len(rms),
        evaluation_ms=timed[0],
        twin_ms=timed[1],
        bytes=own,
        twin_bytes=twin,
        trunk_bytes=trunk,
        twin_trunk_bytes=twin_trunk,
        latent_rms=float(np.median(rms)),
        psnr_db=None if decibels is None else _finite(float(np.median(decibels))),
        psnr_p10_db=None if decibels is None else _finite(float(np.percentile(decibels, 10))),
        target_db=limits.psnr_db,
        trunk_weights=pair.trunk_weights(),
    )
    return replace(record, failures=verdict(record, limits))


def _finite(decibels: float) -> float:
    """Equal pictures have infinite decibels, which JSON has not."""
    return min(decibels, 120.0)


def faster_elsewhere(pair: Pair, record: GateRecord) -> list[str]:
    """A note where OpenVINO in bf16 is faster still than a quantised build on this CPU: measured, where it can run.

    Only a CPU with AMX multiplies bf16 faster than float32; elsewhere there is nothing to try.
    """
    if pair.target != "cpu" or record.evaluation_ms is None or "amx_bf16" not in cpu().features or against_openvino():
        return []
    asked = "--target openvino --precision bf16"
    if not installed("openvino"):
        return [f"this CPU has AMX, so OpenVINO in bf16 may be faster still than {record.precision}; it is not "
                f"installed and was not tried: pip install 'flowturbo[openvino]', then {asked}"]  # fmt: skip
    engines = tuple(replace(engine, target="openvino", precision="bf16") for engine in pair.twin.manifest.engines)
    try:
        runnable = runner_for(replace(pair.twin.manifest, engines=engines), "openvino", BackendOptions())
        int8, bf16 = evaluation_ms((pair.sides()[0], (pair.twin.folder, *runnable)), pair.resolution)
    except FlowTurboError as error:
        return [f"OpenVINO in bf16 was not tried: {error.given}"]
    if bf16 >= int8:
        return []
    return [
        f"OpenVINO in bf16 is faster than {record.precision} here ({bf16:.1f} ms an evaluation against {int8:.1f}, "
        f"taking turns): {asked}"
    ]
