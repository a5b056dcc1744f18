"""An engine directory as the source of a build: what a Jetson builds from, with neither torch nor checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from export.build_request import hash_inputs
from export.proof.reference_build import ReferenceBuild, read_reference
from export.targets import resolve_graph_precision, select_quantised
from runtime.directory.manifest import check_file, read_manifest
from runtime.directory.records import Manifest
from runtime.system.errors import RequestError


@dataclass(frozen=True)
class DirectorySource:
    """A directory whose ONNX files are compiled again.

    Attributes:
        folder: the directory.
        manifest: of the new directory before anything is compiled: with the engines that stay, and without the files
            of those that are built again.
        precisions: target → precision of the engines to build.
        references: target, its precision, and wider engines on this device to compare quantised ones with.
        allow_foreign: whether serialised engines that another device or release built stay, and are tried here.
        closing_notes: remarks for the end of the manifest's notes.
    """

    folder: Path
    manifest: Manifest
    precisions: dict[str, str]
    references: tuple[tuple[str, str, ReferenceBuild], ...]
    allow_foreign: bool
    closing_notes: tuple[str, ...]

    @property
    def inputs(self) -> Mapping[str, str]:
        """What the build depends on, by name."""
        return self.manifest.inputs

    @property
    def key(self) -> str:
        """Hash of `inputs`."""
        return self.manifest.key

    @property
    def checkpoint_hashes(self) -> Mapping[str, str]:
        """sha256 of the checkpoints by role."""
        return self.manifest.model.sources

    def copy_files(self, folder: Path) -> Manifest:
        """Check and copy the files, by hard links where the file system allows: ONNX files are large."""
        for record in self.manifest.files:
            check_file(self.folder, record)
            target = folder / record.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                target.hardlink_to((self.folder / record.path).resolve())  # of a link: of what it leads to
            except OSError:
                shutil.copyfile(self.folder / record.path, target)
        return self.manifest


def open_directory(
    folder: Path, precisions: Mapping[str, str], *, allow_foreign: bool = False, against: Path | None = None
) -> DirectorySource:
    """Read a directory and check that the engines of `precisions` (by target) can be built from it.

    Args:
        allow_foreign: keep serialised engines that another device or release built, and try them here.
        against: directory of wider engines for this device, with which the gate compares quantised ones; without it a
            note says that they were not compared.

    Raises:
        EngineError: `folder` or `against` is no engine directory.
        RequestError: the directory holds no ONNX files in the precision a target needs, or `against` does not fit.
    """
    quantised = select_quantised(precisions)
    if against is not None and not quantised:
        raise RequestError(
            f"--against {against} with precision {', '.join(sorted(set(precisions.values())))}",
            allowed="--precision int8, int8-weights or int4-weights, which are compared",
            remedy="leave it out",
        )
    manifest = read_manifest(folder)
    available = sorted({graph.precision for graph in manifest.graphs})
    for target, precision in precisions.items():
        if resolve_graph_precision(target, precision) not in available:
            raise RequestError(
                f"{target} in {precision} needs ONNX files in {resolve_graph_precision(target, precision)}",
                allowed=f"{', '.join(available)}: what {folder} holds",
                remedy=f"--precision {available[0]}, or build with --precision {precision} where torch is",
            )
    references = (
        () if against is None else tuple((t, p, read_reference(against, manifest, t)) for t, p in quantised.items())
    )
    reused_engines = tuple(record for record in manifest.engines if allow_foreign or record.target not in precisions)
    merged = {r.target: r.precision for r in reused_engines if r.graph == "predictor"} | dict(precisions)
    inputs = {**manifest.inputs, "precisions": ",".join(f"{t}:{p}" for t, p in merged.items())}
    dropped_paths = {
        record.path for record in manifest.engines if record not in reused_engines and record.path.endswith(".engine")
    }
    ungated_notes = tuple(
        f"{target} {precision}: not compared with a wider build on this device: --against DIR does, if DIR holds one"
        for target, precision in quantised.items()
    )
    bare_manifest = replace(
        manifest,
        inputs=inputs,
        key=hash_inputs(inputs),
        engines=reused_engines,
        files=tuple(file for file in manifest.files if file.path not in dropped_paths),
        notes=tuple(note for note in manifest.notes if note not in ungated_notes),
    )
    closing_notes = () if references else ungated_notes
    return DirectorySource(folder, bare_manifest, dict(precisions), references, allow_foreign, closing_notes)
