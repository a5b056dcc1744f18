"""Read, check and write the manifest of an engine directory, which is the only way in.

What it does not name is not trusted, and what does not match is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runtime.directory.records import FileRecord, Manifest, format_rebuild_hint
from runtime.sampling.calibrated import CalibratedSampler, check_calibrated_sampler
from runtime.system.errors import EngineError
from runtime.system.files import compute_sha256, write_json
from runtime.system.json_codec import parse_versioned, to_json

MANIFEST_SCHEMA = 6
"""2 added saved samplers, 3 quantised engines and their gates, 4 activation memory of graphs and the int8 share of
gates, 5 int8 weights whose sums of pairs fit 16 bits, 6 the readable names of the engine contract. Older
directories are read as well."""
MANIFEST_FILE = "manifest.json"
PROOF_FILE = "proof.npz"


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises:
        EngineError: no directory, no or a damaged manifest, or one of a newer version of this package.
    """
    path = folder / MANIFEST_FILE
    if folder.is_file():
        raise EngineError(
            f"{folder} is a file, no engine directory",
            remedy="name the folder that flowturbo-export build-engines made",
        )
    if not folder.is_dir():
        raise EngineError(
            f"no engine directory at {folder}", remedy=f"build it: flowturbo-export build-engines --out {folder}"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EngineError(
            f"{folder} has no {MANIFEST_FILE}, so it is not a finished engine directory",
            remedy=format_rebuild_hint(folder),
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EngineError(f"{path} is damaged: {error}", remedy=format_rebuild_hint(folder)) from error
    remedy = format_rebuild_hint(folder)
    manifest = parse_versioned(
        data, Manifest, MANIFEST_SCHEMA, where=str(path), name="manifest", remedy=remedy, error_type=EngineError
    )
    root = folder.resolve()
    for record in manifest.files:
        if not (folder / record.path).resolve().is_relative_to(root):
            raise EngineError(f"the manifest of {folder} names a file outside it: {record.path}", remedy=remedy)
    _check_consistency(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest; the last step of a build."""
    write_json(folder / MANIFEST_FILE, to_json(manifest))


def check_file(folder: Path, record: FileRecord, *, check_hash: bool = True) -> Path:
    """Return the path of a file, if it is what the manifest says.

    Raises:
        EngineError: missing, of another size, or with other contents.
    """
    path = folder / record.path
    if not path.is_file():
        raise EngineError(f"{path} is missing", remedy=format_rebuild_hint(folder))
    size = path.stat().st_size
    if size != record.bytes:
        raise EngineError(
            f"{path} has {size} bytes, the manifest says {record.bytes}", remedy=format_rebuild_hint(folder)
        )
    if check_hash and compute_sha256(path) != record.sha256:
        raise EngineError(
            f"{path} was altered or damaged: its sha256 is not the manifest's",
            remedy=f"copy the directory again, or {format_rebuild_hint(folder)}",
        )
    return path


def _check_consistency(folder: Path, manifest: Manifest) -> None:
    """Check that the parts of a manifest fit together; one that was edited by hand may not."""
    listed_paths = {file.path for file in manifest.files}
    used_paths = [e.path for e in manifest.engines] + [
        path for g in manifest.graphs for path in (g.path, g.data) if path
    ]
    problems = [
        (not manifest.resolutions, "names no resolution"),
        (not manifest.engines, "names no engine"),
        (not manifest.model.classes, "knows no class"),
        (manifest.max_batch < 1, f"has max_batch {manifest.max_batch}"),
        (manifest.model.factor < 1, f"has {manifest.model.factor} pixels per latent"),
        ("predictor" not in manifest.model.modulations, "gives no modulations for the predictor"),
        (max(manifest.model.classes, default=0) > manifest.model.null_label, "knows classes beyond its null label"),
        (
            bool(set(used_paths) - listed_paths),
            f"gives no hash for {', '.join(sorted(set(used_paths) - listed_paths)[:3])}",
        ),
        (
            manifest.defaults.vae is not None and manifest.defaults.vae not in manifest.vaes,
            "has an unknown default VAE",
        ),
    ]
    for is_broken, problem in problems:
        if is_broken:
            raise EngineError(f"{folder / MANIFEST_FILE} is damaged: it {problem}", remedy=format_rebuild_hint(folder))
    for sampler in manifest.samplers:
        if manifest.sampler_hashes.get(sampler.name) != sampler.sha256:
            raise EngineError(
                f"{folder / MANIFEST_FILE} is damaged: the sampler {sampler.name} is not the one that was saved",
                remedy="save it again: flowturbo-export add-sampler",
            )
        check_calibrated_sampler(sampler, f"the sampler {sampler.name} of {folder}")


def merge_samplers(manifest: Manifest, samplers: Sequence[CalibratedSampler]) -> Manifest:
    """Return the manifest with these samplers added; one with the name of an older one replaces it."""
    samplers_by_name = {sampler.name: sampler for sampler in (*manifest.samplers, *samplers)}
    return replace(
        manifest,
        schema=MANIFEST_SCHEMA,
        samplers=tuple(samplers_by_name.values()),
        sampler_hashes={n: s.sha256 for n, s in samplers_by_name.items()},
    )
