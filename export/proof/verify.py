"""Prove that engines compute what the PyTorch model computes: compare them with `proof.npz`, which a build wrote.

This runs on the base install and a backend. Every graph gets fixed inputs, then a whole trajectory runs and is decoded.
The proof also holds the hashes of the ONNX files, so that rewriting the manifest does not hide an altered weight.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.targets import QUANTISED_PRECISIONS, resolve_graph_precision
from runtime.backends import BackendChoice, choose_backend
from runtime.backends.base import Backend, BackendOptions
from runtime.directory.contract import rename_former
from runtime.directory.manifest import PROOF_FILE, check_file
from runtime.directory.onnx_reader import check_onnx_file
from runtime.directory.records import GPU_TARGETS, EngineRecord, Manifest, ProofRecord, format_rebuild_hint
from runtime.pipeline import Pipeline, build_engine_file
from runtime.system.array_store import read_npz
from runtime.system.errors import BackendError, EngineError, NonFiniteError, ProofError
from runtime.system.files import parse_json
from runtime.system.progress import SILENT, Progress

Array = NDArray[Any]

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-2, "int8": 0.2, "int8-weights": 0.1, "int4-weights": 0.5}
"""The gate measures quantised networks, on many pictures: here only a broken one fails."""
VAE_TOLERANCES = {"fp32": 1e-4, "fp16": 5e-2, "bf16": 5e-2}
"""What counts for a 16-bit decoder is its picture, which must reach `MIN_PSNR_DB`."""
MIN_PSNR_DB = 30.0
QUANTISED_PSNR_DB = 15.0
MAX_PROOF_BYTES = 1 << 30
"""Unpacked; a proof of three resolutions up to 1024 px has a twentieth of it."""
NOT_EXECUTED = "not executed"
"""In a record's `by`: the device is missing, and the ONNX file was proved in the engine's place."""


def read_proof(folder: Path, manifest: Manifest) -> _ProofArrays:
    """Return the proof's arrays, after a check of the file's own hash."""
    path = check_file(folder, manifest.find_file(PROOF_FILE))
    try:
        arrays = read_npz(path, MAX_PROOF_BYTES)
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read: {error}", remedy=format_rebuild_hint(folder)) from error
    return _ProofArrays(folder, {_rename_former_tensor(name): array for name, array in arrays.items()})


class _ProofArrays(UserDict[str, Array]):
    """The arrays of a proof by name; one that is missing is an error of the directory."""

    def __init__(self, folder: Path, arrays: Mapping[str, Array]) -> None:
        super().__init__(arrays)
        self._folder = folder

    def __missing__(self, name: str) -> Array:
        raise EngineError(f"{self._folder / PROOF_FILE} has no array {name}", remedy=format_rebuild_hint(self._folder))

    def read_json(self, name: str) -> dict[str, Any]:
        """Return an array of text as the JSON object that it is."""
        try:
            data = parse_json(str(self[name]))
        except ValueError as error:
            data, reason = None, f": {error}"
        else:
            reason = ""
        if not isinstance(data, dict):
            raise EngineError(
                f"{name} of {self._folder / PROOF_FILE} is no JSON object{reason}",
                remedy=format_rebuild_hint(self._folder),
            )
        return data


def _rename_former_tensor(key: str) -> str:
    """Give a tensor of an older directory's proof ("…/in/pair") the name that the contract has for it today."""
    prefix, _, name = key.rpartition("/")
    return f"{prefix}/{rename_former(name)}" if prefix.endswith(("/in", "/out")) else key


