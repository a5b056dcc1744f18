"""Build = export + compile + prove. In a finished directory every engine was proved; nothing else is left behind.

This module is light: torch is imported only when something has to be traced, so that an unchanged build answers at
once. A Jetson compiles and proves its own engines from a directory's ONNX files: `export/recompile.py`.
"""

from __future__ import annotations

import datetime
import gc
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from export.build_request import BuildRequest
from export.compile import Say, check_builders, compile_engines, prove_engines, record_file
from export.directory_samplers import SamplerSet, add_samplers
from export.proof.gate import GateLimits, gate_quantised, recheck_gate
from export.stage import BuildStage, check_engine_folder, open_stage
from runtime.directory.manifest import MANIFEST_SCHEMA, PROOF_FILE, check_file, read_manifest, write_manifest
from runtime.directory.records import FileRecord, GraphRecord, Manifest
from runtime.system.errors import BackendError, EngineError, OutputError
from runtime.system.files import write_atomically
from runtime.system.hashes import sha256_cached
from runtime.system.version import VERSION

NO_SAMPLERS, DEFAULT_LIMITS = SamplerSet(), GateLimits()


@dataclass(frozen=True)
class BuildResult:
    """A build's outcome: the manifest, and why it was (or was not) built."""

    manifest: Manifest
    is_rebuilt: bool
    reason: str


def build(
    request: BuildRequest,
    out: Path,
    *,
    rebuild: bool = False,
    force: bool = False,
    low_memory: bool = False,
    sampler_set: SamplerSet = NO_SAMPLERS,
    gate: GateLimits = DEFAULT_LIMITS,
    say: Say,
) -> BuildResult:
    """Builds an engine directory from checkpoints, or finds that nothing changed.

    Args:
        rebuild: build even if nothing changed.
        force: keep engines that miss their tolerance or their gate, and go on without those that fail to compile.
        sampler_set: saved samplers and the default of the directory.
        gate: what quantised engines have to reach.
        say: told what is being done.

    Raises:
        FlowTurboError: see the kinds; no directory that looks finished is left.
    """
    out = check_engine_folder(out)
    check_builders(request.precisions)
    reason = "asked for" if rebuild else find_build_reason(request.inputs, out)
    if not reason and not force:
        reason = recheck_gate(read_manifest(out), gate)
    if not reason:
        return BuildResult(add_samplers(out, sampler_set), False, "nothing changed")
    if not rebuild and not force:
        check_same_model(out, request.inputs)
    sampler_set.check_fits(request.inputs)
    with open_stage(out, request.key) as stage:
        manifest = _trace_checkpoints(request, stage, say)
        gc.collect()  # modules hold themselves in cycles; the proof loads the same weights again
        manifest = compile_engines(manifest, request.precisions, stage, force, low_memory, say)
        manifest = prove_engines(manifest, stage.folder, request.precisions, force, say)
        compile_reference = partial(compile_engines, force=False, low_memory=low_memory, say=say)
        manifest = gate_quantised(request, manifest, stage, gate, compile_reference, force, say)
        manifest = sampler_set.add_to(manifest)
        write_manifest(stage.folder, manifest)
        stage.publish(out)
    return BuildResult(manifest, True, reason)


def check_same_model(out: Path, inputs: dict[str, str]) -> None:
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


def find_build_reason(inputs: dict[str, str], out: Path) -> str:
    """Why `out` has to be built; empty if it is whole and was made from the same inputs."""
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


def _trace_checkpoints(request: BuildRequest, stage: BuildStage, say: Say) -> Manifest:
    """ONNX files and the proof's data, from checkpoints."""
    say("loading PyTorch and the checkpoints")
    try:
        from export.proof.reference import compute_proof_arrays, compute_tile_arrays
        from export.trace import load_model, trace_graphs
    except ImportError as error:
        raise BackendError(
            f"building from checkpoints needs {error.name}",
            remedy="pip install 'flowturbo[export]', or use --from DIR on this device",
        ) from error
    model = load_model(request)
    resolutions = model.resolve_resolutions(request.resolutions)
    if request.tile is not None:
        model.check_tile(request.tile, resolutions)
    record, defaults = model.make_record(request), model.make_defaults()
    arrays: dict[str, Any] = {}
    num_images = request.max_batch if request.static_batch else min(2, request.max_batch)
    for resolution in (*resolutions, *([request.tile] if request.tile else [])):
        for precision in request.graph_precisions:
            finished_graphs = stage.list_finished_graphs(resolution, precision)
            for graph in trace_graphs(model, request, resolution, precision, stage.folder, finished_graphs, say):
                stage.add_graph(graph)
        if resolution == request.tile:
            arrays |= compute_tile_arrays(model, arrays, resolutions, resolution)
            continue
        arrays |= compute_proof_arrays(
            model, record, defaults, resolution, request.encoder, num_images, say, request.recipe
        )
    graphs = tuple(stage.graphs)
    files = _record_files(stage.folder, graphs)
    arrays["hashes"] = np.asarray(json.dumps({file.path: file.sha256 for file in files}))
    with write_atomically(stage.folder / PROOF_FILE) as aside, open(aside, "wb") as handle:
        np.savez_compressed(handle, **arrays)
    return Manifest(
        schema=MANIFEST_SCHEMA,
        flowturbo=VERSION,
        inputs=request.inputs,
        key=request.key,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        model=record,
        defaults=defaults,
        vaes={name: _describe_vae(vae, request.tile) for name, vae in model.vaes.items()},
        resolutions=resolutions,
        max_batch=request.max_batch,
        static_batch=request.static_batch,
        graphs=graphs,
        engines=(),
        proofs=(),
        files=(*files, record_file(stage.folder, PROOF_FILE)),
        notes=model.notes,
    )


def _describe_vae(vae: Any, tile: int | None) -> dict[str, Any]:
    from export.graphs.tile_graph import count_head_channels, count_norm_groups

    parts = {} if tile is None else {"moments": count_norm_groups(vae), "features": count_head_channels(vae)}
    return {"scaling": vae.scaling, "shift": vae.shift, "decoder": vae.decoder_shape, **parts}


def _record_files(folder: Path, graphs: Sequence[GraphRecord]) -> tuple[FileRecord, ...]:
    paths = [path for graph in graphs for path in (graph.path, graph.data) if path is not None]
    return tuple(record_file(folder, path) for path in paths)
