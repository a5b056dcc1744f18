"""Proof that engines compute what the PyTorch model computes: compare with `proof.npz`, which a build wrote.

Runs on the base install and a backend. Every graph gets fixed inputs, then a whole trajectory runs and is decoded.
The proof also holds the hashes of the ONNX files, so that rewriting the manifest does not hide an altered weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.targets import QUANTISED_PRECISIONS, resolve_graph_precision
from runtime.backends import BackendChoice, choose_backend
from runtime.backends.base import Backend, BackendOptions
from runtime.directory.manifest import PROOF_FILE, check_file
from runtime.directory.records import GPU_TARGETS, EngineRecord, Manifest, ProofRecord, format_rebuild_hint
from runtime.pipeline import Pipeline, build_engine_file
from runtime.system.errors import BackendError, EngineError, FlowTurboError, NonFiniteError, ProofError

Array = NDArray[Any]
Proof = Mapping[str, Array]

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-2, "int8": 0.2, "int8-weights": 0.1, "int4-weights": 0.5}
"""Quantised networks are really judged by their gate, on many pictures: here only what is broken fails."""
VAE_TOLERANCES = {"fp32": 1e-4, "fp16": 5e-2, "bf16": 5e-2}
"""A 16-bit decoder is really judged by its picture, which must reach `MIN_PSNR_DB`."""
MIN_PSNR_DB = 30.0
QUANTISED_PSNR_DB = 15.0
NOT_EXECUTED = "not executed"
"""In a record's `by`: the device is missing, and the ONNX file was proved in the engine's place."""

Say = Callable[[str], None]


def read_proof(folder: Path, manifest: Manifest) -> Proof:
    """The proof's arrays, after its own hash was checked."""
    path = check_file(folder, manifest.find_file(PROOF_FILE))
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def check_hashes(folder: Path, manifest: Manifest) -> None:
    """Every file against the manifest, every ONNX file against the proof as well.

    Raises:
        EngineError: a file is missing or altered.
        ProofError: the manifest was rewritten to fit an altered file.
    """
    for record in manifest.files:
        check_file(folder, record)
    proved_hashes = json.loads(str(read_proof(folder, manifest)["hashes"]))
    for path, sha256 in proved_hashes.items():
        if manifest.find_file(path).sha256 != sha256:
            raise ProofError(
                f"{path} is not the file that was proved: the manifest was rewritten after the build",
                remedy=format_rebuild_hint(folder),
            )


def prove_target(
    folder: Path, manifest: Manifest, target: str, say: Say = lambda text: None, allow_foreign: bool = False
) -> list[ProofRecord]:
    """Runs one target's engines against the proof; raises at the first that misses its tolerance.

    An engine that needs a GPU which is not here is proved by its ONNX file on ONNX Runtime, and the record says so.

    Raises:
        ProofError: naming graph and tensor.
        BackendError: neither the target nor a stand-in can run here.
    """
    proof = read_proof(folder, manifest)
    runnable_manifest, choice, runner = choose_runner(manifest, target, BackendOptions(allow_foreign=allow_foreign))
    records: list[ProofRecord] = []
    for resolution in manifest.resolutions:
        records += _prove_graphs(folder, runnable_manifest, choice, runner, resolution, target, proof, say)
        say(f"proving {resolution} px: trajectory")
        records += _prove_trajectory(folder, runnable_manifest, choice, runner, resolution, target, proof)
    for tile in runnable_manifest.list_tiles(choice.target):
        records += _prove_graphs(folder, runnable_manifest, choice, runner, tile, target, proof, say)
    return records


def choose_runner(manifest: Manifest, target: str, options: BackendOptions) -> tuple[Manifest, BackendChoice, str]:
    """What runs a target's proof: the manifest to run, a backend, and its name for the record."""
    target_manifest = replace(manifest, engines=tuple(e for e in manifest.engines if e.target == target))
    try:
        choice = choose_backend(target_manifest, None, options)
    except BackendError:
        if target not in ("cuda", *GPU_TARGETS):
            raise
        return _choose_stand_in(target_manifest, target)
    return (
        target_manifest,
        choice,
        choice.backend if choice.backend != "onnxruntime" else f"onnxruntime {choice.target}",
    )


