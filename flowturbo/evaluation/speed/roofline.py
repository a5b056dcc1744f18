"""What a device could do at best, and what share of that this machine reaches.

t = max(2·MAC·rows / (peak·η), bytes of weights / bandwidth) for each network call, with η the share of the peak that
such networks reach. Estimates: launch overhead, activations' traffic and everything between calls are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flowturbo.evaluation.speed.baselines import BASELINE_NAME, import_torch_baselines
from flowturbo.evaluation.speed.devices import DEVICES, Device
from flowturbo.evaluation.speed.macs import (
    SD_DECODER,
    NetworkCost,
    count_decoder_macs,
    describe_sit_size,
    estimate_sit_cost,
)
from flowturbo.evaluation.speed.rounds import Sample
from flowturbo.evaluation.speed.timed_pipeline import STAGES
from runtime.directory.records import Manifest
from runtime.execution.decoding import DECODE_BATCH
from runtime.sampling.guidance import ImageCondition
from runtime.sampling.plan import Plan
from runtime.system.errors import BackendError, RequestError

BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int8-weights": 1.0, "int4-weights": 0.5}


@dataclass(frozen=True)
class ModelCost:
    """The cost of a model, which follows from its shape.

    Attributes:
        networks: work of the predictor and, where there is one, the refiner.
        decoder_macs: of one picture; None where the manifest does not describe the decoder, 0 without one.
    """

    name: str
    networks: Mapping[str, NetworkCost]
    decoder_macs: float | None


@dataclass(frozen=True)
class Workload:
    """Floating-point operations of one run by stage, the weights that its calls read, and how many calls these are."""

    flops: Mapping[str, float]
    weights: Mapping[str, float]
    calls: Mapping[str, int]

    def compute_min_seconds(self, flops_per_s: float, bytes_per_s: float, bytes_per_weight: float) -> dict[str, float]:
        """Return the least time of each stage: arithmetic or weights, whichever takes longer."""
        return {
            stage: max(self.flops[stage] / flops_per_s, self.weights[stage] * bytes_per_weight / bytes_per_s)
            for stage in self.flops
        }


def describe_released_model(size: str, resolution: int) -> ModelCost:
    """Return a released size, such as "XL", with its refiner and an SD VAE."""
    side = resolution // 8
    networks = {
        "predictor": estimate_sit_cost(describe_sit_size(size), side),
        "refiner": estimate_sit_cost(describe_sit_size(size, refiner=True), side),
    }
    return ModelCost(f"SiT-{size}/2", networks, count_decoder_macs(SD_DECODER, side, 4))


def describe_model(manifest: Manifest, resolution: int, vae: str | None) -> ModelCost:
    """Return the model of an engine directory, from its manifest."""
    side, model = manifest.compute_side(resolution), manifest.model
    networks = {"predictor": estimate_sit_cost(model.predictor, side)}
    if model.refiner is not None:
        networks["refiner"] = estimate_sit_cost(model.refiner, side)
    decoder_config: Any = {} if vae is None else manifest.vaes.get(vae, {}).get("decoder")
    macs = (
        0.0
        if vae is None
        else None
        if decoder_config is None
        else count_decoder_macs(decoder_config, side, model.channels)
    )
    return ModelCost(f"depth {model.predictor['depth']}, width {model.predictor['width']}", networks, macs)


def count_workload(
    model: ModelCost, plan: Plan, parts: Sequence[Sequence[ImageCondition]], batches: Sequence[int] | None = None
) -> Workload:
    """Count the work of one run of a fixed sampler.

    Args:
        parts: the images of a run, as they are batched: how many rows an evaluation of each takes. Every part is
            sampled by itself, so a batch that is split reads the weights once per part.
        batches: images that are decoded together; as the parts if None.

    Raises:
        RequestError: the sampler chooses its steps, so that its work is not known beforehand.
    """
    if not plan:
        raise RequestError("a sampler that chooses its steps", allowed="fixed ones: schedules and solvers with steps")
    flops, weights, calls = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0)

    def add_call(stage: str, macs: float, read_weights: float) -> None:
        flops[stage] += 2 * macs
        weights[stage] += read_weights
        calls[stage] += 1

    cached_keys: set[tuple[str, float, int]] = set()
    for part in parts:
        for evaluation in plan:
            network = model.networks[evaluation.network]
            rows = sum(image.count_branches(evaluation.guided) for image in part)
            add_call(evaluation.network, network.trunk_macs * rows, network.trunk_weights)
        labels = {label for image in part for label, _ in image.weighted_labels}
        guided_labels = labels | {image.negative_label for image in part if image.scale != 1.0}
        keys = {(e.network, e.t, label) for e in plan for label in (guided_labels if e.guided else labels)}
        new_keys = keys - cached_keys
        for name in sorted({name for name, _, _ in new_keys}):
            num_keys, network = sum(name == network_name for network_name, _, _ in new_keys), model.networks[name]
            add_call("conditioning", network.conditioning_macs * num_keys, network.conditioning_weights)
        cached_keys |= new_keys  # later parts find the modulations of earlier ones
    if model.decoder_macs:
        for batch in batches or map(len, parts):
            for start in range(0, batch, DECODE_BATCH):
                add_call("decoder", model.decoder_macs * min(DECODE_BATCH, batch - start), 0.0)
    return Workload(flops, weights, calls)


@dataclass(frozen=True)
class Prediction:
    """An estimate for a device, milliseconds per image; the decoder's is None where its shape is unknown."""

    device: Device
    model: str
    sampler: str
    sampling_ms: float
    decoder_ms: float | None


