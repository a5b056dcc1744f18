"""Read, check and write the manifest of an engine directory, which is the only way in.

What it does not name is not trusted, and what does not match is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from runtime.directory.records import FileRecord, Manifest, ProofRecord, format_rebuild_hint
from runtime.sampling.calibrated import CalibratedSampler, check_calibrated_sampler
from runtime.system.errors import EngineError
from runtime.system.files import compute_sha256, read_json, write_json
from runtime.system.json_codec import parse_versioned, to_json

MANIFEST_SCHEMA = 6
"""2 added saved samplers, 3 quantised engines and their gates, 4 activation memory of graphs and the int8 share of
gates, 5 int8 weights whose sums of pairs fit 16 bits, 6 the readable names of the engine contract. Older
directories are read as well."""
MANIFEST_FILE = "manifest.json"
PROOF_FILE = "proof.npz"
MAX_CHANNELS, MAX_FACTOR, MAX_BATCH, MAX_RESOLUTION, MAX_LABEL = 1024, 256, 65536, 65536, 10**8
"""Above what any network has, and low enough that no number of a manifest alone fills the memory."""
MAX_RECORDS, MAX_NOTE = 10_000, 10_000


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
    backup = folder.with_name(f".{folder.name}.old") if folder.name else folder
    if not folder.is_dir() and (backup / MANIFEST_FILE).is_file():
        raise EngineError(
            f"no engine directory at {folder}: a build was stopped while it replaced it",
            remedy=f"put the former one back: mv {backup} {folder}; or repeat the build, which does so itself",
        )
    if not folder.is_dir():
        raise EngineError(
            f"no engine directory at {folder}", remedy=f"build it: flowturbo-export build-engines --out {folder}"
        )
    try:
        data = read_json(path)
    except FileNotFoundError as error:
        raise EngineError(
            f"{folder} has no {MANIFEST_FILE}, so it is not a finished engine directory",
            remedy=format_rebuild_hint(folder),
        ) from error
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} is damaged: {error}", remedy=format_rebuild_hint(folder)) from error
    remedy = format_rebuild_hint(folder)
    manifest = parse_versioned(
        data, Manifest, MANIFEST_SCHEMA, where=str(path), name="manifest", remedy=remedy, error_type=EngineError
    )
    for record in manifest.files:
        if problem := find_path_problem(record.path):
            raise EngineError(
                f"the manifest of {folder} names {record.path!r}, {problem}",
                allowed="relative names inside the directory",
                remedy=remedy,
            )
    _check_consistency(folder, manifest)
    return manifest


def find_path_problem(path: str) -> str:
    """Return why a manifest may not name a file so; empty if it may.

    Names are judged by their text. Links that lie in the directory are followed wherever they lead: the Hugging Face
    cache is made of such links. What a link leads to must have the size and the hash of the manifest.
    """
    parts = PurePosixPath(path).parts
    if path.startswith(("/", "\\", "~")) or ".." in parts or ".." in path.split("\\") or path[1:2] == ":":
        return "a file outside it"
    try:
        encoded = [os.fsencode(part) for part in parts]
        path.encode()
    except UnicodeEncodeError:
        return "which is no text"
    if not parts or "\0" in path or any(len(part) > 255 for part in encoded) or len(path) > 1024:
        return "which no file can have as its name"
    return ""


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
        if path.is_symlink():
            raise EngineError(
                f"{path} is a link to a file that is missing: {os.readlink(path)}",
                remedy=f"copy the directory again, or {format_rebuild_hint(folder)}",
            )
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
    if len(manifest.files) + len(manifest.engines) + len(manifest.graphs) + len(manifest.proofs) > MAX_RECORDS:
        raise EngineError(
            f"{folder / MANIFEST_FILE} has more than {MAX_RECORDS} records", remedy=format_rebuild_hint(folder)
        )
    listed_paths = {file.path for file in manifest.files}
    used_paths = [e.path for e in manifest.engines] + [
        path for g in manifest.graphs for path in (g.path, g.data) if path
    ]
    problems = [
        (not manifest.resolutions, "names no resolution"),
        (not manifest.engines, "names no engine"),
        (not manifest.model.classes, "knows no class"),
        (manifest.schema < 1, f"has schema {manifest.schema}"),
        (not 1 <= manifest.max_batch <= MAX_BATCH, f"has max_batch {manifest.max_batch}"),
        (not 1 <= manifest.model.factor <= MAX_FACTOR, f"has {manifest.model.factor} pixels per latent"),
        (not 1 <= manifest.model.channels <= MAX_CHANNELS, f"has {manifest.model.channels} latent channels"),
        (
            any(not manifest.model.factor <= side <= MAX_RESOLUTION for side in manifest.resolutions),
            f"has the resolutions {', '.join(map(str, manifest.resolutions[:4]))}",
        ),
        (len(set(manifest.resolutions)) < len(manifest.resolutions), "names a resolution twice"),
        ("predictor" not in manifest.model.modulations, "gives no modulations for the predictor"),
        (any(count < 1 for count in manifest.model.modulations.values()), "gives a network no modulations"),
        (manifest.model.null_label > MAX_LABEL, f"has the null label {manifest.model.null_label}"),
        (min(manifest.model.classes, default=0) < 0, "knows classes below 0"),
        (max(manifest.model.classes, default=0) > manifest.model.null_label, "knows classes beyond its null label"),
        (any(len(note) > MAX_NOTE for note in manifest.notes), f"has a note of more than {MAX_NOTE} characters"),
        (
            bool(set(used_paths) - listed_paths),
            f"gives no hash for {', '.join(sorted(set(used_paths) - listed_paths)[:3])}",
        ),
        (
            manifest.defaults.vae is not None and manifest.defaults.vae not in manifest.vaes,
            "has an unknown default VAE",
        ),
    ]
    problems += [(True, problem) for problem in _list_precision_problems(manifest)]
    problems += [
        (
            not _is_within_tolerance(proof),
            f"has a proof of {proof.what} in {proof.precision} that misses its own tolerance",
        )
        for proof in manifest.proofs
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


def _list_precision_problems(manifest: Manifest) -> list[str]:
    """Say which engines claim another precision than the ONNX file that they are: `verify` would be lenient there."""
    graphs_by_path = {graph.path: graph for graph in manifest.graphs}
    problems = []
    for engine in manifest.engines:
        graph = graphs_by_path.get(engine.path)
        if graph is None:
            continue
        precision = graph.computes or graph.precision.removesuffix("-fp16")
        # OpenVINO runs an fp32 file in bf16 arithmetic.
        if engine.precision != precision and (engine.target, engine.precision, precision) != (
            "openvino", "bf16", "fp32"
        ):  # fmt: skip
            problems.append(f"calls {engine.path} {engine.precision}, and its graph {precision}")
    return problems


def _is_within_tolerance(proof: ProofRecord) -> bool:
    """Return whether a comparison is within its tolerance."""
    if proof.psnr_db is not None:
        return proof.psnr_db >= proof.tolerance
    return math.isfinite(proof.relative_error) and proof.relative_error <= proof.tolerance


def merge_samplers(manifest: Manifest, samplers: Sequence[CalibratedSampler]) -> Manifest:
    """Return the manifest with these samplers added; one with the name of an older one replaces it."""
    samplers_by_name = {sampler.name: sampler for sampler in (*manifest.samplers, *samplers)}
    return replace(
        manifest,
        schema=MANIFEST_SCHEMA,
        samplers=tuple(samplers_by_name.values()),
        sampler_hashes={n: s.sha256 for n, s in samplers_by_name.items()},
    )
