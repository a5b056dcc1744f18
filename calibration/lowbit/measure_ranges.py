"""Measure what every quantisable layer reads on real trajectories: ranges, clips and equalisers for an int8 build.

Two passes run the same trajectories. The first measures the range of every channel as a function of flow time, a
histogram of all values, and samples of the layer's input; from these comes the equaliser of the layer. The second
measures the histograms of the equalised inputs. Memory does not depend on the number of trajectories. The state is
saved after batches, so that a killed run goes on and ends with the same file.

Letters: N rows, T tokens (or bins of flow time), C channels, R samples, O outputs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from calibration.lowbit.fake_quantise import fake_quantise, fake_quantise_weight
from calibration.lowbit.histogram import Histogram, find_clip, merge_histograms
from calibration.lowbit.trajectories import Deployment, sample_deployment
from calibration.model import find_linear, select_loading_inputs
from calibration.samplers.probe import FIT_SEED
from export.lowbit.ranges import CLIP_METHODS, RANGES_SCHEMA, TIME_BINS, LayerRanges, Ranges, RangesRecord, write_ranges
from export.lowbit.rounding import ROUNDING_REVISION
from flowturbo.evaluation.quality.sampled_latents import make_balanced_draw
from runtime.system.array_store import Arrays, KeyedStore, hash_json
from runtime.system.errors import NonFiniteError, RequestError
from runtime.system.json_codec import to_json
from runtime.system.progress import SILENT, Progress
from runtime.system.version import VERSION

Floats = NDArray[np.float32]
NUM_SAMPLES = 256
"""Samples of a layer's input, spread over all evaluations."""
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
"""α of SmoothQuant's eq. 3 that are tried for each layer."""
FREE_ERROR_SHARE, PAID_ERROR_SHARE = 0.99, 0.9
"""An equaliser must bring a layer's output error below this share of the plain one: where it costs nothing, and where a
product stays in the trunk (mlp.fc2)."""
SAVE_EVERY_S = 20.0


@dataclass(frozen=True)
class CalibrationSettings:
    """What is measured.

    Attributes:
        samples: images, classes taking turns.
        seed: first seed, counted from `FIT_SEED`; quality is measured on other seeds.
        batch: images at once.
    """

    samples: int = 64
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch < 1:
            raise RequestError(f"{self.samples} samples in batches of {self.batch}", allowed="at least 1 of each")
        if self.seed < 0:
            raise RequestError(f"seed {self.seed}", allowed="0 or more")


@dataclass
class LayerStatistics:
    """Statistics of one layer's input so far.

    Attributes:
        low, high: range of every channel [T, C].
        plain, equalised: histograms of the sizes by time bin, [T] each.
        samples: rows of the input, [·, C] each.
        calls: evaluations so far.
    """

    low: Floats
    high: Floats
    plain: list[Histogram]
    equalised: list[Histogram]
    samples: list[Floats] = field(default_factory=list)
    calls: int = 0

    @classmethod
    def empty(cls, channels: int) -> LayerStatistics:
        """Return the statistics before the first call."""
        low, high = np.zeros((TIME_BINS, channels), np.float32), np.zeros((TIME_BINS, channels), np.float32)
        return cls(low, high, [Histogram() for _ in range(TIME_BINS)], [Histogram() for _ in range(TIME_BINS)])

    def to_arrays(self) -> Arrays:
        """Return everything as arrays."""
        arrays: Arrays = {"low": self.low, "high": self.high, "calls": np.asarray(self.calls)}
        if self.samples:
            arrays["rows"] = np.concatenate(self.samples)
        for kind, histograms in (("plain", self.plain), ("equalised", self.equalised)):
            arrays[f"{kind}/counts"] = np.stack([histogram.counts for histogram in histograms])
            arrays[f"{kind}/exponents"] = np.asarray([histogram.exponent for histogram in histograms])
            arrays[f"{kind}/largest"] = np.asarray([histogram.largest for histogram in histograms])
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> LayerStatistics:
        """Return the statistics that `to_arrays` was called on."""
        plain, equalised = (
            [
                Histogram(counts, int(exponent), float(largest))
                for counts, exponent, largest in zip(
                    arrays[f"{kind}/counts"], arrays[f"{kind}/exponents"], arrays[f"{kind}/largest"], strict=True
                )
            ]
            for kind in ("plain", "equalised")
        )
        samples = [arrays["rows"]] if "rows" in arrays else []
        return cls(arrays["low"], arrays["high"], plain, equalised, samples, int(arrays["calls"]))