def check_hashes(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest, and every ONNX file with the proof and with its record as well.

    Raises:
        EngineError: a file is missing or altered, or is not what its record says.
        ProofError: the manifest was rewritten to fit an altered file, or names one that was never proved.
    """
    for record in manifest.files:
        check_file(folder, record)
    proved_hashes = read_proof(folder, manifest).read_json("hashes")
    needed = {path for graph in manifest.graphs for path in (graph.path, graph.data) if path is not None}
    if missing := sorted(needed - set(proved_hashes)):
        raise ProofError(
            f"{missing[0]} is not among the files that were proved",
            allowed="files whose hashes are in the proof",
            remedy=format_rebuild_hint(folder),
        )
    for path, sha256 in proved_hashes.items():
        if manifest.find_file(path).sha256 != sha256:
            raise ProofError(
                f"{path} is not the file that was proved: the manifest was rewritten after the build",
                remedy=format_rebuild_hint(folder),
            )
    for graph in manifest.graphs:
        check_onnx_file(folder, graph)


def choose_runner(manifest: Manifest, target: str, options: BackendOptions) -> tuple[Manifest, BackendChoice, str]:
    """Choose what runs a target's engines.

    Where a GPU is missing, ONNX Runtime's CPU provider runs the same ONNX files in its place.

    Returns:
        The manifest to run, a backend, and the backend's name for records.

    Raises:
        BackendError: neither the target nor its stand-in can run here.
    """
    target_manifest = replace(manifest, engines=tuple(e for e in manifest.engines if e.target == target))
    try:
        choice = choose_backend(target_manifest, None, options)
    except BackendError:
        if target not in ("cuda", *GPU_TARGETS):
            raise
    else:
        runner = choice.backend if choice.backend != "onnxruntime" else f"onnxruntime {choice.target}"
        return target_manifest, choice, runner
    precision = next(e.precision for e in target_manifest.engines if e.graph == "predictor")
    if precision == "bf16":
        raise BackendError(
            f"{target} engines in bf16 cannot be proved without their device: no CPU provider runs bf16 files",
            remedy="verify them on the device",
        )
    engines = tuple(
        EngineRecord(g.graph, g.resolution, "cpu", g.computes or precision, g.path, executed=True)
        for g in manifest.graphs
        if g.precision == resolve_graph_precision(target, precision)
    )
    choice = BackendChoice("onnxruntime", "cpu", BackendOptions(provider="cpu"), f"no device for {target} here")
    runner = f"the ONNX file, onnxruntime cpu ({target} {NOT_EXECUTED})"
    return replace(target_manifest, engines=engines), choice, runner


class ProofRun:
    """Compare one target's engines with the proof.

    An engine whose GPU is missing is proved by its ONNX file on ONNX Runtime, and the records say so.

    Raises:
        EngineError: the proof is missing or altered.
        BackendError: neither the target nor a stand-in can run here.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        target: str,
        *,
        allow_foreign: bool = False,
        progress: Progress = SILENT,
    ) -> None:
        self._folder, self._target, self._progress = folder, target, progress
        self._proof = read_proof(folder, manifest)
        self._manifest, self._choice, self._runner = choose_runner(
            manifest, target, BackendOptions(allow_foreign=allow_foreign)
        )

    def prove(self) -> list[ProofRecord]:
        """Run every graph, and a trajectory per resolution.

        Raises:
            ProofError: at the first comparison that misses its tolerance, with graph and tensor.
        """
        records: list[ProofRecord] = []
        for resolution in self._manifest.resolutions:
            records += self._prove_graphs(resolution)
            self._progress.stage(f"proving {resolution} px: trajectory")
            records += self._prove_trajectory(resolution)
        for tile in self._manifest.list_tiles(self._choice.target):
            records += self._prove_graphs(tile)
        return records

    def _prove_graphs(self, resolution: int) -> Iterator[ProofRecord]:
        backend = self._choice.open()
        try:
            for record in self._manifest.engines:
                if record.resolution == resolution:
                    self._progress.stage(f"proving {resolution} px: {record.graph}")
                    yield self._prove_graph(backend, record)
        finally:
            backend.close()

    def _prove_graph(self, backend: Backend, record: EngineRecord) -> ProofRecord:
        prefix = f"{record.resolution}/{record.graph}"
        spec = self._manifest.build_spec(record.graph, record.resolution)
        inputs, outputs = {}, {}
        try:
            engine = backend.load(build_engine_file(self._folder, self._manifest, record))
            try:
                for name in spec.inputs:
                    array = self._proof[f"{prefix}/in/{name}"]
                    inputs[name] = backend.allocate(array.shape, array.dtype)
                    inputs[name].upload(np.ascontiguousarray(array))
                expected = {name: self._proof[f"{prefix}/out/{name}"] for name in spec.outputs}
                outputs = {name: backend.allocate(array.shape, array.dtype) for name, array in expected.items()}
                engine.run(inputs, outputs)
                arrays = {name: buffer.numpy() for name, buffer in outputs.items()}
            finally:
                engine.close()
        except EngineError as error:
            raise ProofError(f"{prefix} does not run: {error}", remedy=format_rebuild_hint(self._folder)) from error
        unguided = record.precision != "fp32" and record.graph in ("predictor", "refiner")
        errors = {
            name: measure_relative_error(arrays[name], expected[name], record.precision, unguided)
            for name in spec.outputs
        }
        worst = max(errors, key=lambda name: errors[name] if np.isfinite(errors[name]) else np.inf)
        is_vae = record.graph.startswith(("decoder", "head", "tile", "encoder"))
        tolerance = (VAE_TOLERANCES if is_vae else TOLERANCES)[record.precision]
        if not errors[worst] <= tolerance:
            raise ProofError(
                f"{record.graph} at {record.resolution} px in {record.precision} on {self._runner}: output {worst!r} "
                f"is off by {errors[worst]:.2e} relative to PyTorch float32",
                allowed=f"{tolerance:g}",
                remedy="build in a wider precision (--precision bf16 or fp32)",
            )
        where = (record.resolution, self._target, record.precision, self._runner)
        return ProofRecord(record.graph, *where, worst, errors[worst], tolerance)

    def _prove_trajectory(self, resolution: int) -> Iterator[ProofRecord]:
        """Compare the latents, then each decoder's picture; in 16 bit, those of the unguided image alone."""
        proof = {name: self._proof[f"{resolution}/trajectory/{name}"] for name in ("noise", "latents")}
        settings = self._proof.read_json(f"{resolution}/trajectory/settings")
        with Pipeline(self._folder, self._manifest, resolution, self._choice, None) as pipeline:
            precision = pipeline.precision
            request = pipeline.request(
                settings["labels"],
                guidance=settings["scales"],
                guidance_channels=settings["guidance_channels"],
                seeds=[0] * len(settings["labels"]),
                **settings["sampler"],
            )

            def check(message: str, is_within: bool, allowed: str) -> None:
                if not is_within:
                    raise ProofError(
                        message, allowed=allowed, remedy="build in a wider precision, --precision bf16 or fp32"
                    )

            try:
                latents = pipeline.run(replace(request, vae=None), noise=proof["noise"]).latents
                error = measure_relative_error(latents, proof["latents"], precision, unguided=precision != "fp32")
                # In 16 bit the picture decides; the latents' error is recorded.
                tolerance = TOLERANCES[precision] * (10 if precision != "fp32" and self._manifest.vaes else 1)
                check(
                    f"the trajectory at {resolution} px on {self._runner} is off by {error:.2e}",
                    error <= tolerance,
                    f"{tolerance:g}",
                )
                where = (resolution, self._target, precision, self._runner)
                yield ProofRecord("trajectory", *where, "latents", error, tolerance)
                compared_images = slice(None) if precision == "fp32" else slice(1)
                min_psnr_db = QUANTISED_PSNR_DB if precision in QUANTISED_PRECISIONS else MIN_PSNR_DB
                for variant in self._manifest.vaes:
                    expected = self._proof[f"{resolution}/trajectory/images-{variant}"][compared_images]
                    pictures = pipeline.decode(latents, variant).transpose(0, 3, 1, 2)[compared_images] / 255.0
                    db = measure_psnr_db(pictures, expected)
                    check(
                        f"the picture of VAE {variant} at {resolution} px on {self._runner} has {db:.1f} dB against "
                        "PyTorch float32",
                        db >= min_psnr_db,
                        f"at least {min_psnr_db:g} dB",
                    )
                    error = measure_relative_error(pictures, expected, "fp16")
                    yield ProofRecord(f"image-{variant}", *where, "images", error, min_psnr_db, round(db, 1))
            except NonFiniteError as failure:
                raise ProofError(f"the proof's trajectory at {resolution} px on {self._runner}: {failure}") from failure


