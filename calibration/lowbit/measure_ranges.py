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

from calibration.lowbit.fake_quantise import rounded, rounded_weight
from calibration.lowbit.histogram import Histogram, clip, merged
from calibration.lowbit.trajectories import Deployment, sample
from calibration.samplers.probe import FITTED
from calibration.samplers.search_job import as_loaded
from export.lowbit.ranges import BINS, METHODS, SCHEMA, LayerRanges, Ranges, RangesRecord, write_ranges
from export.lowbit.rounding import REVISION
from flowturbo.evaluation.quality.array_cache import digest, read_kept, write_kept
from flowturbo.evaluation.quality.sampled_latents import Draw, balanced_draw
from runtime.system.errors import NonFiniteError, RequestError
from runtime.system.json_codec import to_json
from runtime.system.version import VERSION

Say = Callable[[str], None]
Floats = NDArray[np.float32]
ROWS = 256
"""Rows of a layer's input that are kept, spread over all evaluations."""
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
"""α of SmoothQuant's eq. 3 that are tried for each layer."""
FREE, PAID = 0.99, 0.9
"""An equaliser must bring a layer's output error below this share of what it was: where it costs nothing, and where a
product stays in the trunk (mlp.fc2)."""
SAVE_EVERY_S = 20.0


@dataclass(frozen=True)
class Settings:
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
class Seen:
    """What was seen of one layer's input so far."""

    low: Floats
    high: Floats
    plain: list[Histogram]
    equalised: list[Histogram]
    rows: list[Floats] = field(default_factory=list)
    calls: int = 0

    @classmethod
    def nothing(cls, channels: int) -> Seen:
        low, high = np.zeros((BINS, channels), np.float32), np.zeros((BINS, channels), np.float32)
        return cls(low, high, [Histogram() for _ in range(BINS)], [Histogram() for _ in range(BINS)])


def bin_of(t: float) -> int:
    """The bin of a flow time."""
    return min(int(t * BINS), BINS - 1)


