"""Measures what every quantisable layer reads on real trajectories: ranges, clips and equalisers for an int8 build.

Two passes over the same trajectories. The first keeps the range of every channel as a function of flow time, a
histogram of all values, and a few rows of the layer's input; from those rows comes the equaliser of the layer. The
second keeps the histograms of the equalised inputs. Memory does not depend on how many trajectories run. State is kept
aside after batches, so that a killed run goes on and ends with the same file.

Letters: N rows, T tokens (or bins of flow time), C channels, R kept rows, O outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from calibration.lowbit.fake_quantise import fake_quantise, fake_quantise_weight
from calibration.lowbit.histogram import Histogram, find_clip, merge_histograms
from calibration.lowbit.trajectories import Deployment, sample_deployment
from calibration.samplers.probe import FIT_SEED
from calibration.samplers.search_job import select_loading_inputs
from export.lowbit.ranges import CLIP_METHODS, RANGES_SCHEMA, TIME_BINS, LayerRanges, Ranges, RangesRecord, write_ranges
from export.lowbit.rounding import ROUNDING_REVISION
from flowturbo.evaluation.quality.array_cache import hash_json, load_arrays, save_arrays
from flowturbo.evaluation.quality.sampled_latents import SampleDraw, make_balanced_draw
from runtime.system.errors import NonFiniteError, RequestError
from runtime.system.json_codec import to_json
from runtime.system.version import VERSION

Say = Callable[[str], None]
Floats = NDArray[np.float32]
NUM_SAMPLES = 256
"""Rows of a layer's input that are kept, spread over all evaluations."""
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
"""α of SmoothQuant's eq. 3 that are tried for each layer."""
FREE_ERROR_SHARE, PAID_ERROR_SHARE = 0.99, 0.9
"""An equaliser must bring a layer's output error below this share of what it was: where it costs nothing, and where a
product stays in the trunk (mlp.fc2)."""
SAVE_EVERY_S = 20.0


@dataclass(frozen=True)
class CalibrationSettings:
    """What is measured.

    Attributes:
        samples: images, classes taking turns.
        seed: first seed, counted from where calibrations begin (the seeds that judge are others).
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
    """What was seen of one layer's input so far."""

    low: Floats
    high: Floats
    plain: list[Histogram]
    equalised: list[Histogram]
    samples: list[Floats] = field(default_factory=list)
    calls: int = 0

    @classmethod
    def empty(cls, channels: int) -> LayerStatistics:
        low, high = np.zeros((TIME_BINS, channels), np.float32), np.zeros((TIME_BINS, channels), np.float32)
        return cls(low, high, [Histogram() for _ in range(TIME_BINS)], [Histogram() for _ in range(TIME_BINS)])


def find_time_bin(t: float) -> int:
    """The bin of a flow time."""
    return min(int(t * TIME_BINS), TIME_BINS - 1)


def calibrate_int8(
    deployment: Deployment,
    settings: CalibrationSettings,
    out: Path,
    say: Say,
    *,
    command: str = "",
    resume: bool = True,
    save_every_s: float = SAVE_EVERY_S,
) -> Ranges:
    """Measures, writes `out` and gives what is in it.

    Raises:
        RequestError: nothing to look at, or the sampler never asks one of the networks.
        NonFiniteError: a layer reads NaN or infinity.
    """
    times = deployment.list_times()
    unused_roles = [role for role, role_times in times.items() if not role_times]
    if unused_roles:
        raise RequestError(
            f"{deployment.sampler} never evaluates the {', '.join(unused_roles)}, so nothing would be known of it",
            remedy="name a schedule that does, such as H1P5R3, or leave the refiner out",
        )
    run = _CalibrationRun(deployment, settings, out.with_suffix(".partial.npz"), say, resume, save_every_s)
    run.run()
    record = RangesRecord(
        RANGES_SCHEMA,
        deployment.model,
        run.settings,
        times,
        tuple(deployment.layers),
        CLIP_METHODS,
        VERSION,
        command,
    )
    ranges = Ranges(record, {name: _summarise_layer(run, name) for name in deployment.layers})
    write_ranges(out, ranges)
    run.partial.unlink(missing_ok=True)
    return ranges


