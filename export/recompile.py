"""Engines of other targets from a directory's ONNX files: what a Jetson does, with neither torch nor checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from export.build import DEFAULT_LIMITS, NO_SAMPLERS, BuildResult, check_same_model, find_build_reason
from export.build_request import hash_inputs
from export.compile import Say, check_builders, compile_engines, prove_engines
from export.directory_samplers import SamplerSet, add_samplers
from export.proof.gate import GateLimits, gate_build, recheck_gate, select_quantised
from export.proof.twin import read_reference
from export.stage import check_engine_folder, open_stage
from export.targets import resolve_graph_precision
from runtime.directory.manifest import check_file, read_manifest, write_manifest
from runtime.directory.records import EngineRecord, FileRecord, Manifest
from runtime.system.errors import RequestError


def build_from_directory(
    source: Path,
    out: Path,
    precisions: dict[str, str],
    *,
    rebuild: bool = False,
    force: bool = False,
    low_memory: bool = False,
    allow_foreign: bool = False,
    sampler_set: SamplerSet = NO_SAMPLERS,
    against: Path | None = None,
    gate: GateLimits = DEFAULT_LIMITS,
    say: Say,
) -> BuildResult:
    """Adds engines of other targets to an existing directory, with neither torch nor checkpoints.

    Args:
        allow_foreign: keep serialised engines that another device or release built, and try them here.
        against: directory of wider engines for this device, beside which quantised ones are judged by `gate`; without
            it a note says that they were not.

    Raises:
        RequestError: the directory holds no ONNX files in the precision a target needs.
        FlowTurboError: see `build`.
    """
    if against is not None and not select_quantised(precisions):
        raise RequestError(
            f"--against {against} with precision {', '.join(sorted(set(precisions.values())))}",
            allowed="--precision int8, int8-weights or int4-weights, which are judged",
            remedy="leave it out",
        )
    manifest = read_manifest(source)
    _check_graph_precisions(source, manifest, precisions)
    reused_engines = [record for record in manifest.engines if allow_foreign or record.target not in precisions]
    inputs = {
        **manifest.inputs,
        "precisions": ",".join(f"{t}:{p}" for t, p in _merge_precisions(reused_engines, precisions).items()),
    }
    out = check_engine_folder(out)
    check_builders(precisions)
    references = (
        []
        if against is None
        else [(t, p, read_reference(against, manifest, t)) for t, p in select_quantised(precisions).items()]
    )
    reason = rebuild or find_build_reason(inputs, out)
    if not reason and references and not force:
        reason = recheck_gate(read_manifest(out), gate)
    if not reason:
        return BuildResult(add_samplers(out, sampler_set), False, "nothing changed")
    if not rebuild and not force:
        check_same_model(out, inputs)
    sampler_set.check_fits(manifest.model.sources)
    with open_stage(out, hash_inputs(inputs)) as stage:
        say("copying the ONNX files")
        manifest = _make_bare_manifest(manifest, inputs, reused_engines, precisions)
        _copy_files(source, manifest, stage.folder)
        manifest = compile_engines(manifest, precisions, stage, force, low_memory, say)
        manifest = prove_engines(manifest, stage.folder, precisions, force, say, allow_foreign)
        if references:
            manifest = gate_build(manifest, stage, references, gate, force, say)
        else:
            manifest = replace(manifest, notes=(*manifest.notes, *_note_ungated(precisions)))
        manifest = sampler_set.add_to(manifest)
        write_manifest(stage.folder, manifest)
        stage.publish(out)
    return BuildResult(manifest, True, f"engines were asked for, from {source}")


def _check_graph_precisions(source: Path, manifest: Manifest, precisions: dict[str, str]) -> None:
    available = sorted({graph.precision for graph in manifest.graphs})
    for target, precision in precisions.items():
        if resolve_graph_precision(target, precision) not in available:
            raise RequestError(
                f"{target} in {precision} needs ONNX files in {resolve_graph_precision(target, precision)}",
                allowed=f"{', '.join(available)}: what {source} holds",
                remedy=f"--precision {available[0]}, or build with --precision {precision} where torch is",
            )


def _make_bare_manifest(
    manifest: Manifest, inputs: dict[str, str], reused_engines: Sequence[EngineRecord], precisions: dict[str, str]
) -> Manifest:
    """The manifest of the new directory before anything is compiled."""
    return replace(
        manifest,
        inputs=inputs,
        key=hash_inputs(inputs),
        engines=tuple(reused_engines),
        files=_drop_engine_files(manifest, reused_engines),
        notes=tuple(note for note in manifest.notes if note not in _note_ungated(precisions)),
    )


def _note_ungated(precisions: dict[str, str]) -> list[str]:
    """What a gate would have measured, had there been a wider twin to take turns with."""
    return [
        f"{target} {precision}: not judged beside a wider build on this device: --against DIR does, where DIR holds one"
        for target, precision in select_quantised(precisions).items()
    ]


def _merge_precisions(reused_engines: Sequence[EngineRecord], new_precisions: dict[str, str]) -> dict[str, str]:
    return {
        record.target: record.precision for record in reused_engines if record.graph == "predictor"
    } | new_precisions


def _drop_engine_files(manifest: Manifest, reused_engines: Sequence[EngineRecord]) -> tuple[FileRecord, ...]:
    """Files of the directory less the serialised engines that are built anew."""
    dropped_paths = {
        record.path for record in manifest.engines if record not in reused_engines and record.path.endswith(".engine")
    }
    return tuple(file for file in manifest.files if file.path not in dropped_paths)


def _copy_files(source: Path, manifest: Manifest, folder: Path) -> None:
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
