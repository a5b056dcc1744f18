"""Build = export + compile + prove. In a finished directory every engine was proved; nothing else is left behind.

A build starts from checkpoints, which are traced, or from another directory, whose ONNX files are copied: that is how
a Jetson builds its own engines. Torch is imported only to trace, so that an unchanged build answers at once.
"""

from __future__ import annotations

import datetime
import gc
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from export.build_request import BuildRequest
from export.compile import check_builders, compile_engines, prove_engines, record_file
from export.directory_samplers import SamplerSet, add_samplers
from export.directory_source import DirectorySource
from export.proof.gate import GateLimits, gate_build, recheck_gate
from export.proof.reference_build import ReferenceBuild, build_references
from export.stage import BuildStage, check_engine_folder, open_stage
from runtime.directory.manifest import MANIFEST_SCHEMA, PROOF_FILE, check_file, read_manifest, write_manifest
from runtime.directory.records import Manifest
from runtime.system.errors import BackendError, EngineError, OutputError
from runtime.system.files import write_atomically
from runtime.system.hashes import sha256_cached
from runtime.system.progress import SILENT, Progress
from runtime.system.version import VERSION

NO_SAMPLERS, DEFAULT_LIMITS = SamplerSet(), GateLimits()


@dataclass(frozen=True)
class BuildResult:
    """The outcome of a build: the manifest, and why it was (or was not) built."""

    manifest: Manifest
    is_rebuilt: bool
    reason: str


def build(
    source: BuildRequest | DirectorySource,
    out: Path,
    *,
    rebuild: bool = False,
    force: bool = False,
    low_memory: bool = False,
    sampler_set: SamplerSet = NO_SAMPLERS,
    gate: GateLimits = DEFAULT_LIMITS,
    progress: Progress = SILENT,
) -> BuildResult:
    """Build an engine directory, unless nothing changed since it was built.

    Args:
        source: checkpoints, or a directory with the ONNX files.
        rebuild: build even if nothing changed.
        force: keep engines that miss their tolerance or their gate, and go on without those that fail to compile.
        low_memory: compile with little memory, for devices of 8 GB and less.
        sampler_set: calibrated samplers and the default of the directory.
        gate: what quantised engines have to reach.

    Raises:
        FlowTurboError: of many kinds; no directory that looks finished is left.
    """
    out = check_engine_folder(out)
    check_builders(source.precisions)
    reason = "asked for" if rebuild else find_build_reason(source.inputs, out)
    has_gate = not isinstance(source, DirectorySource) or bool(source.references)
    if not reason and has_gate and not force:
        reason = recheck_gate(read_manifest(out), gate)
    if not reason:
        return BuildResult(add_samplers(out, sampler_set), False, "nothing changed")
    if not rebuild and not force:
        check_same_model(out, source.inputs)
    sampler_set.check_fits(source.checkpoint_hashes)
    with open_stage(out, source.key) as stage:
        if isinstance(source, DirectorySource):
            progress.stage("copying the ONNX files")
            manifest = source.copy_files(stage.folder)
        else:
            manifest = _trace_checkpoints(source, stage, progress)
            gc.collect()  # modules hold themselves in cycles; the proof loads the same weights again
        manifest = compile_engines(manifest, source.precisions, stage, force, low_memory, progress)
        manifest = prove_engines(manifest, stage.folder, source.precisions, force, progress, source.allow_foreign)
        references: Iterable[tuple[str, str, ReferenceBuild]]
        if isinstance(source, DirectorySource):
            references = source.references
            reason = f"engines were asked for, from {source.folder}"
            manifest = replace(manifest, notes=(*manifest.notes, *source.closing_notes))
        else:
            compile_reference = partial(compile_engines, force=False, low_memory=low_memory, progress=progress)
            references = build_references(source, manifest, stage, compile_reference, progress)
        manifest = gate_build(manifest, stage, references, gate, force, progress)
        manifest = sampler_set.add_to(manifest)
        write_manifest(stage.folder, manifest)
        stage.publish(out)
    return BuildResult(manifest, True, reason)