def _choose_stand_in(manifest: Manifest, target: str) -> tuple[Manifest, BackendChoice, str]:
    """The same ONNX files on ONNX Runtime's CPU provider, where the device is missing."""
    precision = next(e.precision for e in manifest.engines if e.graph == "predictor")
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
    return replace(manifest, engines=engines), choice, f"the ONNX file, onnxruntime cpu ({target} {NOT_EXECUTED})"


def _prove_graphs(
    folder: Path,
    manifest: Manifest,
    choice: BackendChoice,
    runner: str,
    resolution: int,
    target: str,
    proof: Proof,
    say: Say,
) -> Iterator[ProofRecord]:
    backend = choice.open()
    try:
        for record in manifest.engines:
            if record.resolution != resolution:
                continue
            say(f"proving {resolution} px: {record.graph}")
            yield _prove_graph(folder, manifest, backend, runner, record, target, proof)
    finally:
        backend.close()


def _prove_graph(
    folder: Path, manifest: Manifest, backend: Backend, runner: str, record: EngineRecord, target: str, proof: Proof
) -> ProofRecord:
    prefix = f"{record.resolution}/{record.graph}"
    spec = manifest.build_spec(record.graph, record.resolution)
    try:
        engine = backend.load(build_engine_file(folder, manifest, record))
        try:
            inputs = {name: proof[f"{prefix}/in/{name}"] for name in spec.inputs}
            outputs = _run_engine(
                backend, engine, inputs, {name: proof[f"{prefix}/out/{name}"] for name in spec.outputs}
            )
        finally:
            engine.close()
    except EngineError as error:
        raise ProofError(f"{prefix} does not run: {error}", remedy=format_rebuild_hint(folder)) from error
    expected = {name: proof[f"{prefix}/out/{name}"] for name in spec.outputs}
    unguided = record.precision != "fp32" and record.graph in ("predictor", "refiner")
    errors = {
        name: measure_relative_error(outputs[name], expected[name], record.precision, unguided) for name in spec.outputs
    }
    worst = max(errors, key=lambda name: errors[name] if np.isfinite(errors[name]) else np.inf)
    tolerance = (VAE_TOLERANCES if record.graph.startswith(("decoder", "head", "tile", "encoder")) else TOLERANCES)[
        record.precision
    ]
    if not errors[worst] <= tolerance:
        raise ProofError(
            f"{record.graph} at {record.resolution} px in {record.precision} on {runner}: output {worst!r} is off by "
            f"{errors[worst]:.2e} relative to PyTorch float32",
            allowed=f"{tolerance:g}",
            remedy="build in a wider precision (--precision bf16 or fp32)",
        )
    return ProofRecord(
        record.graph, record.resolution, target, record.precision, runner, worst, errors[worst], tolerance
    )


def _run_engine(
    backend: Backend, engine: Any, inputs: Mapping[str, Array], expected: Mapping[str, Array]
) -> dict[str, Array]:
    input_buffers, output_buffers = {}, {}
    for name, array in inputs.items():
        input_buffers[name] = backend.allocate(array.shape, array.dtype)
        input_buffers[name].upload(np.ascontiguousarray(array))
    for name, array in expected.items():
        output_buffers[name] = backend.allocate(array.shape, array.dtype)
    engine.run(input_buffers, output_buffers)
    return {name: buffer.numpy() for name, buffer in output_buffers.items()}


def measure_relative_error(actual: Array, expected: Array, precision: str, unguided: bool = False) -> float:
    """How far two tensors are apart.

    In fp32 the largest difference over the largest value. In 16 bit, where rounding is everywhere, the root mean
    square of the difference over that of the values; and of the first image alone if `unguided`, which the proof's
    inputs leave without guidance: guidance multiplies rounding errors.
    """
    if unguided:
        actual, expected = actual[:1], expected[:1]
    difference = np.abs(actual.astype(np.float64) - expected)
    if precision == "fp32":
        return float(difference.max() / max(np.abs(expected).max(), 1e-30))
    return float(np.sqrt(np.mean(difference**2)) / max(np.sqrt(np.mean(expected.astype(np.float64) ** 2)), 1e-30))