def measure_relative_error(actual: Array, expected: Array, precision: str, unguided: bool = False) -> float:
    """Measure how far two tensors are apart.

    In fp32 this is the largest difference over the largest value. In 16 bit, where rounding is everywhere, it is the
    root mean square of the difference over that of the values. With `unguided` only the first image counts, which the
    proof's inputs leave without guidance: guidance multiplies rounding errors.
    """
    if unguided:
        actual, expected = actual[:1], expected[:1]
    difference = np.abs(actual.astype(np.float64) - expected)
    if precision == "fp32":
        return float(difference.max() / max(np.abs(expected).max(), 1e-30))
    return float(np.sqrt(np.mean(difference**2)) / max(np.sqrt(np.mean(expected.astype(np.float64) ** 2)), 1e-30))


def measure_psnr_db(actual: Array, expected: Array) -> float:
    """Measure the peak signal to noise ratio of pictures in [0, 1], in dB; 120 for equal ones."""
    error = float(np.mean((actual.astype(np.float64) - expected) ** 2))
    return 120.0 if error < 1e-12 else float(-10 * np.log10(error))


def verify_directory(
    folder: Path, manifest: Manifest, progress: Progress = SILENT, allow_foreign: bool = False
) -> tuple[list[ProofRecord], list[str]]:
    """Prove a directory again: its hashes, then every target that can run here.

    Returns:
        The records, and a line for every target that could not be run here.

    Raises:
        EngineError: a file is missing or altered.
        ProofError: something misses its tolerance.
        BackendError: nothing in the directory can run here.
    """
    check_hashes(folder, manifest)
    records: list[ProofRecord] = []
    skipped: list[str] = []
    for target in manifest.list_targets():
        try:
            records += ProofRun(folder, manifest, target, allow_foreign=allow_foreign, progress=progress).prove()
        except BackendError as error:
            skipped.append(f"{target}: not executed here ({error.given})")
    if not records:
        raise BackendError(
            f"nothing of {folder} could be run here: " + "; ".join(skipped),
            remedy="`flowturbo-export doctor` shows what to install",
        )
    return records, skipped
