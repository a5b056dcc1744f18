"""What a device could do at best, and what this machine does of that.

t = max(2·MAC·rows / (peak·η), bytes of weights / bandwidth) for each network call, with η the share of the peak that
such networks reach. Estimates: launch overhead, activations' traffic and everything between calls are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowturbo.evaluation.speed.conditions import Sample
from flowturbo.evaluation.speed.devices import DEVICES, Device
from flowturbo.evaluation.speed.macs import SD_DECODER, NetworkWork, decoder_macs, sit_config, sit_work
from flowturbo.evaluation.speed.timed_pipeline import STAGES
from runtime.directory.manifest import Manifest
from runtime.execution.decoding import TOGETHER
from runtime.sampling.guidance import Branches
from runtime.sampling.plan import Plan
from runtime.system.errors import RequestError

BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int8-weights": 1.0, "int4-weights": 0.5}


@dataclass(frozen=True)
class Model:
    """What is to be computed, by shape alone.

    Attributes:
        networks: work of the predictor and, where there is one, the refiner.
        decoder_macs: of one picture; None where the manifest does not describe the decoder, 0 without one.
    """

    name: str
    networks: Mapping[str, NetworkWork]
    decoder_macs: float | None


@dataclass(frozen=True)
class Bound:
    """Floating-point operations of one run by stage, the weights that its calls read, and how many calls these are."""

    flops: Mapping[str, float]
    weights: Mapping[str, float]
    calls: Mapping[str, int]

    def seconds(self, flops_per_s: float, bytes_per_s: float, bytes_per_weight: float) -> dict[str, float]:
        """The least time of each stage: arithmetic or weights, whichever takes longer."""
        return {
            stage: max(self.flops[stage] / flops_per_s, self.weights[stage] * bytes_per_weight / bytes_per_s)
            for stage in self.flops
        }


def named_model(size: str, resolution: int) -> Model:
    """A released size with its refiner and an SD VAE, such as "XL"."""
    side = resolution // 8
    networks = {
        "predictor": sit_work(sit_config(size), side),
        "refiner": sit_work(sit_config(size, refiner=True), side),
    }
    return Model(f"SiT-{size}/2", networks, decoder_macs(SD_DECODER, side, 4))


def model_of(manifest: Manifest, resolution: int, vae: str | None) -> Model:
    """The model of an engine directory, from its manifest."""
    side, model = manifest.side(resolution), manifest.model
    networks = {"predictor": sit_work(model.predictor, side)}
    if model.refiner is not None:
        networks["refiner"] = sit_work(model.refiner, side)
    decoder: Any = {} if vae is None else manifest.vaes.get(vae, {}).get("decoder")
    macs = 0.0 if vae is None else None if decoder is None else decoder_macs(decoder, side, model.channels)
    return Model(f"depth {model.predictor['depth']}, width {model.predictor['width']}", networks, macs)


def bound_of(
    model: Model, plan: Plan, parts: Sequence[Sequence[Branches]], batches: Sequence[int] | None = None
) -> Bound:
    """The work of one run of a fixed sampler.

    Args:
        parts: the images of a run, as they are batched: how many rows an evaluation of each takes. Every part is
            sampled by itself, so a batch that is split reads the weights once per part.
        batches: images that are decoded together; as the parts if None.

    Raises:
        RequestError: the sampler chooses its steps, so that its work is not known beforehand.
    """
    if not plan:
        raise RequestError("a sampler that chooses its steps", allowed="fixed ones: schedules and solvers with steps")
    work = _Work()
    known: set[tuple[str, float, int]] = set()
    for part in parts:
        for evaluation in plan:
            network = model.networks[evaluation.network]
            rows = sum(image.rows(evaluation.guided) for image in part)
            work.add(evaluation.network, network.trunk_macs * rows, network.trunk_weights)
        asked = {(e.network, e.t, label) for e in plan for label in _labels(part, e.guided)} - known
        for name in sorted({name for name, _, _ in asked}):
            pairs, network = sum(name == own for own, _, _ in asked), model.networks[name]
            work.add("conditioning", network.conditioning_macs * pairs, network.conditioning_weights)
        known |= asked  # modulations are kept from part to part
    if model.decoder_macs:
        together = [min(TOGETHER, n - start) for n in batches or map(len, parts) for start in range(0, n, TOGETHER)]
        for images in together:
            work.add("decoder", model.decoder_macs * images, 0.0)
    return work.bound()


def _labels(images: Sequence[Branches], guided: bool) -> set[int]:
    """What an evaluation of these images is conditioned on."""
    own = {label for image in images for label, _ in image.labels}
    return own | {image.other for image in images if guided and image.scale != 1.0}


class _Work:
    """Adds calls up by stage."""

    def __init__(self) -> None:
        self._flops, self._weights = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
        self._calls = dict.fromkeys(STAGES, 0)

    def add(self, stage: str, macs: float, weights: float) -> None:
        self._flops[stage] += 2 * macs
        self._weights[stage] += weights
        self._calls[stage] += 1

    def bound(self) -> Bound:
        return Bound(self._flops, self._weights, self._calls)


@dataclass(frozen=True)
class Prediction:
    """An estimate for a device, milliseconds per image; the decoder's is None where its shape is unknown."""

    device: Device
    model: str
    sampler: str
    sampling_ms: float
    decoder_ms: float | None