def measure_psnr_db(actual: Array, expected: Array) -> float:
    """Peak signal to noise of pictures in [0, 1]; 120 dB for equal ones."""
    error = float(np.mean((actual.astype(np.float64) - expected) ** 2))
    return 120.0 if error < 1e-12 else float(-10 * np.log10(error))


def _prove_trajectory(
    folder: Path, manifest: Manifest, choice: BackendChoice, runner: str, resolution: int, target: str, proof: Proof
) -> Iterator[ProofRecord]:
    prefix = f"{resolution}/trajectory"
    settings = json.loads(str(proof[f"{prefix}/settings"]))
    with Pipeline(folder, manifest, resolution, choice, None) as pipeline:
        precision = pipeline.precision
        request = pipeline.request(
            settings["labels"],
            guidance=settings["scales"],
            guidance_channels=settings["guidance_channels"],
            seeds=[0] * len(settings["labels"]),
            **settings["sampler"],
        )
        try:
            result = pipeline.run(replace(request, vae=None), noise=proof[f"{prefix}/noise"])
            expected = proof[f"{prefix}/latents"]
            error = measure_relative_error(result.latents, expected, precision, unguided=precision != "fp32")
            # In 16 bit the trajectory is judged by its picture; the latents' error is recorded.
            tolerance = TOLERANCES[precision] * (10 if precision != "fp32" and manifest.vaes else 1)
            _check_tolerance(
                f"the trajectory at {resolution} px on {runner} is off by {error:.2e}",
                error <= tolerance,
                f"{tolerance:g}",
            )
            yield ProofRecord("trajectory", resolution, target, precision, runner, "latents", error, tolerance)
            for variant in manifest.vaes:
                yield _prove_picture(pipeline, result.latents, proof, prefix, variant, resolution, target, runner)
        except NonFiniteError as error:
            raise ProofError(f"the proof's trajectory at {resolution} px on {runner}: {error}") from error


def _prove_picture(
    pipeline: Pipeline,
    latents: Array,
    proof: Proof,
    prefix: str,
    variant: str,
    resolution: int,
    target: str,
    runner: str,
) -> ProofRecord:
    expected = proof[f"{prefix}/images-{variant}"]
    pictures = pipeline.decode(latents, variant).transpose(0, 3, 1, 2) / 255.0
    compared_images = slice(None) if pipeline.precision == "fp32" else slice(1)  # in 16 bit, the unguided image
    min_psnr_db = QUANTISED_PSNR_DB if pipeline.precision in QUANTISED_PRECISIONS else MIN_PSNR_DB
    db = measure_psnr_db(pictures[compared_images], expected[compared_images])
    error = measure_relative_error(pictures[compared_images], expected[compared_images], "fp16")
    _check_tolerance(
        f"the picture of VAE {variant} at {resolution} px on {runner} has {db:.1f} dB against PyTorch float32",
        db >= min_psnr_db,
        f"at least {min_psnr_db:g} dB",
    )
    return ProofRecord(
        f"image-{variant}", resolution, target, pipeline.precision, runner, "images", error, min_psnr_db, round(db, 1)
    )


def _check_tolerance(message: str, is_within: bool, allowed: str) -> None:
    if not is_within:
        raise ProofError(message, allowed=allowed, remedy="build in a wider precision, --precision bf16 or fp32")


def verify_directory(
    folder: Path, manifest: Manifest, say: Say = lambda text: None, allow_foreign: bool = False
) -> tuple[list[ProofRecord], list[str]]:
    """Re-proves a directory: hashes, then every target that can run here.

    Returns:
        The records, and a line for every target that could not be run here.
    """
    check_hashes(folder, manifest)
    records: list[ProofRecord] = []
    skipped: list[str] = []
    for target in manifest.list_targets():
        try:
            records += prove_target(folder, manifest, target, say, allow_foreign)
        except BackendError as error:
            skipped.append(f"{target}: not executed here ({error.given})")
    if not records:
        raise BackendError(
            f"nothing of {folder} could be run here: " + "; ".join(skipped),
            remedy="`flowturbo-export doctor` shows what to install",
        )
    return records, skipped


__all__ = [
    "FlowTurboError",
    "check_hashes",
    "measure_psnr_db",
    "measure_relative_error",
    "prove_target",
    "read_proof",
    "verify_directory",
]
