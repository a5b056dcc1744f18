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
from pathlib import Path
from typing import Any

import numpy as np

from export.build_request import BuildRequest
from export.compile import Say, check_builders, compiled, file_record, proved
from export.directory_samplers import Keeping, add_samplers
from export.proof.gate import GateLimits, gated, judge_again
from export.stage import Stage, check_out, stage_for
from runtime.directory.manifest import (
    PROOF,
    SCHEMA,
    FileRecord,
    GraphRecord,
    Manifest,
    check_file,
    read_manifest,
    write_manifest,
)
from runtime.system.errors import BackendError, EngineError, OutputError
from runtime.system.files import replacing
from runtime.system.hashes import HashMemory
from runtime.system.version import VERSION

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
    check_builders(request.precisions)
    reason = "asked for" if rebuild else why_build(request.inputs, out)
    if not reason and not force:
        reason = judge_again(read_manifest(out), gate)
    if not reason:
        return Built(add_samplers(out, keeping), False, "nothing changed")
    if not rebuild and not force:
        keep_other_model(out, request.inputs)
    keeping.check(request.inputs)
    with stage_for(out, request.key) as stage:
        manifest = _traced(request, stage, say)
        gc.collect()  # modules hold themselves in cycles; the proof loads the same weights again
        manifest = compiled(manifest, request.precisions, stage, force, low_memory, say)
        manifest = proved(manifest, stage.folder, request.precisions, force, say)
        twins = lambda m, p, at: compiled(m, p, at, False, low_memory, say)  # noqa: E731 - as the build itself
        manifest = gated(request, manifest, stage, gate, twins, force, say)
        manifest = keeping.into(manifest)
        write_manifest(stage.folder, manifest)
        stage.publish(out)
    return Built(manifest, True, reason)


def keep_other_model(out: Path, inputs: dict[str, str]) -> None:
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
        from export.proof.reference import proof_arrays, tile_arrays
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
        files=(*files, file_record(stage.folder, PROOF)),
        notes=model.notes,
    )


def _vae_record(vae: Any, tile: int | None) -> dict[str, Any]:
    from export.graphs.tile_graph import features_of, moments_of

    parts = {} if tile is None else {"moments": moments_of(vae), "features": features_of(vae)}
    return {"scaling": vae.scaling, "shift": vae.shift, "decoder": vae.decoder_shape, **parts}


def _records(folder: Path, graphs: Sequence[GraphRecord]) -> tuple[FileRecord, ...]:
    paths = [path for graph in graphs for path in (graph.path, graph.data) if path is not None]
    return tuple(file_record(folder, path) for path in paths)