def predict_latency(device: Device, model: ModelCost, workload: Workload, sampler: str, num_images: int) -> Prediction:
    """Apply the rule of thumb to one device."""
    stage_seconds = workload.compute_min_seconds(
        device.tflops * 1e12 * device.efficiency, device.gbytes * 1e9, BYTES_PER_WEIGHT[device.precision]
    )
    decoder_seconds = stage_seconds.pop("decoder")
    return Prediction(
        device,
        model.name,
        sampler,
        round(1e3 * sum(stage_seconds.values()) / num_images, 2),
        None if model.decoder_macs is None else round(1e3 * decoder_seconds / num_images, 2),
    )


def find_device(name: str) -> Device:
    """Return the device with this name, or with a name that includes it.

    Raises:
        RequestError: none, or several.
    """
    matches = [device for device in DEVICES if device.name.lower() == name.lower()]
    matches = matches or [device for device in DEVICES if name.lower() in device.name.lower()]
    if len(matches) != 1:
        problem = "no such device" if not matches else f"it fits {', '.join(device.name for device in matches)}"
        raise RequestError(f"device {name!r}: {problem}", allowed="; ".join(device.name for device in DEVICES))
    return matches[0]


@dataclass(frozen=True)
class MachineLimits:
    """This machine, measured: FLOP/s of a large matrix product by precision, and bytes/s of a copy (read and written).

    `note`: what measured it.
    """

    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    note: str


def measure_limits(side: int = 2048, repeats: int = 5, copy_bytes: int = 256 << 20) -> MachineLimits:
    """Time NumPy's matrix product in fp32, with as many threads as its BLAS takes, and a copy with one."""
    random = np.random.Generator(np.random.Philox(0))
    a = random.standard_normal((side, side), dtype=np.float32)
    b = random.standard_normal((side, side), dtype=np.float32)
    out = np.empty_like(a)

    def time_best(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    product_seconds = time_best(lambda: np.matmul(a, b, out=out))
    source = np.zeros(copy_bytes // 4, np.float32)
    target = np.ones_like(source)
    copy_seconds = time_best(lambda: np.copyto(target, source))
    copy_note = f"a copy of {copy_bytes >> 20} MiB on one thread"
    note = f"NumPy {np.__version__}, {side}×{side} matrices, best of {repeats}; {copy_note}"
    return MachineLimits({"fp32": 2 * side**3 / product_seconds}, 2 * copy_bytes / copy_seconds, note)


def measure_best_limits() -> MachineLimits:
    """Return NumPy's limits, with torch's matrix products where torch is installed and faster."""
    limits = measure_limits()
    try:
        products = import_torch_baselines().measure_matrix_products()
    except BackendError:  # torch is not installed: NumPy's figures stand alone, and the note says so
        return limits
    best_rates = {kind: max(rate, limits.flops_per_s.get(kind, 0.0)) for kind, rate in products.items()}
    return replace(
        limits,
        flops_per_s={**limits.flops_per_s, **best_rates},
        note=f"{limits.note}; products also by {BASELINE_NAME}",
    )


@dataclass(frozen=True)
class StageUtilization:
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


def compute_utilization(
    workload: Workload, runs_ms: Mapping[str, float], limits: MachineLimits, precision: str
) -> list[StageUtilization]:
    """Return what engines reach of this machine's limits, by stage.

    Args:
        runs_ms: measured, of one run, by stage.
        precision: of the networks; a product in a precision that was not measured counts as fp32's.
    """
    peak_flops_per_s = limits.flops_per_s.get(precision, limits.flops_per_s["fp32"])
    stages = []
    for stage, flops in workload.flops.items():
        ms = runs_ms.get(stage, 0.0)
        if not flops or not ms:
            continue
        arithmetic_seconds = flops / peak_flops_per_s
        traffic_seconds = workload.weights[stage] * BYTES_PER_WEIGHT.get(precision, 4) / limits.bytes_per_s
        limit_ms = 1e3 * max(arithmetic_seconds, traffic_seconds)
        bound_by = "arithmetic" if arithmetic_seconds >= traffic_seconds else "weights' bytes"
        stages.append(StageUtilization(stage, ms, flops / ms / 1e6, limit_ms, bound_by, limit_ms / ms))
    return stages


def measure_stages(sample: Callable[[], Sample], repeats: int) -> dict[str, float]:
    """Return the median milliseconds per run of each stage of a subject, after one run to warm up."""
    sample()
    runs = [{stage: sum(calls) for stage, calls in sample().calls.items()} for _ in range(repeats)]
    return {stage: float(np.median([run[stage] for run in runs])) for stage in STAGES}