def calibrate(
    deployment: Deployment,
    settings: Settings,
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
    times = deployment.times()
    silent = [role for role, seen in times.items() if not seen]
    if silent:
        raise RequestError(
            f"{deployment.sampler} never evaluates the {', '.join(silent)}, so nothing would be known of it",
            remedy="name a schedule that does, such as H1P5R3, or leave the refiner out",
        )
    job = _Job(deployment, settings, out.with_suffix(".partial.npz"), say, resume, save_every_s)
    job.run()
    record = RangesRecord(
        SCHEMA,
        deployment.model,
        job.settings,
        times,
        tuple(deployment.layers),
        METHODS,
        VERSION,
        command,
    )
    ranges = Ranges(record, {name: _summed(job, name) for name in deployment.layers})
    write_ranges(out, ranges)
    job.partial.unlink(missing_ok=True)
    return ranges


def _check_alive(seen: Mapping[str, Seen]) -> None:
    """Raises RequestError: a layer that read nothing but zeros has no range to quantise by."""
    dead = [name for name, one in seen.items() if not any(part.largest for part in one.plain)]
    if dead:
        raise RequestError(
            f"{', '.join(dead[:4])}{' …' if len(dead) > 4 else ''} read nothing but zeros on these trajectories",
            remedy="check the checkpoint: so much of it is not used; --precision int8-weights needs no calibration",
        )


class _Job:
    """The two passes, and their state."""

    def __init__(
        self, deployment: Deployment, settings: Settings, partial: Path, say: Say, resume: bool, save_every_s: float
    ) -> None:
        self.deployment, self.partial, self.say, self._save_every_s = deployment, partial, say, save_every_s
        self.settings: dict[str, Any] = {
            **deployment.settings,
            "samples": settings.samples,
            "seed": settings.seed,
            "batch": settings.batch,
            "bins": BINS,
            "rows": ROWS,
        }
        versions = [VERSION, REVISION, torch.__version__, np.__version__]
        self._key = digest([deployment.model, as_loaded(deployment.request), self.settings, versions])
        labels = sorted(deployment.networks.classes)
        self._draw: Draw = balanced_draw(labels, settings.samples, FITTED + settings.seed)
        self._batch = settings.batch
        self._batches = -(-settings.samples // settings.batch)
        self.seen = {name: Seen.nothing(self.linear(name).in_features) for name in deployment.layers}
        self.equalisers: dict[str, Floats] = {}
        self._done, self._saved = 0, time.monotonic()
        if resume:
            self._load()

    def linear(self, name: str) -> nn.Linear:
        """The module of a layer."""
        role, _, path = name.partition("/")
        layer = self.deployment.by_role[role].get_submodule(path)
        assert isinstance(layer, nn.Linear)
        return layer

    def run(self) -> None:
        for step in range(self._done, 2 * self._batches):
            second, batch = divmod(step, self._batches)
            if second and not self.equalisers:
                self._equalise()
            part = self._draw.part(slice(batch * self._batch, (batch + 1) * self._batch))
            sample(self.deployment, part.labels, part.seeds, self._second if second else self._first)
            self._done = step + 1
            self.say(
                f"pass {second + 1} of 2: {min((batch + 1) * self._batch, len(self._draw))}/{len(self._draw)} images"
            )
            if time.monotonic() - self._saved >= self._save_every_s and self._done < 2 * self._batches:
                self._save()

    def _equalise(self) -> None:
        _check_alive(self.seen)
        self.say("equalisers, from the rows that were kept")
        for name, seen in self.seen.items():
            rows = torch.from_numpy(np.concatenate(seen.rows))
            sizes = torch.from_numpy(np.maximum(seen.high.max(axis=0), -seen.low.min(axis=0)))
            needed = PAID if name.endswith("mlp.fc2") else FREE
            self.equalisers[name] = equaliser(rows, self.linear(name).weight, sizes, needed).numpy()

    def _first(self, name: str, t: float, x: Tensor) -> None:
        seen, place = self.seen[name], bin_of(t)
        flat = x.reshape(-1, x.shape[-1])
        np.minimum(seen.low[place], flat.amin(dim=0).numpy(), out=seen.low[place])
        np.maximum(seen.high[place], flat.amax(dim=0).numpy(), out=seen.high[place])
        try:
            seen.plain[place].add(flat)
        except ValueError as error:
            raise NonFiniteError(
                f"{name} reads {error} at t = {t:.3f}", remedy="check the checkpoint: float32 should not overflow"
            ) from error
        if kept := self._quota(name, seen.calls):
            generator = np.random.Generator(np.random.Philox(seen.calls))
            seen.rows.append(flat[torch.from_numpy(generator.integers(0, len(flat), kept))].numpy().copy())
        seen.calls += 1

    def _second(self, name: str, t: float, x: Tensor) -> None:
        self.seen[name].equalised[bin_of(t)].add(x / torch.from_numpy(self.equalisers[name]))

    def _quota(self, name: str, call: int) -> int:
        """Rows that a call gives, so that all calls together give `ROWS`."""
        role = name.partition("/")[0]
        total = self._batches * sum(e.network == role for e in self.deployment.plan)
        return (call + 1) * ROWS // total - call * ROWS // total

    def _save(self) -> None:
        arrays: dict[str, NDArray[Any]] = {"key": np.asarray(self._key), "done": np.asarray(self._done)}
        for name, seen in self.seen.items():
            arrays |= {f"{name}/low": seen.low, f"{name}/high": seen.high, f"{name}/calls": np.asarray(seen.calls)}
            if seen.rows:
                arrays[f"{name}/rows"] = np.concatenate(seen.rows)
            for kind in ("plain", "equalised"):
                arrays |= {f"{name}/{kind}/{k}": array for k, array in _packed(getattr(seen, kind)).items()}
        arrays |= {f"{name}/equaliser": array for name, array in self.equalisers.items()}
        write_kept(self.partial, arrays)
        self._saved = time.monotonic()

    def _load(self) -> None:
        kept = read_kept(self.partial)
        if kept is None or str(kept.get("key")) != self._key:
            if self.partial.exists():
                self.say(f"{self.partial} is of another model, version or settings: beginning anew")
            return
        for name in self.seen:
            rows = kept.get(f"{name}/rows")
            plain, equal = (
                _unpacked({part: kept[f"{name}/{kind}/{part}"] for part in _HISTOGRAM})
                for kind in ("plain", "equalised")
            )
            self.seen[name] = Seen(
                kept[f"{name}/low"],
                kept[f"{name}/high"],
                plain,
                equal,
                [] if rows is None else [rows],
                int(kept[f"{name}/calls"]),
            )
            if f"{name}/equaliser" in kept:
                self.equalisers[name] = kept[f"{name}/equaliser"]
        self._done = int(kept["done"])
        self.say(f"going on after {self._done} of {2 * self._batches} batches")


_HISTOGRAM = ("counts", "exponents", "largest")


def _packed(histograms: list[Histogram]) -> dict[str, NDArray[Any]]:
    return {
        "counts": np.stack([one.counts for one in histograms]),
        "exponents": np.asarray([one.exponent for one in histograms]),
        "largest": np.asarray([one.largest for one in histograms]),
    }


def _unpacked(arrays: Mapping[str, NDArray[Any]]) -> list[Histogram]:
    together = zip(*(arrays[part] for part in _HISTOGRAM), strict=True)
    return [Histogram(counts, int(exponent), float(largest)) for counts, exponent, largest in together]


def equaliser(rows: Tensor, weight: Tensor, sizes: Tensor, needed: float) -> Tensor:
    """What a layer's input is divided by: the strength of SmoothQuant that leaves the least error of its output.

    Args:
        rows: [R, C] of the input.
        weight: [O, C].
        sizes: [C] largest |x| of every channel.
        needed: share of the plain layer's error that it must come below; else ones.

    Returns:
        [C], of geometric mean 1.
    """
    exact = F.linear(rows, weight)
    inputs, weights = sizes.clamp_min(1e-5), weight.abs().amax(dim=0).clamp_min(1e-5)
    best, least = torch.ones_like(sizes), needed * _output_error(exact, rows, weight, torch.ones_like(sizes))
    for strength in STRENGTHS:
        s = inputs**strength / weights ** (1 - strength)
        s = s / s.log().mean().exp()
        error = _output_error(exact, rows, weight, s)
        if error < least:
            best, least = s, error
    return best.float()


def _output_error(exact: Tensor, rows: Tensor, weight: Tensor, s: Tensor) -> float:
    """Squared error of the quantised layer's output, with the clip that suits its input best."""
    equal = rows / s
    histogram = Histogram()
    histogram.add(equal)
    found = F.linear(rounded(equal, clip(histogram, "mse")), rounded_weight(weight * s))
    return float((found - exact).double().square().sum())


def _summed(job: _Job, name: str) -> LayerRanges:
    """A layer's part of the file."""
    seen, s, layer = job.seen[name], job.equalisers[name], job.linear(name)
    rows = torch.from_numpy(np.concatenate(seen.rows))
    tables = {kind: _table(getattr(seen, kind)) for kind in ("plain", "equalised")}
    errors = {}
    for kind, divisor in (("plain", np.ones_like(s)), ("equalised", s)):
        errors[kind] = np.asarray(
            list(_errors(rows, layer.weight, torch.from_numpy(divisor), tables[kind][-1])), np.float32
        )
    return LayerRanges(
        seen.low, seen.high, s, tables["plain"], tables["equalised"], errors["plain"], errors["equalised"]
    )


def _table(histograms: list[Histogram]) -> Floats:
    """Clips [T + 1, M]: of every bin, and of all together."""
    every = [*histograms, merged(histograms)]
    return np.asarray([[clip(one, method) for method in METHODS] for one in every], np.float32)


def _errors(rows: Tensor, weight: Tensor, s: Tensor, row: Floats) -> Iterator[float]:
    exact = F.linear(rows, weight)
    power = float(exact.double().square().sum()) or 1.0
    quantised = rounded_weight(weight * s)
    for kept in row:
        found = F.linear(rounded(rows / s, float(kept)), quantised)
        yield float((found - exact).double().square().sum()) / power


def overview(ranges: Ranges) -> str:
    """A few lines: how the methods do, and what equalising brings, over all layers."""
    lines = []
    for kind in ("plain", "equalised"):
        errors = np.stack([getattr(one, f"{kind}_error") for one in ranges.layers.values()])
        means = np.exp(np.log(np.maximum(errors, 1e-12)).mean(axis=0))
        shown = ", ".join(f"{method} {100 * np.sqrt(mean):.2f} %" for method, mean in zip(METHODS, means, strict=True))
        lines.append(f"{kind}: error of a layer's output, geometric mean: {shown}")
    equalised = sum(bool((one.equaliser != 1).any()) for one in ranges.layers.values())
    lines.append(f"{equalised} of {len(ranges.layers)} layers are equalised")
    return "\n".join(lines)


def as_json(ranges: Ranges) -> dict[str, Any]:
    """The record and every layer's clips, for --json."""
    layers = {
        name: {
            kind: dict(zip(METHODS, map(float, getattr(one, kind)[-1]), strict=True)) for kind in ("plain", "equalised")
        }
        for name, one in ranges.layers.items()
    }
    return {**to_json(ranges.record), "sha256": ranges.sha256, "clips": layers}
