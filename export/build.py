"""Build = export + compile + prove. In a finished directory every engine was proved; nothing else is left behind.

This module is light: torch is imported only when something has to be traced, so that an unchanged build answers at
once and a Jetson compiles and proves its own engines from an existing directory.
"""

from __future__ import annotations

import datetime
import gc
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from export.gate import GateLimits, gated, judge_again, judged, quantised
from export.precision import graph_precision
from export.request import BuildRequest, key_of
from export.samplers import Keeping, add_samplers
from export.stage import Stage, check_out, stage_for
from export.twin import twin_in
from export.verify import NOT_EXECUTED, prove
from runtime.contract import CONDITIONING_PROFILE, profiles
from runtime.errors import BackendError, EngineError, FlowTurboError, OutputError, RequestError
from runtime.files import replacing
from runtime.hashes import HashMemory
from runtime.manifest import (
    GPU_TARGETS,
    PROOF,
    SCHEMA,
    EngineRecord,
    FileRecord,
    GraphRecord,
    Manifest,
    ProofRecord,
    check_file,
    read_manifest,
    write_manifest,
)
from runtime.version import VERSION

Say = Callable[[str], None]
NOTHING, LIMITS = Keeping(), GateLimits()


@dataclass(frozen=True)
class Built:
    """A build's outcome: the manifest, and why it was (or was not) built."""

    manifest: Manifest
    rebuilt: bool
    reason: str


def build(
    request: BuildRequest,
    out: Path,
    *,
    rebuild: bool = False,
    force: bool = False,
    low_memory: bool = False,
    keeping: Keeping = NOTHING,
    gate: GateLimits = LIMITS,
    say: Say,
) -> Built:
    """Builds an engine directory from checkpoints, or finds that nothing changed.

    Args:
        rebuild: build even if nothing changed.
        force: keep engines that miss their tolerance or their gate, and go on without those that fail to compile.
        keeping: saved samplers and the default of the directory.
        gate: what quantised engines have to reach.
        say: told what is being done.

    Raises:
        FlowTurboError: see the kinds; no directory that looks finished is left.
    """
    out = check_out(out)
    _check_builders(request.precisions)
    reason = "asked for" if rebuild else why_build(request.inputs, out)
    if not reason and not force:
        reason = judge_again(read_manifest(out), gate)
    if not reason:
        return Built(add_samplers(out, keeping), False, "nothing changed")
    if not rebuild and not force:
        _keep_other_model(out, request.inputs)
    keeping.check(request.inputs)
    with stage_for(out, request.key) as stage:
        manifest = _traced(request, stage, say)
        gc.collect()  # modules hold themselves in cycles; the proof loads the same weights again
        manifest = _compiled(manifest, request.precisions, stage, force, low_memory, say)
        manifest = _proved(manifest, stage.folder, request.precisions, force, say)
        twins = lambda m, p, at: _compiled(m, p, at, False, low_memory, say)  # noqa: E731 - as the build itself
        manifest = gated(request, manifest, stage, gate, twins, force, say)
        manifest = keeping.into(manifest)
        write_manifest(stage.folder, manifest)
        stage.publish(out)
    return Built(manifest, True, reason)


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
    available = sorted({graph.precision for graph in manifest.graphs})
    for target, precision in precisions.items():
        if graph_precision(target, precision) not in available:
            raise RequestError(
                f"{target} in {precision} needs ONNX files in {graph_precision(target, precision)}",
                allowed=f"{', '.join(available)}: what {source} holds",
                remedy=f"--precision {available[0]}, or build with --precision {precision} where torch is",
            )
    kept = [record for record in manifest.engines if allow_foreign or record.target not in precisions]
    inputs = {**manifest.inputs, "precisions": ",".join(f"{t}:{p}" for t, p in _precisions(kept, precisions).items())}
    out = check_out(out)
    _check_builders(precisions)
    twins = [] if against is None else [(t, p, twin_in(against, manifest, t)) for t, p in quantised(precisions).items()]
    needed = rebuild or why_build(inputs, out)
    if not needed and twins and not force:
        needed = judge_again(read_manifest(out), gate)
    if not needed:
        return Built(add_samplers(out, keeping), False, "nothing changed")
    if not rebuild and not force:
        _keep_other_model(out, inputs)
    keeping.check(manifest.model.sources)
    with stage_for(out, key_of(inputs)) as stage:
        say("copying the ONNX files")
        _copy(source, manifest, stage.folder)
        manifest = replace(
            manifest,
            inputs=inputs,
            key=key_of(inputs),
            engines=tuple(kept),
            files=_without_engines(manifest, kept),
            notes=tuple(note for note in manifest.notes if note not in _unjudged(precisions)),
        )
        manifest = _compiled(manifest, precisions, stage, force, low_memory, say)
        manifest = _proved(manifest, stage.folder, precisions, force, say, allow_foreign)
        if twins:
            manifest = judged(manifest, stage, twins, gate, force, say)
        else:
            manifest = replace(manifest, notes=(*manifest.notes, *_unjudged(precisions)))
        manifest = keeping.into(manifest)
        write_manifest(stage.folder, manifest)
        stage.publish(out)
    return Built(manifest, True, f"engines were asked for, from {source}")


