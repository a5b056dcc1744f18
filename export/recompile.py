"""Engines of other targets from a directory's ONNX files: what a Jetson does, with neither torch nor checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from export.build import LIMITS, NOTHING, Built, keep_other_model, why_build
from export.build_request import key_of
from export.compile import Say, check_builders, compiled, proved
from export.directory_samplers import Keeping, add_samplers
from export.proof.gate import GateLimits, judge_again, judged, quantised
from export.proof.twin import twin_in
from export.stage import check_out, stage_for
from export.targets import graph_precision
from runtime.directory.manifest import EngineRecord, FileRecord, Manifest, check_file, read_manifest, write_manifest
from runtime.system.errors import RequestError


def build_from(
    source: Path,
    out: Path,
    precisions: dict[str, str],
    *,
    rebuild: bool = False,
    force: bool = False,
    low_memory: bool = False,
    allow_foreign: bool = False,
    keeping: Keeping = NOTHING,
    against: Path | None = None,
    gate: GateLimits = LIMITS,
    say: Say,
) -> Built:
    """Adds engines of other targets to an existing directory, with neither torch nor checkpoints.

    Args:
        allow_foreign: keep serialised engines that another device or release built, and try them here.
        against: directory of wider engines for this device, beside which quantised ones are judged by `gate`; without
            it a note says that they were not.

    Raises:
        RequestError: the directory holds no ONNX files in the precision a target needs.
        FlowTurboError: see `build`.
    """
    if against is not None and not quantised(precisions):
        raise RequestError(
            f"--against {against} with precision {', '.join(sorted(set(precisions.values())))}",
            allowed="--precision int8, int8-weights or int4-weights, which are judged",
            remedy="leave it out",
        )
    manifest = read_manifest(source)
    _check_files(source, manifest, precisions)
    kept = [record for record in manifest.engines if allow_foreign or record.target not in precisions]
    inputs = {**manifest.inputs, "precisions": ",".join(f"{t}:{p}" for t, p in _precisions(kept, precisions).items())}
    out = check_out(out)
    check_builders(precisions)
    twins = [] if against is None else [(t, p, twin_in(against, manifest, t)) for t, p in quantised(precisions).items()]
    needed = rebuild or why_build(inputs, out)
    if not needed and twins and not force:
        needed = judge_again(read_manifest(out), gate)
    if not needed:
        return Built(add_samplers(out, keeping), False, "nothing changed")
    if not rebuild and not force:
        keep_other_model(out, inputs)
    keeping.check(manifest.model.sources)
    with stage_for(out, key_of(inputs)) as stage:
        say("copying the ONNX files")
        manifest = _bare(manifest, inputs, kept, precisions)
        _copy(source, manifest, stage.folder)
        manifest = compiled(manifest, precisions, stage, force, low_memory, say)
        manifest = proved(manifest, stage.folder, precisions, force, say, allow_foreign)
        if twins:
            manifest = judged(manifest, stage, twins, gate, force, say)
        else:
            manifest = replace(manifest, notes=(*manifest.notes, *_unjudged(precisions)))
        manifest = keeping.into(manifest)
        write_manifest(stage.folder, manifest)
        stage.publish(out)
    return Built(manifest, True, f"engines were asked for, from {source}")


def _check_files(source: Path, manifest: Manifest, precisions: dict[str, str]) -> None:
    available = sorted({graph.precision for graph in manifest.graphs})
    for target, precision in precisions.items():
        if graph_precision(target, precision) not in available:
            raise RequestError(
                f"{target} in {precision} needs ONNX files in {graph_precision(target, precision)}",
                allowed=f"{', '.join(available)}: what {source} holds",
                remedy=f"--precision {available[0]}, or build with --precision {precision} where torch is",
            )


def _bare(
    manifest: Manifest, inputs: dict[str, str], kept: Sequence[EngineRecord], precisions: dict[str, str]
) -> Manifest:
    """The manifest of the new directory before anything is compiled."""
    return replace(
        manifest,
        inputs=inputs,
        key=key_of(inputs),
        engines=tuple(kept),
        files=_without_engines(manifest, kept),
        notes=tuple(note for note in manifest.notes if note not in _unjudged(precisions)),
    )


def _unjudged(precisions: dict[str, str]) -> list[str]:
    """What a gate would have measured, had there been a wider twin to take turns with."""
    return [
        f"{target} {precision}: not judged beside a wider build on this device: --against DIR does, where DIR holds one"
        for target, precision in quantised(precisions).items()
    ]


def _precisions(kept: Sequence[EngineRecord], new: dict[str, str]) -> dict[str, str]:
    return {record.target: record.precision for record in kept if record.graph == "predictor"} | new


def _without_engines(manifest: Manifest, kept: Sequence[EngineRecord]) -> tuple[FileRecord, ...]:
    """Files of the directory less the serialised engines that are built anew."""
    dropped = {record.path for record in manifest.engines if record not in kept and record.path.endswith(".engine")}
    return tuple(file for file in manifest.files if file.path not in dropped)


def _copy(source: Path, manifest: Manifest, folder: Path) -> None:
    """Copies checked files; hard links where the file system allows, since ONNX files are large."""
    for record in manifest.files:
        check_file(source, record)
        target = folder / record.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(source / record.path)
        except OSError:
            shutil.copyfile(source / record.path, target)
