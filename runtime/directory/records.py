"""What an engine directory says of itself: the records of its manifest (docs/contract.md describes every key)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.directory.contract import GraphSpec, build_graph_spec
from runtime.sampling.calibrated import CalibratedSampler
from runtime.system.errors import EngineError
from runtime.system.json_codec import JsonObject

GPU_TARGETS = ("tensorrt", "rtx")
HOST_TARGETS = ("cpu", "openvino")
TARGETS = (*HOST_TARGETS, "cuda", *GPU_TARGETS)
"""Targets of a build. The first three run the ONNX files themselves."""


@dataclass(frozen=True)
class FileRecord:
    """A file of the directory, by relative path."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class ModelRecord:
    """The networks of a directory.

    Attributes:
        channels, factor: latent channels; pixels per latent.
        modulations: per network, M of the contract.
        null_label: label of the unconditional branch.
        classes: labels the model knows → names.
        predictor, refiner: their configurations; refiner is None where there is none.
        sources: sha256 of the checkpoints, by role.
        label_dropout: share of the predictor's training without a label; None where its checkpoint does not say. At 0
            it has not learned its null label.
        weights: which weights of its file a network has, by role; empty in directories of older versions.
        has_null_label: whether the networks know an unconditional branch; without one there is no guidance.
    """

    channels: int
    factor: int
    modulations: Mapping[str, int]
    null_label: int
    classes: Mapping[int, str]
    predictor: JsonObject
    refiner: JsonObject | None
    sources: Mapping[str, str]
    label_dropout: float | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    has_null_label: bool = True


@dataclass(frozen=True)
class Defaults:
    """Defaults of `flowturbo-run`: either a schedule, or a solver with steps.

    `guidance_channels`: number of first channels that are guided: 3 as in SiT's reference, all for REPA's models.
    """

    guidance: float
    guidance_channels: int
    schedule: str | None = None
    solver: str | None = None
    steps: int | None = None
    vae: str | None = None


@dataclass(frozen=True)
class GraphRecord:
    """One ONNX file.

    Attributes:
        precision: name of the set it belongs to: the dtype its networks compute in as written (fp32, fp16, bf16), or
            how they are quantised (int8, int8-weights, int4-weights; with the suffix -fp16 over float16).
        data: external weights, a path beside it, or None.
        ops: node counts by type.
        weight_bytes: of all initialisers.
        computes: this graph's own precision where it differs from its set's: only trunks are quantised.
        activation_bytes: largest sum of intermediate results in memory, for one guided picture; 0 if unknown.
        weights: bytes of a quantised trunk by kind: `quantised`, their `scales`, layers that stay `wide`, and the
            `rest` (first and last layer, biases, positions); empty otherwise, and in directories before schema 4.
        pairs_fit: 8-bit products of neighbouring weights of an int8 trunk add up in 16 bits without overflow, so that
            the fastest products of every CPU are exact; False in directories before schema 5.
    """

    graph: str
    resolution: int
    precision: str
    path: str
    data: str | None
    opset: int
    ops: Mapping[str, int]
    weight_bytes: int
    computes: str | None = None
    activation_bytes: int = 0
    weights: Mapping[str, int] = field(default_factory=dict)
    pairs_fit: bool = False


@dataclass(frozen=True)
class EngineRecord:
    """One engine: an ONNX file as it is for a target that runs those, or a serialised engine.

    Attributes:
        precision: what it computes in, or stores its weights in; on OpenVINO "bf16" runs the fp32 file with bf16
            arithmetic.
        executed: whether the machine that built it could run it and its proof.
        built: builder, versions, GPU architecture, memory and seconds of the build; empty for ONNX files.
    """

    graph: str
    resolution: int
    target: str
    precision: str
    path: str
    executed: bool
    built: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class ProofRecord:
    """One comparison with PyTorch float32.

    Attributes:
        what: graph name, "trajectory" or "image-VAE".
        by: what ran it: provider or backend.
        tensor: the worst output.
        relative_error: largest absolute difference over the largest absolute value.
        psnr_db: of pictures; None otherwise.
        tolerance: the bound that held (relative error, or dB for pictures).
    """

    what: str
    resolution: int
    target: str
    precision: str
    by: str
    tensor: str
    relative_error: float
    tolerance: float
    psnr_db: float | None = None