def find_time_bin(t: float) -> int:
    """Return the bin of a flow time."""
    return min(int(t * TIME_BINS), TIME_BINS - 1)


def calibrate_int8(
    deployment: Deployment,
    settings: CalibrationSettings,
    out: Path,
    progress: Progress = SILENT,
    *,
    command: str = "",
    resume: bool = True,
    save_every_s: float = SAVE_EVERY_S,
) -> Ranges:
    """Measure a deployment, write `out`, and return what it holds.

    Args:
        command: what the user typed, for the record.
        resume: go on with a run that was stopped.
        save_every_s: seconds between two saves of the state.

    Raises:
        RequestError: nothing to look at, or the sampler never evaluates one of the networks.
        NonFiniteError: a layer reads NaN or infinity.
    """
    times = deployment.list_times()
    unused_roles = [role for role, role_times in times.items() if not role_times]
    if unused_roles:
        raise RequestError(
            f"{deployment.sampler} never evaluates the {', '.join(unused_roles)}, so nothing would be known of it",
            remedy="name a schedule that does, such as H1P5R3, or leave the refiner out",
        )
    run = _CalibrationRun(deployment, settings, out.with_suffix(".partial.npz"), progress)
    if resume:
        run.restore()
    run.measure(save_every_s)
    layers = tuple(deployment.layers)
    record = RangesRecord(RANGES_SCHEMA, deployment.model, run.settings, times, layers, CLIP_METHODS, VERSION, command)
    ranges = Ranges(record, {name: run.summarise(name) for name in layers})
    write_ranges(out, ranges)
    run.store.discard()
    return ranges