def _check_not_zero(statistics: Mapping[str, LayerStatistics]) -> None:
    """Raises RequestError: a layer that read nothing but zeros has no range to quantise by."""
    dead = [
        name
        for name, layer_statistics in statistics.items()
        if not any(histogram.largest for histogram in layer_statistics.plain)
    ]
    if dead:
        raise RequestError(
            f"{', '.join(dead[:4])}{' …' if len(dead) > 4 else ''} read nothing but zeros on these trajectories",
            remedy="check the checkpoint: so much of it is not used; --precision int8-weights needs no calibration",
        )


class _CalibrationRun:
    """The two passes, and their state."""

    def __init__(
        self,
        deployment: Deployment,
        settings: CalibrationSettings,
        partial: Path,
        say: Say,
        resume: bool,
        save_every_s: float,
    ) -> None:
        self.deployment, self.partial, self.say, self._save_every_s = deployment, partial, say, save_every_s
        self.settings: dict[str, Any] = {
            **deployment.settings,
            "samples": settings.samples,
            "seed": settings.seed,
            "batch": settings.batch,
            "bins": TIME_BINS,
            "rows": NUM_SAMPLES,
        }
        versions = [VERSION, ROUNDING_REVISION, torch.__version__, np.__version__]
        self._key = hash_json([deployment.model, select_loading_inputs(deployment.request), self.settings, versions])
        labels = sorted(deployment.networks.classes)
        self._draw: SampleDraw = make_balanced_draw(labels, settings.samples, FIT_SEED + settings.seed)
        self._batch = settings.batch
        self._num_batches = -(-settings.samples // settings.batch)
        self.statistics = {
            name: LayerStatistics.empty(self.find_linear(name).in_features) for name in deployment.layers
        }
        self.equalisers: dict[str, Floats] = {}
        self._steps_done, self._saved_at = 0, time.monotonic()
        if resume:
            self._load()

    def find_linear(self, name: str) -> nn.Linear:
        """The module of a layer."""
        role, _, path = name.partition("/")
        layer = self.deployment.by_role[role].get_submodule(path)
        assert isinstance(layer, nn.Linear)
        return layer

    def run(self) -> None:
        for step in range(self._steps_done, 2 * self._num_batches):
            is_second_pass, batch = divmod(step, self._num_batches)
            if is_second_pass and not self.equalisers:
                self._compute_equalisers()
            draw = self._draw.select(slice(batch * self._batch, (batch + 1) * self._batch))
            sample_deployment(
                self.deployment,
                draw.labels,
                draw.seeds,
                self._record_equalised if is_second_pass else self._record_plain,
            )
            self._steps_done = step + 1
            self.say(
                f"pass {is_second_pass + 1} of 2: "
                f"{min((batch + 1) * self._batch, len(self._draw))}/{len(self._draw)} images"
            )
            if time.monotonic() - self._saved_at >= self._save_every_s and self._steps_done < 2 * self._num_batches:
                self._save()

    def _compute_equalisers(self) -> None:
        _check_not_zero(self.statistics)
        self.say("equalisers, from the rows that were kept")
        for name, layer_statistics in self.statistics.items():
            samples = torch.from_numpy(np.concatenate(layer_statistics.samples))
            sizes = torch.from_numpy(np.maximum(layer_statistics.high.max(axis=0), -layer_statistics.low.min(axis=0)))
            max_error_share = PAID_ERROR_SHARE if name.endswith("mlp.fc2") else FREE_ERROR_SHARE
            self.equalisers[name] = compute_equaliser(
                samples, self.find_linear(name).weight, sizes, max_error_share
            ).numpy()

    def _record_plain(self, name: str, t: float, x: Tensor) -> None:
        layer_statistics, time_bin = self.statistics[name], find_time_bin(t)
        activations = x.reshape(-1, x.shape[-1])
        np.minimum(layer_statistics.low[time_bin], activations.amin(dim=0).numpy(), out=layer_statistics.low[time_bin])
        np.maximum(
            layer_statistics.high[time_bin], activations.amax(dim=0).numpy(), out=layer_statistics.high[time_bin]
        )
        try:
            layer_statistics.plain[time_bin].add(activations)
        except ValueError as error:
            raise NonFiniteError(
                f"{name} reads {error} at t = {t:.3f}", remedy="check the checkpoint: float32 should not overflow"
            ) from error
        if num_samples := self._count_new_samples(name, layer_statistics.calls):
            generator = np.random.Generator(np.random.Philox(layer_statistics.calls))
            layer_statistics.samples.append(
                activations[torch.from_numpy(generator.integers(0, len(activations), num_samples))].numpy().copy()
            )
        layer_statistics.calls += 1

    def _record_equalised(self, name: str, t: float, x: Tensor) -> None:
        self.statistics[name].equalised[find_time_bin(t)].add(x / torch.from_numpy(self.equalisers[name]))

    def _count_new_samples(self, name: str, call: int) -> int:
        """Rows that a call gives, so that all calls together give `NUM_SAMPLES`."""
        role = name.partition("/")[0]
        total = self._num_batches * sum(e.network == role for e in self.deployment.plan)
        return (call + 1) * NUM_SAMPLES // total - call * NUM_SAMPLES // total

    def _save(self) -> None:
        arrays: dict[str, NDArray[Any]] = {"key": np.asarray(self._key), "done": np.asarray(self._steps_done)}
        for name, layer_statistics in self.statistics.items():
            arrays |= {
                f"{name}/low": layer_statistics.low,
                f"{name}/high": layer_statistics.high,
                f"{name}/calls": np.asarray(layer_statistics.calls),
            }
            if layer_statistics.samples:
                arrays[f"{name}/rows"] = np.concatenate(layer_statistics.samples)
            for kind in ("plain", "equalised"):
                arrays |= {
                    f"{name}/{kind}/{k}": array
                    for k, array in _pack_histograms(getattr(layer_statistics, kind)).items()
                }
        arrays |= {f"{name}/equaliser": array for name, array in self.equalisers.items()}
        save_arrays(self.partial, arrays)
        self._saved_at = time.monotonic()

    def _load(self) -> None:
        arrays = load_arrays(self.partial)
        if arrays is None or str(arrays.get("key")) != self._key:
            if self.partial.exists():
                self.say(f"{self.partial} is of another model, version or settings: beginning anew")
            return
        for name in self.statistics:
            samples = arrays.get(f"{name}/rows")
            plain, equalised = (
                _unpack_histograms({part: arrays[f"{name}/{kind}/{part}"] for part in _HISTOGRAM})
                for kind in ("plain", "equalised")
            )
            self.statistics[name] = LayerStatistics(
                arrays[f"{name}/low"],
                arrays[f"{name}/high"],
                plain,
                equalised,
                [] if samples is None else [samples],
                int(arrays[f"{name}/calls"]),
            )
            if f"{name}/equaliser" in arrays:
                self.equalisers[name] = arrays[f"{name}/equaliser"]
        self._steps_done = int(arrays["done"])
        self.say(f"going on after {self._steps_done} of {2 * self._num_batches} batches")


_HISTOGRAM = ("counts", "exponents", "largest")


def _pack_histograms(histograms: list[Histogram]) -> dict[str, NDArray[Any]]:
    return {
        "counts": np.stack([histogram.counts for histogram in histograms]),
        "exponents": np.asarray([histogram.exponent for histogram in histograms]),
        "largest": np.asarray([histogram.largest for histogram in histograms]),
    }


def _unpack_histograms(arrays: Mapping[str, NDArray[Any]]) -> list[Histogram]:
    parts = zip(*(arrays[part] for part in _HISTOGRAM), strict=True)
    return [Histogram(counts, int(exponent), float(largest)) for counts, exponent, largest in parts]


def compute_equaliser(samples: Tensor, weight: Tensor, sizes: Tensor, max_error_share: float) -> Tensor:
    """What a layer's input is divided by: the strength of SmoothQuant that leaves the least error of its output.

    Args:
        samples: [R, C] of the input.
        weight: [O, C].
        sizes: [C] largest |x| of every channel.
        max_error_share: share of the plain layer's error that it must come below; else ones.

    Returns:
        [C], of geometric mean 1.
    """
    exact = F.linear(samples, weight)
    input_sizes, weight_sizes = sizes.clamp_min(1e-5), weight.abs().amax(dim=0).clamp_min(1e-5)
    best_scales, least_error = (
        torch.ones_like(sizes),
        max_error_share * _measure_output_error(exact, samples, weight, torch.ones_like(sizes)),
    )
    for strength in STRENGTHS:
        scales = input_sizes**strength / weight_sizes ** (1 - strength)
        scales = scales / scales.log().mean().exp()
        error = _measure_output_error(exact, samples, weight, scales)
        if error < least_error:
            best_scales, least_error = scales, error
    return best_scales.float()


def _measure_output_error(exact_output: Tensor, samples: Tensor, weight: Tensor, scales: Tensor) -> float:
    """Squared error of the quantised layer's output, with the clip that suits its input best."""
    equalised = samples / scales
    histogram = Histogram()
    histogram.add(equalised)
    output = F.linear(fake_quantise(equalised, find_clip(histogram, "mse")), fake_quantise_weight(weight * scales))
    return float((output - exact_output).double().square().sum())


def _summarise_layer(run: _CalibrationRun, name: str) -> LayerRanges:
    """A layer's part of the file."""
    statistics, scales, layer = run.statistics[name], run.equalisers[name], run.find_linear(name)
    samples = torch.from_numpy(np.concatenate(statistics.samples))
    tables = {kind: _compute_clips(getattr(statistics, kind)) for kind in ("plain", "equalised")}
    errors = {}
    for kind, divisor in (("plain", np.ones_like(scales)), ("equalised", scales)):
        errors[kind] = np.asarray(
            list(_measure_clip_errors(samples, layer.weight, torch.from_numpy(divisor), tables[kind][-1])), np.float32
        )
    return LayerRanges(
        statistics.low,
        statistics.high,
        scales,
        tables["plain"],
        tables["equalised"],
        errors["plain"],
        errors["equalised"],
    )


def _compute_clips(histograms: list[Histogram]) -> Floats:
    """Clips [T + 1, M]: of every bin, and of all together."""
    all_histograms = [*histograms, merge_histograms(histograms)]
    return np.asarray(
        [[find_clip(histogram, method) for method in CLIP_METHODS] for histogram in all_histograms], np.float32
    )


def _measure_clip_errors(samples: Tensor, weight: Tensor, scales: Tensor, clips: Floats) -> Iterator[float]:
    exact = F.linear(samples, weight)
    exact_power = float(exact.double().square().sum()) or 1.0
    quantised = fake_quantise_weight(weight * scales)
    for clip_value in clips:
        output = F.linear(fake_quantise(samples / scales, float(clip_value)), quantised)
        yield float((output - exact).double().square().sum()) / exact_power


def format_overview(ranges: Ranges) -> str:
    """A few lines: how the methods do, and what equalising brings, over all layers."""
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
    """The record and every layer's clips, for --json."""
    layers = {
        name: {
            kind: dict(zip(CLIP_METHODS, map(float, getattr(layer_ranges, kind)[-1]), strict=True))
            for kind in ("plain", "equalised")
        }
        for name, layer_ranges in ranges.layers.items()
    }
    return {**to_json(ranges.record), "sha256": ranges.sha256, "clips": layers}