@dataclass(frozen=True)
class GateRecord:
    """A quantised target compared with its wider twin, measured in one run.

    Attributes:
        against: precision of the twin.
        by: what ran both; with "not executed" where the device is missing and nothing was timed.
        cpu: of the machine.
        images: number of images compared, with the same seeds and sampler for both.
        evaluation_ms, twin_ms: a guided evaluation of the predictor, one image; None where nothing was timed.
        bytes, twin_bytes: of all network files; trunk_bytes, twin_trunk_bytes: of predictor and refiner.
        latent_rms: median over images of the distance to the twin's latents.
        psnr_db, psnr_p10_db: of the pictures against the twin's: median and 10th percentile; None without decoder.
        target_db: least median that passes.
        failures: why it did not pass; empty if it did.
        trunk_weights: `GraphRecord.weights` of predictor and refiner together.
    """

    resolution: int
    target: str
    precision: str
    against: str
    by: str
    cpu: str
    images: int
    evaluation_ms: float | None
    twin_ms: float | None
    bytes: int
    twin_bytes: int
    trunk_bytes: int
    twin_trunk_bytes: int
    latent_rms: float
    psnr_db: float | None
    psnr_p10_db: float | None
    target_db: float
    failures: tuple[str, ...] = ()
    trunk_weights: Mapping[str, int] = field(default_factory=dict)

    @property
    def quantised_share(self) -> float | None:
        """Bytes of the trunks' int8 or int4 weights over those of all constants in their files."""
        total = sum(self.trunk_weights.values())
        return self.trunk_weights["quantised"] / total if total else None


@dataclass(frozen=True)
class Manifest:
    """The contents of an engine directory; `docs/contract.md` describes every key.

    Attributes:
        schema: of this file's layout.
        flowturbo: version that wrote it.
        inputs: everything the directory was built from, by name: options, hashes of checkpoints, versions.
        key: hash of `inputs`; equal keys need no second build.
        samplers: calibrated for this model; `sampler_hashes` are their sha256 by name.
        gates: comparisons of quantised targets with wider ones.
    """

    schema: int
    flowturbo: str
    inputs: Mapping[str, str]
    key: str
    created: str
    model: ModelRecord
    defaults: Defaults
    vaes: Mapping[str, JsonObject]
    resolutions: tuple[int, ...]
    max_batch: int
    static_batch: bool
    graphs: tuple[GraphRecord, ...]
    engines: tuple[EngineRecord, ...]
    proofs: tuple[ProofRecord, ...]
    files: tuple[FileRecord, ...]
    notes: tuple[str, ...] = ()
    samplers: tuple[CalibratedSampler, ...] = ()
    sampler_hashes: Mapping[str, str] = field(default_factory=dict)
    gates: tuple[GateRecord, ...] = ()

    def compute_side(self, resolution: int) -> int:
        """Return the latent side at a resolution."""
        return resolution // self.model.factor

    def build_spec(self, graph: str, resolution: int) -> GraphSpec:
        """Return the contract of a graph of this directory."""
        network = "refiner" if graph.startswith("refiner") else "predictor"
        vae = self.vaes.get(graph.partition("-")[2], {})
        return build_graph_spec(
            graph,
            channels=self.model.channels,
            side=self.compute_side(resolution),
            pixels=resolution,
            modulations=self.model.modulations.get(network, 0),
            moments=vae.get("moments", 0),
            features=vae.get("features", 0),
        )

    def list_tiles(self, target: str) -> list[int]:
        """Return the sizes in pixels of the tiles that a target's decoders were built for."""
        return sorted({e.resolution for e in self.engines if e.target == target and e.graph.startswith("tile-")})

    def list_targets(self) -> list[str]:
        """Return the targets with engines, in order of the manifest."""
        return list(dict.fromkeys(engine.target for engine in self.engines))

    def find_engine(self, graph: str, resolution: int, target: str) -> EngineRecord | None:
        """Return the engine of a graph, or None."""
        key = (graph, resolution, target)
        return next((e for e in self.engines if (e.graph, e.resolution, e.target) == key), None)

    def find_graph(self, graph: str, resolution: int, precision: str) -> GraphRecord | None:
        """Return the ONNX file of a graph, or None."""
        key = (graph, resolution, precision)
        return next((g for g in self.graphs if (g.graph, g.resolution, g.precision) == key), None)

    def find_engine_graph(self, engine: EngineRecord) -> GraphRecord | None:
        """Return the ONNX file that an engine is; None for a serialised engine."""
        return next((g for g in self.graphs if g.path == engine.path), None)

    def list_engine_files(self, engine: EngineRecord) -> list[FileRecord]:
        """Return the files of an engine: itself, and an ONNX file's external weights."""
        graph = self.find_engine_graph(engine)
        return [self.find_file(path) for path in (engine.path, graph.data if graph else None) if path is not None]

    def find_file(self, path: str) -> FileRecord:
        """Return the hash and size of a file."""
        for record in self.files:
            if record.path == path:
                return record
        raise EngineError(f"{path} is not in the manifest", remedy=format_rebuild_hint())

    @property
    def engine_hash(self) -> str:
        """Short name of what pictures were made with: the hash of all files' hashes."""
        hashes = sorted(file.sha256 for file in self.files)
        return hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]


def format_rebuild_hint(folder: Path | None = None) -> str:
    """Return the hint to rebuild a directory. Only its maker knows the checkpoints it came from."""
    out_option = f" --out {folder}" if folder else ""
    return f"repeat the flowturbo-export build-engines command that made it, with --rebuild{out_option}"