def _unjudged(precisions: dict[str, str]) -> list[str]:
    """What a gate would have measured, had there been a wider twin to take turns with."""
    return [
        f"{target} {precision}: not judged beside a wider build on this device: --against DIR does, where DIR holds one"
        for target, precision in quantised(precisions).items()
    ]


def _keep_other_model(out: Path, inputs: dict[str, str]) -> None:
    """Refuses to replace the engines of another model without being told to.

    Raises:
        OutputError: `out` was built from another predictor.
    """
    with suppress(EngineError):
        if read_manifest(out).inputs.get("predictor") != inputs.get("predictor"):
            raise OutputError(
                f"{out} holds the engines of another predictor",
                remedy="name another --out, or add --rebuild to replace it",
            )


def why_build(inputs: dict[str, str], out: Path) -> str:
    """Why `out` has to be built; empty if it is whole and was made from the same inputs."""
    try:
        manifest = read_manifest(out)
        memory = HashMemory()
        for record in manifest.files:
            path = check_file(out, record, hashed=False)
            if memory.sha256(path) != record.sha256:
                return f"{record.path} was altered"
        memory.save()
    except EngineError as error:
        return error.given
    changed = [name for name in {*inputs, *manifest.inputs} if inputs.get(name) != manifest.inputs.get(name)]
    return f"changed: {', '.join(sorted(changed))}" if changed else ""


def _traced(request: BuildRequest, stage: Stage, say: Say) -> Manifest:
    """ONNX files and the proof's data, from checkpoints."""
    say("loading PyTorch and the checkpoints")
    try:
        from export.reference import proof_arrays, tile_arrays
        from export.trace import load_model, trace
    except ImportError as error:
        raise BackendError(
            f"building from checkpoints needs {error.name}",
            remedy="pip install 'flowturbo[export]', or use --from DIR on this device",
        ) from error
    model = load_model(request)
    resolutions = model.resolutions(request.resolutions)
    if request.tile is not None:
        model.check_tile(request.tile, resolutions)
    record, defaults = model.record(request), model.defaults()
    arrays: dict[str, Any] = {}
    images = request.max_batch if request.static_batch else min(2, request.max_batch)
    for resolution in (*resolutions, *([request.tile] if request.tile else [])):
        for precision in request.graph_precisions:
            finished = stage.finished(resolution, precision)
            for graph in trace(model, request, resolution, precision, stage.folder, finished, say):
                stage.add_graph(graph)
        if resolution == request.tile:
            arrays |= tile_arrays(model, arrays, resolutions, resolution)
            continue
        arrays |= proof_arrays(model, record, defaults, resolution, request.encoder, images, say, request.recipe)
    graphs = tuple(stage.graphs)
    files = _records(stage.folder, graphs)
    arrays["hashes"] = np.asarray(json.dumps({file.path: file.sha256 for file in files}))
    with replacing(stage.folder / PROOF) as aside, open(aside, "wb") as handle:
        np.savez_compressed(handle, **arrays)
    return Manifest(
        schema=SCHEMA,
        flowturbo=VERSION,
        inputs=request.inputs,
        key=request.key,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        model=record,
        defaults=defaults,
        vaes={name: _vae_record(vae, request.tile) for name, vae in model.vaes.items()},
        resolutions=resolutions,
        max_batch=request.max_batch,
        static_batch=request.static_batch,
        graphs=graphs,
        engines=(),
        proofs=(),
        files=(*files, _file_record(stage.folder, PROOF)),
        notes=model.notes,
    )


def _vae_record(vae: Any, tile: int | None) -> dict[str, Any]:
    from export.tiles import features_of, moments_of

    parts = {} if tile is None else {"moments": moments_of(vae), "features": features_of(vae)}
    return {"scaling": vae.scaling, "shift": vae.shift, "decoder": vae.decoder_shape, **parts}