def predict(device: Device, model: Model, bound: Bound, sampler: str, images: int) -> Prediction:
    """The rule of thumb for one device."""
    seconds = bound.seconds(device.tflops * 1e12 * device.efficiency, device.gbytes * 1e9, BYTES[device.precision])
    decoder = seconds.pop("decoder")
    return Prediction(
        device,
        model.name,
        sampler,
        round(1e3 * sum(seconds.values()) / images, 2),
        None if model.decoder_macs is None else round(1e3 * decoder / images, 2),
    )


def device_named(name: str) -> Device:
    """A device of the table, by its name or a part of it that no other has.

    Raises:
        RequestError: none, or several.
    """
    found = [device for device in DEVICES if device.name.lower() == name.lower()]
    found = found or [device for device in DEVICES if name.lower() in device.name.lower()]
    if len(found) != 1:
        what = "no such device" if not found else f"it fits {', '.join(device.name for device in found)}"
        raise RequestError(f"device {name!r}: {what}", allowed="; ".join(device.name for device in DEVICES))
    return found[0]


@dataclass(frozen=True)
class Limits:
    """This machine, measured: FLOP/s of a large matrix product by precision, and bytes/s of a copy (read and written).

    `note`: what measured it.
    """

    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    note: str


def measure_limits(side: int = 2048, repeats: int = 5, copy_bytes: int = 256 << 20) -> Limits:
    """NumPy's matrix product in fp32, with as many threads as its BLAS takes, and a copy with one."""
    random = np.random.Generator(np.random.Philox(0))
    a = random.standard_normal((side, side), dtype=np.float32)
    b = random.standard_normal((side, side), dtype=np.float32)
    out = np.empty_like(a)
    best = min(_seconds(lambda: np.matmul(a, b, out=out)) for _ in range(repeats))
    source = np.zeros(copy_bytes // 4, np.float32)
    target = np.ones_like(source)
    copy = min(_seconds(lambda: np.copyto(target, source)) for _ in range(repeats))
    copied = f"a copy of {copy_bytes >> 20} MiB on one thread"
    note = f"NumPy {np.__version__}, {side}×{side} matrices, best of {repeats}; {copied}"
    return Limits({"fp32": 2 * side**3 / best}, 2 * copy_bytes / copy, note)


@dataclass(frozen=True)
class Achieved:
    """A stage of an engine directory on this machine.

    Attributes:
        ms: median of its calls' sum per run.
        limit_ms: what the measured matrix product and copy allow; `bound_by` which of them.
        share: limit_ms / ms.
    """

    stage: str
    ms: float
    gflops_per_s: float
    limit_ms: float
    bound_by: str
    share: float


def achieved(bound: Bound, runs_ms: Mapping[str, float], limits: Limits, precision: str) -> list[Achieved]:
    """What engines reach of this machine's limits, by stage.

    Args:
        runs_ms: measured, of one run, by stage.
        precision: of the networks; a product in a precision that was not measured counts as fp32's.
    """
    peak = limits.flops_per_s.get(precision, limits.flops_per_s["fp32"])
    found = []
    for stage, flops in bound.flops.items():
        ms = runs_ms.get(stage, 0.0)
        if not flops or not ms:
            continue
        arithmetic = flops / peak
        traffic = bound.weights[stage] * BYTES.get(precision, 4) / limits.bytes_per_s
        least = 1e3 * max(arithmetic, traffic)
        by = "arithmetic" if arithmetic >= traffic else "weights' bytes"
        found.append(Achieved(stage, ms, flops / ms / 1e6, least, by, least / ms))
    return found


def run_stages(sample: Callable[[], Sample], repeats: int) -> dict[str, float]:
    """Median milliseconds per run of each stage of a subject, after one run to warm up."""
    sample()
    runs = [{stage: sum(calls) for stage, calls in sample().calls.items()} for _ in range(repeats)]
    return {stage: float(np.median([run[stage] for run in runs])) for stage in STAGES}


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
