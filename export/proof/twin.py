"""The wider twin that a quantised build is judged beside: made in the build's own stage, or another finished directory.

A twin in the stage has the stage's life: a build that was stopped or refused goes on with it, a build that is kept
removes it, and the next build of anything else to the same place throws it away with the rest of the stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from export.build_request import BuildRequest
from export.lowbit.recipe import PLAIN
from export.stage import Stage
from export.targets import QUANTISED, form_of, graph_precision
from runtime.directory.manifest import GPU_TARGETS, EngineRecord, FileRecord, Manifest, read_manifest
from runtime.system.errors import CheckpointError, RequestError
from runtime.system.files import sha256_of
from runtime.system.hardware import tensorrt_usable

Say = Callable[[str], None]
Compile = Callable[[Manifest, dict[str, str], Stage], Manifest]
"""Adds the engines of targets (→ precision) to a manifest whose ONNX files lie in a stage."""
_FOLDER = "twin"


@dataclass(frozen=True)
class Twin:
    """Engines of the same model in a wider type.

    Attributes:
        folder, manifest: where they are; the manifest may be in no file.
        precision: of its networks.
        notes: what its reader should know.
    """

    folder: Path
    manifest: Manifest
    precision: str
    notes: tuple[str, ...] = ()


def make_twin(
    request: BuildRequest,
    manifest: Manifest,
    target: str,
    precision: str,
    stage: Stage,
    compiled: Compile,
    say: Say,
) -> Twin:
    """The same networks in the type below the quantised one; in float32 where 16 bits cannot hold the plain weights.

    Args:
        stage: of the build; the twin is made in a folder of it.
        compiled: compiles the twin, where a device can time it.
    """
    from export.trace import check_range, load_model, trace

    plain = replace(request, recipe=PLAIN, tile=None)
    model, base = load_model(plain), form_of(graph_precision(target, precision)).base
    notes: tuple[str, ...] = ()
    try:
        check_range(model, plain, form_of(base))
    except CheckpointError as error:
        notes = (f"{target} {precision} was judged beside fp32, since {base} has no twin: {error.given}",)
        base = "fp32"
    inner = Stage(stage.folder / _FOLDER / base, request.key)
    for resolution in manifest.resolutions:
        finished = inner.finished(resolution, base)
        for graph in trace(model, plain, resolution, base, inner.folder, finished, lambda text: say(f"twin: {text}")):
            inner.add_graph(graph)
    twin = _from_graphs(manifest, inner)
    if target not in GPU_TARGETS or tensorrt_usable(target):
        return Twin(inner.folder, compiled(twin, {target: base}, inner), base, notes)
    engines = tuple(EngineRecord(g.graph, g.resolution, target, base, g.path, executed=False) for g in twin.graphs)
    return Twin(inner.folder, replace(twin, engines=engines), base, notes)


def _from_graphs(manifest: Manifest, stage: Stage) -> Manifest:
    """A manifest with the ONNX files of a stage in place of its own."""
    graphs = tuple(stage.graphs)
    paths = [path for graph in graphs for path in (graph.path, graph.data) if path is not None]
    files = [(path, stage.folder / path) for path in paths]
    records = tuple(FileRecord(path, sha256_of(file), file.stat().st_size) for path, file in files)
    return replace(manifest, graphs=graphs, engines=(), files=records)


def kept_beside(folder: Path) -> Path:
    """Where a gate keeps what it measured, in the stage's folder."""
    return folder / _FOLDER / "latents"


def remove_twins(stage: Stage) -> None:
    """Removes twins and what was measured of them; before a stage becomes an engine directory."""
    shutil.rmtree(stage.folder / _FOLDER, ignore_errors=True)


def twin_in(folder: Path, manifest: Manifest, target: str) -> Twin:
    """A finished directory of the same model as the twin of engines that were built without checkpoints.

    Returns:
        With the samplers and defaults of `manifest`, so that both make the same pictures.

    Raises:
        EngineError: `folder` is no engine directory.
        RequestError: it holds another model or batch, or no wider engines of the target at a resolution.
    """
    other = read_manifest(folder)
    for role, sha256 in manifest.model.sources.items():
        if other.model.sources.get(role) != sha256:
            raise RequestError(
                f"--against {folder}, which was built from another {role}",
                allowed=f"a directory of the {role} whose sha256 is {sha256[:12]}…",
                remedy="build it from the same checkpoints",
            )
    fixed, theirs = (m.max_batch if m.static_batch else None for m in (manifest, other))
    if fixed != theirs:
        raise RequestError(
            f"--against {folder}, whose engines take {_images(theirs)}",
            allowed=f"a directory whose engines take {_images(fixed)}, as these do",
            remedy="export both with or without --static-batch, and with one --max-batch",
        )
    for resolution in manifest.resolutions:
        record = other.engine("predictor", resolution, target)
        found = "no" if record is None else record.precision
        if found in ("no", *QUANTISED):
            raise RequestError(
                f"--against {folder}, which has {found} engines for {target} at {resolution} px",
                allowed="a directory with engines in fp16, bf16 or fp32 for the same target",
                remedy=f"build them on this device: flowturbo-export build-engines --from DIR --target {target}",
            )
    same = replace(
        other, defaults=manifest.defaults, samplers=manifest.samplers, sampler_hashes=manifest.sampler_hashes
    )
    return Twin(folder, same, found)


def _images(fixed: int | None) -> str:
    return "any number of images up to max-batch" if fixed is None else f"exactly {fixed} images"