def _compiled(
    manifest: Manifest, precisions: dict[str, str], stage: Stage, force: bool, low_memory: bool, say: Say
) -> Manifest:
    """Engines for every target. One that fails does not take the others down; all failures are told together."""
    engines, files, failures = list(manifest.engines), list(manifest.files), []
    for target, precision in precisions.items():
        for graph in manifest.graphs:
            if graph.precision != graph_precision(target, precision):
                continue
            if manifest.engine(graph.graph, graph.resolution, target) is not None:
                continue  # kept: --allow-foreign
            if target not in GPU_TARGETS:
                engines.append(
                    EngineRecord(
                        graph.graph, graph.resolution, target, graph.computes or precision, graph.path, executed=False
                    )
                )
                continue
            try:
                engine = _finished(stage, graph, target) or _engine(
                    manifest, graph, target, precision, stage, low_memory, say
                )
                engines.append(engine)
                files.append(_file_record(stage.folder, engine.path))
            except FlowTurboError as error:
                failures.append(f"{graph.graph} {graph.resolution} px for {target}: {error}")
    if failures and not force:
        raise EngineError(
            f"{len(failures)} of {len(failures) + len(engines)} engines failed:\n  " + "\n  ".join(failures),
            remedy="mend what is named; finished ones are kept, so the next try goes on from here",
        )
    return replace(manifest, engines=tuple(engines), files=tuple(files), notes=(*manifest.notes, *failures))


def _check_builders(precisions: dict[str, str]) -> None:
    """Says at once that a builder is missing, before anything is exported.

    Raises:
        BackendError: naming what to install.
    """
    from export.tensorrt import check_builder

    for target in precisions:
        if target in GPU_TARGETS:
            check_builder(target)  # type: ignore[arg-type]  # GPU_TARGETS are the flavours


def _finished(stage: Stage, graph: GraphRecord, target: str) -> EngineRecord | None:
    """The engine that an interrupted build has left."""
    wanted = (graph.graph, graph.resolution, target)
    return next((e for e in stage.engines if (e.graph, e.resolution, e.target) == wanted), None)


def _engine(
    manifest: Manifest, graph: GraphRecord, target: str, precision: str, stage: Stage, low_memory: bool, say: Say
) -> EngineRecord:
    from export.tensorrt import EngineJob, build_engine

    path, precision = f"{graph.resolution}/{target}-{precision}/{graph.graph}.engine", graph.computes or precision
    (stage.folder / path).parent.mkdir(parents=True, exist_ok=True)
    sizes = profiles(manifest.max_batch, manifest.static_batch)
    job = EngineJob(
        onnx=stage.folder / graph.path,
        out=stage.folder / path,
        graph=graph.graph,
        flavour=target,  # type: ignore[arg-type]  # GPU_TARGETS are the flavours
        precision=precision,
        spec=manifest.spec(graph.graph, graph.resolution),
        profiles=CONDITIONING_PROFILE if graph.graph.endswith("conditioning") else sizes,
        low_memory=low_memory,
    )
    label = f"building {graph.resolution} px {target} {precision}: {graph.graph}"
    built = build_engine(job, progress=lambda at: say(f"{label} ({at})"))
    record = EngineRecord(graph.graph, graph.resolution, target, precision, path, built.executed, built.facts())
    stage.add_engine(record)
    return record


def _proved(
    manifest: Manifest, folder: Path, precisions: dict[str, str], force: bool, say: Say, allow_foreign: bool = False
) -> Manifest:
    proofs: list[ProofRecord] = [proof for proof in manifest.proofs if proof.target not in precisions]
    notes = list(manifest.notes)
    for target in precisions:
        try:
            mine = prove(folder, manifest, target, say, allow_foreign)
        except FlowTurboError as error:
            if not force and not isinstance(error, BackendError):
                raise
            notes.append(f"{target}: not proved here: {error.given}")
            continue
        proofs += mine
    executed = {proof.target for proof in proofs if NOT_EXECUTED not in proof.by}
    engines = tuple(replace(engine, executed=engine.target in executed) for engine in manifest.engines)
    return replace(manifest, proofs=tuple(proofs), engines=engines, notes=tuple(notes))


def _records(folder: Path, graphs: Sequence[GraphRecord]) -> tuple[FileRecord, ...]:
    paths = [path for graph in graphs for path in (graph.path, graph.data) if path is not None]
    return tuple(_file_record(folder, path) for path in paths)


def _file_record(folder: Path, path: str) -> FileRecord:
    memory = HashMemory()
    record = FileRecord(path, memory.sha256(folder / path), (folder / path).stat().st_size)
    memory.save()
    return record


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
