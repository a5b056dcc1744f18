"""ONNX files of a staging folder to engines for every target, and the proof of each. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from export.proof.verify import NOT_EXECUTED, prove_target
from export.stage import BuildStage
from export.targets import resolve_graph_precision
from runtime.directory.contract import CONDITIONING_PROFILE, build_profiles
from runtime.directory.records import GPU_TARGETS, EngineRecord, FileRecord, GraphRecord, Manifest, ProofRecord
from runtime.system.errors import BackendError, EngineError, FlowTurboError
from runtime.system.hashes import sha256_cached

Say = Callable[[str], None]


def compile_engines(
    manifest: Manifest, precisions: dict[str, str], stage: BuildStage, force: bool, low_memory: bool, say: Say
) -> Manifest:
    """Engines for every target. One that fails does not take the others down; all failures are told together."""
    engines, files, failures = list(manifest.engines), list(manifest.files), []
    for target, precision in precisions.items():
        for graph in manifest.graphs:
            if graph.precision != resolve_graph_precision(target, precision):
                continue
            if manifest.find_engine(graph.graph, graph.resolution, target) is not None:
                continue  # kept: --allow-foreign
            if target not in GPU_TARGETS:
                engines.append(
                    EngineRecord(
                        graph.graph, graph.resolution, target, graph.computes or precision, graph.path, executed=False
                    )
                )
                continue
            try:
                engine = _find_finished(stage, graph, target) or _compile_engine(
                    manifest, graph, target, precision, stage, low_memory, say
                )
                engines.append(engine)
                files.append(record_file(stage.folder, engine.path))
            except FlowTurboError as error:
                failures.append(f"{graph.graph} {graph.resolution} px for {target}: {error}")
    if failures and not force:
        raise EngineError(
            f"{len(failures)} of {len(failures) + len(engines)} engines failed:\n  " + "\n  ".join(failures),
            remedy="mend what is named; finished ones are kept, so the next try goes on from here",
        )
    return replace(manifest, engines=tuple(engines), files=tuple(files), notes=(*manifest.notes, *failures))


def check_builders(precisions: dict[str, str]) -> None:
    """Says at once that a builder is missing, before anything is exported.

    Raises:
        BackendError: naming what to install.
    """
    from export.tensorrt.compiler import check_builder

    for target in precisions:
        if target in GPU_TARGETS:
            check_builder(target)  # type: ignore[arg-type]  # GPU_TARGETS are the flavours


def _find_finished(stage: BuildStage, graph: GraphRecord, target: str) -> EngineRecord | None:
    """The engine that an interrupted build has left."""
    key = (graph.graph, graph.resolution, target)
    return next((engine for engine in stage.engines if (engine.graph, engine.resolution, engine.target) == key), None)


def _compile_engine(
    manifest: Manifest, graph: GraphRecord, target: str, precision: str, stage: BuildStage, low_memory: bool, say: Say
) -> EngineRecord:
    from export.tensorrt.compiler import EngineJob, build_engine

    path, precision = f"{graph.resolution}/{target}-{precision}/{graph.graph}.engine", graph.computes or precision
    (stage.folder / path).parent.mkdir(parents=True, exist_ok=True)
    sizes = build_profiles(manifest.max_batch, manifest.static_batch)
    job = EngineJob(
        onnx=stage.folder / graph.path,
        out=stage.folder / path,
        graph=graph.graph,
        flavour=target,  # type: ignore[arg-type]  # GPU_TARGETS are the flavours
        precision=precision,
        spec=manifest.build_spec(graph.graph, graph.resolution),
        profiles=CONDITIONING_PROFILE if graph.graph.endswith("conditioning") else sizes,
        low_memory=low_memory,
    )
    label = f"building {graph.resolution} px {target} {precision}: {graph.graph}"
    result = build_engine(job, progress=lambda progress: say(f"{label} ({progress})"))
    record = EngineRecord(graph.graph, graph.resolution, target, precision, path, result.executed, result.to_json())
    stage.add_engine(record)
    return record


def prove_engines(
    manifest: Manifest, folder: Path, precisions: dict[str, str], force: bool, say: Say, allow_foreign: bool = False
) -> Manifest:
    """The manifest with every comparison that this machine can make, and which engines it could run."""
    proofs: list[ProofRecord] = [proof for proof in manifest.proofs if proof.target not in precisions]
    notes = list(manifest.notes)
    for target in precisions:
        try:
            target_proofs = prove_target(folder, manifest, target, say, allow_foreign)
        except FlowTurboError as error:
            if not force and not isinstance(error, BackendError):
                raise
            notes.append(f"{target}: not proved here: {error.given}")
            continue
        proofs += target_proofs
    executed = {proof.target for proof in proofs if NOT_EXECUTED not in proof.by}
    engines = tuple(replace(engine, executed=engine.target in executed) for engine in manifest.engines)
    return replace(manifest, proofs=tuple(proofs), engines=engines, notes=tuple(notes))


def record_file(folder: Path, path: str) -> FileRecord:
    """Hash and size of a file of the stage."""
    return FileRecord(path, sha256_cached(folder / path), (folder / path).stat().st_size)