class _CalibrationRun:
    """The two passes, and their state."""

    def __init__(
        self, deployment: Deployment, settings: CalibrationSettings, partial: Path, progress: Progress
    ) -> None:
        self.deployment, self.progress = deployment, progress
        self.settings = {
            **deployment.settings,
            "samples": settings.samples,
            "seed": settings.seed,
            "batch": settings.batch,
            "bins": TIME_BINS,
            "rows": NUM_SAMPLES,
        }
        versions = [VERSION, ROUNDING_REVISION, torch.__version__, np.__version__]
        key = hash_json([deployment.model, select_loading_inputs(deployment.request), self.settings, versions])
        self.store = KeyedStore(partial, key)
        self.draw = make_balanced_draw(sorted(deployment.networks.classes), settings.samples, FIT_SEED + settings.seed)
        self.batch, self.num_batches = settings.batch, -(-settings.samples // settings.batch)
        self.layers = {name: find_linear(deployment.networks.by_role, name) for name in deployment.layers}
        self.statistics = {name: LayerStatistics.empty(layer.in_features) for name, layer in self.layers.items()}
        self.equalisers: dict[str, Floats] = {}
        self.batches_done = 0

    def restore(self) -> None:
        """Go on with the state that a stopped run left, if there is one."""
        arrays = self.store.load("done", progress=self.progress)
        if arrays is None:
            return
        for name in self.statistics:
            prefix = f"{name}/"
            layer_arrays = {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}
            self.statistics[name] = LayerStatistics.from_arrays(layer_arrays)
            if "equaliser" in layer_arrays:
                self.equalisers[name] = layer_arrays["equaliser"]
        self.batches_done = int(arrays["done"])
        self.progress.write(f"going on after {self.batches_done} of {2 * self.num_batches} batches")

    def save(self) -> None:
        arrays: Arrays = {"done": np.asarray(self.batches_done)}
        for name, statistics in self.statistics.items():
            arrays |= {f"{name}/{key}": array for key, array in statistics.to_arrays().items()}
        self.store.save(arrays | {f"{name}/equaliser": array for name, array in self.equalisers.items()})

    def measure(self, save_every_s: float) -> None:
        """Run the batches that are left."""
        saved_at = time.monotonic()
        for step in range(self.batches_done, 2 * self.num_batches):
            is_second_pass, batch = divmod(step, self.num_batches)
            if is_second_pass and not self.equalisers:
                self.compute_equalisers()
            draw = self.draw.select(slice(batch * self.batch, (batch + 1) * self.batch))
            hook = self.record_equalised if is_second_pass else self.record_plain
            sample_deployment(self.deployment, draw.labels, draw.seeds, hook)
            self.batches_done = step + 1
            images_done = min((batch + 1) * self.batch, len(self.draw))
            self.progress.update(f"pass {is_second_pass + 1} of 2, images", images_done, len(self.draw))
            if time.monotonic() - saved_at >= save_every_s and self.batches_done < 2 * self.num_batches:
                self.save()
                saved_at = time.monotonic()

    def record_plain(self, name: str, t: float, x: Tensor) -> None:
        """Add one layer input [N, T, C] to the statistics of the first pass."""
        statistics, time_bin = self.statistics[name], find_time_bin(t)
        activations = x.reshape(-1, x.shape[-1])
        low, high = statistics.low[time_bin], statistics.high[time_bin]
        np.minimum(low, activations.amin(dim=0).numpy(), out=low)
        np.maximum(high, activations.amax(dim=0).numpy(), out=high)
        try:
            statistics.plain[time_bin].add(activations)
        except ValueError as error:
            raise NonFiniteError(
                f"{name} reads {error} at t = {t:.3f}", remedy="check the checkpoint: float32 should not overflow"
            ) from error
        # All calls together give NUM_SAMPLES samples, as evenly as they can.
        call = statistics.calls
        total = self.num_batches * sum(e.network == name.partition("/")[0] for e in self.deployment.plan)
        if num_samples := (call + 1) * NUM_SAMPLES // total - call * NUM_SAMPLES // total:
            random = np.random.Generator(np.random.Philox(call))
            rows = torch.from_numpy(random.integers(0, len(activations), num_samples))
            statistics.samples.append(activations[rows].numpy().copy())
        statistics.calls += 1

    def record_equalised(self, name: str, t: float, x: Tensor) -> None:
        """Add one layer input [N, T, C] to the statistics of the second pass."""
        self.statistics[name].equalised[find_time_bin(t)].add(x / torch.from_numpy(self.equalisers[name]))

    def compute_equalisers(self) -> None:
        """Choose the equaliser of every layer from the samples of the first pass.

        Raises:
            RequestError: a layer read nothing but zeros, which give no range to quantise by.
        """
        dead = [name for name, layer in self.statistics.items() if not any(h.largest for h in layer.plain)]
        if dead:
            raise RequestError(
                f"{', '.join(dead[:4])}{' …' if len(dead) > 4 else ''} read nothing but zeros on these trajectories",
                remedy="check the checkpoint: so much of it is not used; --precision int8-weights needs no calibration",
            )
        self.progress.stage("equalisers of all layers")
        for name, statistics in self.statistics.items():
            samples = torch.from_numpy(np.concatenate(statistics.samples))
            sizes = torch.from_numpy(np.maximum(statistics.high.max(axis=0), -statistics.low.min(axis=0)))
            max_error_share = PAID_ERROR_SHARE if name.endswith("mlp.fc2") else FREE_ERROR_SHARE
            weight = self.layers[name].weight
            self.equalisers[name] = compute_equaliser(samples, weight, sizes, max_error_share).numpy()

    def summarise(self, name: str) -> LayerRanges:
        """Return what the file holds of a layer: clips [T + 1, M] of every bin and of all together, and errors."""
        statistics, scales, weight = self.statistics[name], self.equalisers[name], self.layers[name].weight
        samples = torch.from_numpy(np.concatenate(statistics.samples))
        exact = F.linear(samples, weight)
        exact_power = float(exact.double().square().sum()) or 1.0

        def find_clips(histograms: list[Histogram]) -> Floats:
            bins_and_all = [*histograms, merge_histograms(histograms)]
            return np.asarray([[find_clip(h, method) for method in CLIP_METHODS] for h in bins_and_all], np.float32)

        def measure_errors(clips: Floats, divisor: Tensor) -> Floats:
            quantised = fake_quantise_weight(weight * divisor)
            outputs = [F.linear(fake_quantise(samples / divisor, float(clip)), quantised) for clip in clips[-1]]
            errors = [float((output - exact).double().square().sum()) / exact_power for output in outputs]
            return np.asarray(errors, np.float32)

        plain, equalised = find_clips(statistics.plain), find_clips(statistics.equalised)
        divisor = torch.from_numpy(scales)
        plain_errors = measure_errors(plain, torch.ones_like(divisor))
        equalised_errors = measure_errors(equalised, divisor)
        return LayerRanges(statistics.low, statistics.high, scales, plain, equalised, plain_errors, equalised_errors)


def compute_equaliser(samples: Tensor, weight: Tensor, sizes: Tensor, max_error_share: float) -> Tensor:
    """Return the divisor of a layer's input: SmoothQuant's, at the strength of the least error of the output.

    Args:
        samples: [R, C] of the input.
        weight: [O, C].
        sizes: [C] largest |x| of every channel.
        max_error_share: the error must come below this share of the plain layer's, or the divisor is one.

    Returns:
        [C], of geometric mean 1.
    """
    exact = F.linear(samples, weight)
    input_sizes, weight_sizes = sizes.clamp_min(1e-5), weight.abs().amax(dim=0).clamp_min(1e-5)
    best_scales = torch.ones_like(sizes)
    least_error = max_error_share * _measure_output_error(exact, samples, weight, best_scales)
    for strength in STRENGTHS:
        scales = input_sizes**strength / weight_sizes ** (1 - strength)
        scales = scales / scales.log().mean().exp()
        error = _measure_output_error(exact, samples, weight, scales)
        if error < least_error:
            best_scales, least_error = scales, error
    return best_scales.float()


def _measure_output_error(exact_output: Tensor, samples: Tensor, weight: Tensor, scales: Tensor) -> float:
    """Return the squared error of the quantised layer's output, with the clip that suits its input best."""
    equalised = samples / scales
    histogram = Histogram()
    histogram.add(equalised)
    output = F.linear(fake_quantise(equalised, find_clip(histogram, "mse")), fake_quantise_weight(weight * scales))
    return float((output - exact_output).double().square().sum())


def format_overview(ranges: Ranges) -> str:
    """Return a few lines: the errors of the methods over all layers, plain and equalised."""
    lines = []
    for kind in ("plain", "equalised"):
        errors = np.stack([getattr(layer_ranges, f"{kind}_error") for layer_ranges in ranges.layers.values()])
        means = np.exp(np.log(np.maximum(errors, 1e-12)).mean(axis=0))
        method_errors = ", ".join(
            f"{method} {100 * np.sqrt(mean):.2f} %" for method, mean in zip(CLIP_METHODS, means, strict=True)
        )
        lines.append(f"{kind}: error of a layer's output, geometric mean: {method_errors}")
    equalised = sum(bool((layer_ranges.equaliser != 1).any()) for layer_ranges in ranges.layers.values())
    lines.append(f"{equalised} of {len(ranges.layers)} layers are equalised")
    return "\n".join(lines)


def ranges_to_json(ranges: Ranges) -> dict[str, Any]:
    """Return the record and the clips of every layer, for --json."""
    layers = {
        name: {
            kind: dict(zip(CLIP_METHODS, map(float, getattr(layer_ranges, kind)[-1]), strict=True))
            for kind in ("plain", "equalised")
        }
        for name, layer_ranges in ranges.layers.items()
    }
    return {**to_json(ranges.record), "sha256": ranges.sha256, "clips": layers}
