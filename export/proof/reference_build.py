"""The reference build that a quantised one is compared with: the same model in a wider type.

It is made in the build's own stage, or it is another finished directory. In the stage it lives as long as the stage: a
build that was stopped or refused goes on with it, and a build that passes removes it. The next build of anything else
to the same place removes it with the rest of the stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from export.build_request import BuildRequest
from export.lowbit.recipe import EMPTY_RECIPE
from export.stage import BuildStage
from export.targets import (
    QUANTISED_PRECISIONS,
    parse_graph_format,
    resolve_graph_precision,
    select_quantised,
)
from runtime.directory.manifest import read_manifest
from runtime.directory.records import GPU_TARGETS, EngineRecord, FileRecord, Manifest
from runtime.system.errors import CheckpointError, RequestError
from runtime.system.files import compute_sha256
from runtime.system.hardware import can_run_tensorrt
from runtime.system.progress import SILENT, Progress

CompileEngines = Callable[[Manifest, dict[str, str], BuildStage], Manifest]
"""Adds the engines of targets (→ precision) to a manifest whose ONNX files lie in a stage."""
_REFERENCE_FOLDER = "reference"


@dataclass(frozen=True)
class ReferenceBuild:
    """Engines of the same model in a wider type.

    Attributes:
        folder, manifest: where they are; the manifest may be in no file.
        precision: of its networks.
        notes: remarks for the manifest of the build that is compared.
    """

    folder: Path
    manifest: Manifest
    precision: str
    notes: tuple[str, ...] = ()


def build_references(
    request: BuildRequest, manifest: Manifest, stage: BuildStage, compile_reference: CompileEngines, progress: Progress
) -> Iterator[tuple[str, str, ReferenceBuild]]:
    """Build a reference for every quantised target of a request, one at a time; yield target, precision and build."""
    for target, precision in select_quantised(request.precisions).items():
        yield (
            target,
            precision,
            build_reference(request, manifest, target, precision, stage, compile_reference, progress),
        )


def build_reference(
    request: BuildRequest,
    manifest: Manifest,
    target: str,
    precision: str,
    stage: BuildStage,
    compile_reference: CompileEngines,
    progress: Progress = SILENT,
) -> ReferenceBuild:
    """Build the same networks in the type below the quantised one; in float32 where 16 bits cannot hold the weights.

    Args:
        stage: of the build; the reference is made in a folder of it.
        compile_reference: compiles the reference, where a device can time it.
    """
    from export.lowbit.guard import check_weight_range
    from export.model import load_model
    from export.trace import trace_graphs

    plain_request = replace(request, recipe=EMPTY_RECIPE, tile=None)
    model = load_model(plain_request)
    reference_precision = parse_graph_format(resolve_graph_precision(target, precision)).base
    notes: tuple[str, ...] = ()
    try:
        check_weight_range(model, plain_request, parse_graph_format(reference_precision))
    except CheckpointError as error:
        notes = (
            f"{target} {precision} was compared with fp32, since there is no reference build in "
            f"{reference_precision}: {error.given}",
        )
        reference_precision = "fp32"
    reference_stage = BuildStage(stage.folder / _REFERENCE_FOLDER / reference_precision, request.key)
    progress.stage(f"reference build in {reference_precision} for {target} {precision}")
    for resolution in manifest.resolutions:
        trace_graphs(model, plain_request, resolution, reference_precision, reference_stage, progress)
    graphs = tuple(reference_stage.graphs)
    paths = [path for graph in graphs for path in (graph.path, graph.data) if path is not None]
    files = [(path, reference_stage.folder / path) for path in paths]
    records = tuple(FileRecord(path, compute_sha256(file), file.stat().st_size) for path, file in files)
    reference_manifest = replace(manifest, graphs=graphs, engines=(), files=records)
    if target not in GPU_TARGETS or can_run_tensorrt(target):
        reference_manifest = compile_reference(reference_manifest, {target: reference_precision}, reference_stage)
    else:
        engines = tuple(
            EngineRecord(g.graph, g.resolution, target, reference_precision, g.path, executed=False) for g in graphs
        )
        reference_manifest = replace(reference_manifest, engines=engines)
    return ReferenceBuild(reference_stage.folder, reference_manifest, reference_precision, notes)


def locate_latents_cache(folder: Path) -> Path:
    """Return where the gate stores latents, in the folder of a stage."""
    return folder / _REFERENCE_FOLDER / "latents"


def remove_references(stage: BuildStage) -> None:
    """Remove reference builds and what was measured of them, before a stage becomes an engine directory."""
    shutil.rmtree(stage.folder / _REFERENCE_FOLDER, ignore_errors=True)


def read_reference(folder: Path, manifest: Manifest, target: str) -> ReferenceBuild:
    """Use a finished directory of the same model as the reference of engines that are built without checkpoints.

    Returns:
        The directory with the samplers and defaults of `manifest`, so that both make the same pictures.

    Raises:
        EngineError: `folder` is no engine directory.
        RequestError: it holds another model or batch, or no wider engines of the target at a resolution.
    """
    other_manifest = read_manifest(folder)
    for role, sha256 in manifest.model.sources.items():
        if other_manifest.model.sources.get(role) != sha256:
            raise RequestError(
                f"--against {folder}, which was built from another {role}",
                allowed=f"a directory of the {role} whose sha256 is {sha256[:12]}…",
                remedy="build it from the same checkpoints",
            )
    batch, other_batch = (m.max_batch if m.static_batch else None for m in (manifest, other_manifest))
    if batch != other_batch:
        raise RequestError(
            f"--against {folder}, whose engines take {_format_batch(other_batch)}",
            allowed=f"a directory whose engines take {_format_batch(batch)}, as these do",
            remedy="export both with or without --static-batch, and with one --max-batch",
        )
    for resolution in manifest.resolutions:
        record = other_manifest.find_engine("predictor", resolution, target)
        other_precision = "no" if record is None else record.precision
        if other_precision in ("no", *QUANTISED_PRECISIONS):
            raise RequestError(
                f"--against {folder}, which has {other_precision} engines for {target} at {resolution} px",
                allowed="a directory with engines in fp16, bf16 or fp32 for the same target",
                remedy=f"build them on this device: flowturbo-export build-engines --from DIR --target {target}",
            )
    reference_manifest = replace(
        other_manifest, defaults=manifest.defaults, samplers=manifest.samplers, sampler_hashes=manifest.sampler_hashes
    )
    return ReferenceBuild(folder, reference_manifest, other_precision)


def _format_batch(batch: int | None) -> str:
    return "any number of images up to max-batch" if batch is None else f"exactly {batch} images"