def check_same_model(out: Path, inputs: Mapping[str, str]) -> None:
    """Refuse to replace the engines of another model, which needs --rebuild.

    Raises:
        OutputError: `out` was built from another predictor.
    """
    with suppress(EngineError):
        if read_manifest(out).inputs.get("predictor") != inputs.get("predictor"):
            raise OutputError(
                f"{out} holds the engines of another predictor",
                remedy="name another --out, or add --rebuild to replace it",
            )


def find_build_reason(inputs: Mapping[str, str], out: Path) -> str:
    """Return why `out` has to be built; empty if it is whole and was built from the same inputs."""
    try:
        manifest = read_manifest(out)
        for record in manifest.files:
            path = check_file(out, record, check_hash=False)
            if sha256_cached(path) != record.sha256:
                return f"{record.path} was altered"
    except EngineError as error:
        return error.given
    changed = [name for name in {*inputs, *manifest.inputs} if inputs.get(name) != manifest.inputs.get(name)]
    return f"changed: {', '.join(sorted(changed))}" if changed else ""


def _trace_checkpoints(request: BuildRequest, stage: BuildStage, progress: Progress) -> Manifest:
    """Write the ONNX files and the proof's data from checkpoints; return the manifest without engines."""
    progress.stage("loading PyTorch and the checkpoints")
    try:
        from export.graphs.tile_graph import count_head_channels, count_norm_groups
        from export.model import load_model
        from export.proof.proof_arrays import compute_proof_arrays, compute_tile_arrays
        from export.trace import trace_graphs
    except ImportError as error:
        raise BackendError(
            f"building from checkpoints needs {error.name}",
            remedy="pip install 'flowturbo[export]', or use --from DIR on this device",
        ) from error
    model, tile = load_model(request), request.tile
    resolutions = model.resolve_resolutions(request.resolutions)
    if tile is not None:
        model.check_tile(tile, resolutions)
    vaes = {}
    for name, vae in model.vaes.items():
        parts = {} if tile is None else {"moments": count_norm_groups(vae), "features": count_head_channels(vae)}
        statistics = {"mean": list(vae.mean), "std": list(vae.std)} if vae.std else {}
        vaes[name] = {"scaling": vae.scaling, "shift": vae.shift, **statistics, "decoder": vae.decoder_shape, **parts}
    manifest = Manifest(
        schema=MANIFEST_SCHEMA,
        flowturbo=VERSION,
        inputs=request.inputs,
        key=request.key,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        model=model.make_record(request),
        defaults=model.make_defaults(),
        vaes=vaes,
        resolutions=resolutions,
        max_batch=request.max_batch,
        static_batch=request.static_batch,
        graphs=(),
        engines=(),
        proofs=(),
        files=(),
        notes=model.notes,
    )
    arrays: dict[str, Any] = {}
    for size in (*resolutions, *([tile] if tile is not None else [])):
        for precision in request.graph_precisions:
            trace_graphs(model, request, size, precision, stage, progress)
        if size == tile:
            arrays |= compute_tile_arrays(model, arrays, resolutions, tile)
        else:
            progress.stage(f"reference in PyTorch float32 at {size} px")
            arrays |= compute_proof_arrays(model, manifest, request, size)
    graphs = tuple(stage.graphs)
    paths = [path for graph in graphs for path in (graph.path, graph.data) if path is not None]
    files = [record_file(stage.folder, path) for path in paths]
    arrays["hashes"] = np.asarray(json.dumps({file.path: file.sha256 for file in files}))
    with write_atomically(stage.folder / PROOF_FILE) as aside, open(aside, "wb") as handle:
        np.savez_compressed(handle, **arrays)
    return replace(manifest, graphs=graphs, files=(*files, record_file(stage.folder, PROOF_FILE)))
