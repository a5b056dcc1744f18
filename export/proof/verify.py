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

from export.targets import QUANTISED, graph_precision
from runtime.backends import Choice, choose_backend
from runtime.backends.base import Backend, BackendOptions
from runtime.directory.manifest import GPU_TARGETS, PROOF, EngineRecord, Manifest, ProofRecord, check_file, rebuild_hint
from runtime.pipeline import Pipeline, engine_file
from runtime.system.errors import BackendError, EngineError, FlowTurboError, NonFiniteError, ProofError

Array = NDArray[Any]
Proof = Mapping[str, Array]

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-2, "int8": 0.2, "int8-weights": 0.1, "int4-weights": 0.5}
"""Quantised networks are really judged by their gate, on many pictures: here only what is broken fails."""
VAE_TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2, "bf16": 5e-2}
"""A 16-bit decoder is really judged by its picture, which must reach `MIN_PSNR_DB`."""
MIN_PSNR_DB = 30.0
QUANTISED_PSNR_DB = 15.0
NOT_EXECUTED = "not executed"
"""In a record's `by`: the device is missing, and the ONNX file was proved in the engine's place."""

Say = Callable[[str], None]


def read_proof(folder: Path, manifest: Manifest) -> Proof:
    """The proof's arrays, after its own hash was checked."""
    path = check_file(folder, manifest.file(PROOF))
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
    proven = json.loads(str(read_proof(folder, manifest)["hashes"]))
    for path, sha256 in proven.items():
        if manifest.file(path).sha256 != sha256:
            raise ProofError(
                f"{path} is not the file that was proved: the manifest was rewritten after the build",
                remedy=rebuild_hint(folder),
            )


def prove(
    folder: Path, manifest: Manifest, target: str, say: Say = lambda text: None, allow_foreign: bool = False
) -> list[ProofRecord]:
    """Runs one target's engines against the proof; raises at the first that misses its tolerance.

    An engine that needs a GPU which is not here is proved by its ONNX file on ONNX Runtime, and the record says so.

    Raises:
        ProofError: naming graph and tensor.
        BackendError: neither the target nor a stand-in can run here.
    """
    proof = read_proof(folder, manifest)
    runnable, choice, by = runner_for(manifest, target, BackendOptions(allow_foreign=allow_foreign))
    records: list[ProofRecord] = []
    for resolution in manifest.resolutions:
        records += _prove_graphs(folder, runnable, choice, by, resolution, target, proof, say)
        say(f"proving {resolution} px: trajectory")
        records += _prove_trajectory(folder, runnable, choice, by, resolution, target, proof)
    for tile in runnable.tiles(choice.target):
        records += _prove_graphs(folder, runnable, choice, by, tile, target, proof, say)
    return records


def runner_for(manifest: Manifest, target: str, options: BackendOptions) -> tuple[Manifest, Choice, str]:
    """What runs a target's proof: the manifest to run, a backend, and its name for the record."""
    own = replace(manifest, engines=tuple(e for e in manifest.engines if e.target == target))
    try:
        choice = choose_backend(own, None, options)
    except BackendError:
        if target not in ("cuda", *GPU_TARGETS):
            raise
        return _stand_in(own, target)
    return own, choice, choice.backend if choice.backend != "onnxruntime" else f"onnxruntime {choice.target}"


def _stand_in(manifest: Manifest, target: str) -> tuple[Manifest, Choice, str]:
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
        if g.precision == graph_precision(target, precision)
    )
    choice = Choice("onnxruntime", "cpu", BackendOptions(provider="cpu"), f"no device for {target} here")
    return replace(manifest, engines=engines), choice, f"the ONNX file, onnxruntime cpu ({target} {NOT_EXECUTED})"


def _prove_graphs(
    folder: Path, manifest: Manifest, choice: Choice, by: str, resolution: int, target: str, proof: Proof, say: Say
) -> Iterator[ProofRecord]:
    backend = choice.open()
    try:
        for record in manifest.engines:
            if record.resolution != resolution:
                continue
            say(f"proving {resolution} px: {record.graph}")
            yield _prove_graph(folder, manifest, backend, by, record, target, proof)
    finally:
        backend.close()


def _prove_graph(
    folder: Path, manifest: Manifest, backend: Backend, by: str, record: EngineRecord, target: str, proof: Proof
) -> ProofRecord:
    prefix = f"{record.resolution}/{record.graph}"
    spec = manifest.spec(record.graph, record.resolution)
    try:
        engine = backend.load(engine_file(folder, manifest, record))
        try:
            inputs = {name: proof[f"{prefix}/in/{name}"] for name in spec.inputs}
            found = _run(backend, engine, inputs, {name: proof[f"{prefix}/out/{name}"] for name in spec.outputs})
        finally:
            engine.close()
    except EngineError as error:
        raise ProofError(f"{prefix} does not run: {error}", remedy=rebuild_hint(folder)) from error
    expected = {name: proof[f"{prefix}/out/{name}"] for name in spec.outputs}
    unguided = record.precision != "fp32" and record.graph in ("predictor", "refiner")
    errors = {name: relative_error(found[name], expected[name], record.precision, unguided) for name in spec.outputs}
    worst = max(errors, key=lambda name: errors[name] if np.isfinite(errors[name]) else np.inf)
    tolerance = (VAE_TOLERANCE if record.graph.startswith(("decoder", "head", "tile", "encoder")) else TOLERANCE)[
        record.precision
    ]
    if not errors[worst] <= tolerance:
        raise ProofError(
            f"{record.graph} at {record.resolution} px in {record.precision} on {by}: output {worst!r} is off by "
            f"{errors[worst]:.2e} relative to PyTorch float32",
            allowed=f"{tolerance:g}",
            remedy="build in a wider precision (--precision bf16 or fp32)",
        )
    return ProofRecord(record.graph, record.resolution, target, record.precision, by, worst, errors[worst], tolerance)


