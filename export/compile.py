"""Compile the ONNX files of a staging folder to engines for every target, and prove each. Needs no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from export.proof.verify import NOT_EXECUTED, ProofRun
from export.stage import BuildStage
from export.targets import resolve_graph_precision
from runtime.directory.contract import CONDITIONING_PROFILE, build_profiles
from runtime.directory.records import GPU_TARGETS, EngineRecord, FileRecord, Manifest, ProofRecord
from runtime.system.errors import BackendError, EngineError, FlowTurboError
from runtime.system.hashes import sha256_cached
from runtime.system.progress import SILENT, Progress


def compile_engines(
    manifest: Manifest,
    precisions: dict[str, str],
    stage: BuildStage,
    force: bool,
    low_memory: bool,
    progress: Progress = SILENT,
) -> Manifest:
    """Add the engines of every target to a manifest. One that fails does not hinder the others.

    Raises:
        EngineError: some failed, with a list of them, and `force` is not set.
    """
    from export.tensorrt.compiler import EngineJob, build_engine

    engines, files, failures = list(manifest.engines), list(manifest.files), []
    missing = [
        (target, precision, graph)
        for target, precision in precisions.items()
        for graph in manifest.graphs
        if graph.precision == resolve_graph_precision(target, precision)
        and manifest.find_engine(graph.graph, graph.resolution, target) is None  # else --allow-foreign left it in place
    ]
    for target, precision, graph in missing:
        key, engine_precision = (graph.graph, graph.resolution, target), graph.computes or precision
        if target not in GPU_TARGETS:
            engines.append(EngineRecord(*key, engine_precision, graph.path, executed=False))
            continue
        path = f"{graph.resolution}/{target}-{precision}/{graph.graph}.engine"
        try:
            # An interrupted build may have finished it.
            engine = next((e for e in stage.engines if (e.graph, e.resolution, e.target) == key), None)
            if engine is None:
                (stage.folder / path).parent.mkdir(parents=True, exist_ok=True)
                sizes = build_profiles(manifest.max_batch, manifest.static_batch)
                job = EngineJob(
                    onnx=stage.folder / graph.path,
                    out=stage.folder / path,
                    graph=graph.graph,
                    flavour=target,  # type: ignore[arg-type]  # GPU_TARGETS are the flavours
                    precision=engine_precision,
                    spec=manifest.build_spec(graph.graph, graph.resolution),
                    profiles=CONDITIONING_PROFILE if graph.graph.endswith("conditioning") else sizes,
                    low_memory=low_memory,
                )
                label = f"building {graph.resolution} px {target} {engine_precision}: {graph.graph}"
                result = build_engine(job, progress, label)
                engine = EngineRecord(*key, engine_precision, path, result.executed, result.to_json())
                stage.add_engine(engine)
            engines.append(engine)
            files.append(record_file(stage.folder, path))
        except FlowTurboError as error:
            failures.append(f"{graph.graph} {graph.resolution} px for {target}: {error}")
    if failures and not force:
        raise EngineError(
            f"{len(failures)} of {len(failures) + len(engines)} engines failed:\n  " + "\n  ".join(failures),
            remedy="mend what is named; finished ones are kept, so the next try goes on from here",
        )
    return replace(manifest, engines=tuple(engines), files=tuple(files), notes=(*manifest.notes, *failures))


def check_builders(precisions: dict[str, str]) -> None:
    """Check that every builder is installed, before anything is exported.

    Raises:
        BackendError: with the package to install.
    """
    from export.tensorrt.compiler import check_builder

    for target in precisions:
        if target in GPU_TARGETS:
            check_builder(target)  # type: ignore[arg-type]  # GPU_TARGETS are the flavours


def prove_engines(
    manifest: Manifest,
    folder: Path,
    precisions: dict[str, str],
    force: bool,
    progress: Progress = SILENT,
    allow_foreign: bool = False,
) -> Manifest:
    """Make every comparison that this machine can, and record it and which engines could run.

    Raises:
        ProofError: an engine misses its tolerance, and `force` is not set.
    """
    proofs: list[ProofRecord] = [proof for proof in manifest.proofs if proof.target not in precisions]
    notes = list(manifest.notes)
    for target in precisions:
        try:
            run = ProofRun(folder, manifest, target, allow_foreign=allow_foreign, progress=progress)
            proofs += run.prove()
        except FlowTurboError as error:
            if not force and not isinstance(error, BackendError):
                raise
            notes.append(f"{target}: not proved here: {error.given}")
    executed = {proof.target for proof in proofs if NOT_EXECUTED not in proof.by}
    engines = tuple(replace(engine, executed=engine.target in executed) for engine in manifest.engines)
    return replace(manifest, proofs=tuple(proofs), engines=engines, notes=tuple(notes))


def record_file(folder: Path, path: str) -> FileRecord:
    """Return the record of a file in a stage, with its hash and size."""
    record = FileRecord(path, sha256_cached(folder / path), (folder / path).stat().st_size)
    return record