def _run(backend: Backend, engine: Any, inputs: Mapping[str, Array], like: Mapping[str, Array]) -> dict[str, Array]:
    sources, results = {}, {}
    for name, array in inputs.items():
        sources[name] = backend.buffer(array.shape, array.dtype)
        sources[name].upload(np.ascontiguousarray(array))
    for name, array in like.items():
        results[name] = backend.buffer(array.shape, array.dtype)
    engine.run(sources, results)
    return {name: buffer.numpy() for name, buffer in results.items()}


def relative_error(found: Array, expected: Array, precision: str, unguided: bool = False) -> float:
    """How far two tensors are apart.

    In fp32 the largest difference over the largest value. In 16 bit, where rounding is everywhere, the root mean
    square of the difference over that of the values; and of the first image alone if `unguided`, which the proof's
    inputs leave without guidance: guidance multiplies rounding errors.
    """
    if unguided:
        found, expected = found[:1], expected[:1]
    difference = np.abs(found.astype(np.float64) - expected)
    if precision == "fp32":
        return float(difference.max() / max(np.abs(expected).max(), 1e-30))
    return float(np.sqrt(np.mean(difference**2)) / max(np.sqrt(np.mean(expected.astype(np.float64) ** 2)), 1e-30))


def psnr_db(found: Array, expected: Array) -> float:
    """Peak signal to noise of pictures in [0, 1]; 120 dB for equal ones."""
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return 120.0 if error < 1e-12 else float(-10 * np.log10(error))


def _prove_trajectory(
    folder: Path, manifest: Manifest, choice: Choice, by: str, resolution: int, target: str, proof: Proof
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
            error = relative_error(result.latents, expected, precision, unguided=precision != "fp32")
            # In 16 bit the trajectory is judged by its picture; the latents' error is recorded.
            tolerance = TOLERANCE[precision] * (10 if precision != "fp32" and manifest.vaes else 1)
            _check(
                f"the trajectory at {resolution} px on {by} is off by {error:.2e}", error <= tolerance, f"{tolerance:g}"
            )
            yield ProofRecord("trajectory", resolution, target, precision, by, "latents", error, tolerance)
            for variant in manifest.vaes:
                yield _prove_picture(pipeline, result.latents, proof, prefix, variant, resolution, target, by)
        except NonFiniteError as error:
            raise ProofError(f"the proof's trajectory at {resolution} px on {by}: {error}") from error


def _prove_picture(
    pipeline: Pipeline, latents: Array, proof: Proof, prefix: str, variant: str, resolution: int, target: str, by: str
) -> ProofRecord:
    expected = proof[f"{prefix}/images-{variant}"]
    pictures = pipeline.decode(latents, variant).transpose(0, 3, 1, 2) / 255.0
    judged = slice(None) if pipeline.precision == "fp32" else slice(1)  # in 16 bit, the unguided image
    least = QUANTISED_PSNR_DB if pipeline.precision in QUANTISED else MIN_PSNR_DB
    db = psnr_db(pictures[judged], expected[judged])
    error = relative_error(pictures[judged], expected[judged], "fp16")
    _check(
        f"the picture of VAE {variant} at {resolution} px on {by} has {db:.1f} dB against PyTorch float32",
        db >= least,
        f"at least {least:g} dB",
    )
    return ProofRecord(
        f"image-{variant}", resolution, target, pipeline.precision, by, "images", error, least, round(db, 1)
    )


def _check(given: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise ProofError(given, allowed=allowed, remedy="build in a wider precision, --precision bf16 or fp32")


def verify(
    folder: Path, manifest: Manifest, say: Say = lambda text: None, allow_foreign: bool = False
) -> tuple[list[ProofRecord], list[str]]:
    """Re-proves a directory: hashes, then every target that can run here.

    Returns:
        The records, and a line for every target that could not be run here.
    """
    check_hashes(folder, manifest)
    records: list[ProofRecord] = []
    skipped: list[str] = []
    for target in manifest.targets():
        try:
            records += prove(folder, manifest, target, say, allow_foreign)
        except BackendError as error:
            skipped.append(f"{target}: not executed here ({error.given})")
    if not records:
        raise BackendError(
            f"nothing of {folder} could be run here: " + "; ".join(skipped),
            remedy="`flowturbo-export doctor` shows what to install",
        )
    return records, skipped


__all__ = ["FlowTurboError", "check_hashes", "prove", "psnr_db", "read_proof", "relative_error", "verify"]
