"""The table of samplers: for each one quality, same-seed error, evaluations and latency on the same engines.

Latents are sampled once per sampler and decoded by every VAE. All that takes long is kept chunk by chunk under one
folder, so a run that was killed goes on where it was, and processes that are given shards share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo.evaluation.progress import Say
from flowturbo.evaluation.quality.engine_images import EngineImages
from flowturbo.evaluation.quality.features import Extractor
from flowturbo.evaluation.quality.metrics import METRICS, compute_metrics
from flowturbo.evaluation.quality.populations import Described, FeatureChunks, check_same_extractor, describe
from flowturbo.evaluation.quality.same_seed import REFERENCE
from flowturbo.evaluation.quality.sampled_latents import SampledLatents, balanced_draw
from flowturbo.evaluation.table.entries import BASELINE, SIT, Row
from flowturbo.evaluation.table.latency import Latency, eager_sampler, engine_sampler, time_samplers
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.system.errors import RequestError
from runtime.system.files import make_folder

EAGER, EAGER_STEPS = "eager", 25
"""The reference repositories' own baseline: 25 Heun steps in uncompiled PyTorch."""

SAME_SEED = ("psnr_db", "ssim", "latent_rms")


@dataclass(frozen=True)
class TableSettings:
    """What to compare, and on how much.

    Attributes:
        num, repeats, seed: images of a repeat; repeats with other seeds; the first seed.
        vaes: decoders.
        guidance, guidance_channels: the engines' defaults if None; a row may have its own.
        baseline: name of the row that acceleration is measured against.
        fine_steps: Heun steps of the sampler that stands for the exact solution.
        same_seed: images of a repeat, the first ones, that are compared with that sampler's; all if None. A few hundred
            tell a solver's error sharply, where distribution metrics want thousands.
        eager: predictor checkpoint of a second, uncompiled baseline in PyTorch.
        timing_rounds, timing_batch: pictures timed per row; images made at once.
    """

    num: int
    vaes: tuple[str, ...]
    repeats: int = 1
    seed: int = 0
    guidance: float | None = None
    guidance_channels: int | None = None
    baseline: str = BASELINE
    fine_steps: int = REFERENCE["steps"]
    same_seed: int | None = None
    eager: str | None = None
    timing_rounds: int = 10
    timing_batch: int = 1


@dataclass(frozen=True)
class Spread:
    """Mean over repeats and their standard deviation, None for one repeat."""

    mean: float
    std: float | None = None


@dataclass(frozen=True)
class RowResult:
    """One sampler with one decoder.

    Attributes:
        nfe: evaluations per picture of each network, a guided one counting once.
        latency: of a picture; acceleration: 1 − its median over that of the baseline with the same decoder.
        values: metrics and same-seed scores by name.
        sampling_seconds, sampling_cpu_seconds: what making the latents took, by the clock and of the CPU, summed over
            the processes that made them.
    """

    name: str
    label: str
    group: str
    sampler: str
    vae: str
    nfe: Mapping[str, float]
    latency: Latency
    acceleration: float
    values: Mapping[str, Spread]
    sampling_seconds: float
    sampling_cpu_seconds: float


@dataclass
class TableResult:
    """All rows; those that these engines cannot run, with the reason; the eager baseline by decoder, if it was asked
    for; wall time of this run."""

    settings: TableSettings
    rows: list[RowResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    eager: dict[str, Latency] = field(default_factory=dict)
    seconds: float = 0.0


def no_baseline(name: str, rows: Sequence[str]) -> RequestError:
    """What to raise where the baseline is none of the rows."""
    return RequestError(
        f"the baseline {name} is no row of this table",
        allowed=", ".join(rows),
        remedy="add it with --rows, or name another with --baseline",
    )


class TableRun:
    """Makes a table on one pipeline.

    Args:
        reference: what pictures are compared with, seen by the same extractor.
        cache: folder of latents and features.
        say: progress.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        extractor: Extractor,
        reference: Described,
        settings: TableSettings,
        cache: Path,
        say: Say,
    ) -> None:
        self._pipeline, self._extractor, self._reference = pipeline, extractor, reference
        self.settings, self._cache, self._say = settings, make_folder(cache), say
        steps = settings.fine_steps
        self._fine = Row("fine", f"Heun {steps}, the reference", SIT, {**REFERENCE, "steps": steps})
        if reference.origin.extractor_hash != extractor.hash:
            raise RequestError(
                f"the reference {reference.origin.what} was seen by {reference.origin.extractor} "
                f"({reference.origin.extractor_hash}), the samples are by {extractor.name} ({extractor.hash})",
                allowed="one extractor for both",
                remedy="name the reference's with --features, or make the reference anew: flowturbo-eval reference",
            )

    def fill(self, rows: Sequence[Row], shard: tuple[int, int]) -> None:
        """Makes this shard's part of all latents and features; any later run on the same cache finds them."""
        for row in self._possible(rows, TableResult(self.settings)):
            for repeat in range(self.settings.repeats):
                for vae in self.settings.vaes:
                    source = self._source(row, vae, repeat)
                    chunks = FeatureChunks(source, self._extractor, self._cache)
                    for _ in chunks.chunks(shard, self._progress(row, vae)):
                        pass  # what counts is that it is on disk

    def run(self, rows: Sequence[Row], done: Callable[[TableResult], None]) -> TableResult:
        """The whole table; `done` is called with what there is after every row.

        Raises:
            RequestError: the baseline is none of the rows that the engines can run.
        """
        result = TableResult(self.settings)
        possible = self._possible(rows, result)
        latencies = self._latencies(possible)
        result.eager = {vae: latencies[EAGER, vae] for vae in self.settings.vaes if (EAGER, vae) in latencies}
        for repeat in range(self.settings.repeats):
            for _ in self._latents(self._fine, repeat).chunks(report=lambda *at: self._say(self._fine.label, *at)):
                pass  # what counts is that it is on disk
        for row in possible:
            for vae in self.settings.vaes:
                result.rows.append(self._row(row, vae, latencies))
                done(result)
        return result

    def _possible(self, rows: Sequence[Row], result: TableResult) -> list[Row]:
        possible = []
        for row in rows:
            try:
                self._request(row, 1)
                possible.append(row)
            except RequestError as error:
                result.skipped[row.label] = error.given
        if not possible:
            raise RequestError("no row that these engines can run", allowed="; ".join(result.skipped.values()))
        return possible

    def _options(self, row: Row) -> dict[str, Any]:
        general = {"guidance": self.settings.guidance, "guidance_channels": self.settings.guidance_channels}
        return {name: value for name, value in {**general, **row.sampler}.items() if value is not None}

    def _request(self, row: Row, images: int) -> Request:
        draw = balanced_draw(list(self._pipeline.manifest.model.classes), images, self.settings.seed)
        return self._pipeline.request(draw.labels, seeds=draw.seeds, **self._options(row))

    def _latents(self, row: Row, repeat: int) -> SampledLatents:
        settings = self.settings
        classes = sorted(self._pipeline.manifest.model.classes)
        draw = balanced_draw(classes, settings.num, settings.seed + repeat * settings.num)
        if row is self._fine:
            draw = draw.part(slice(settings.same_seed))
        return SampledLatents(self._pipeline, draw, self._options(row), self._cache / "latents")

    def _source(self, row: Row, vae: str, repeat: int) -> EngineImages:
        exact = EngineImages(self._pipeline, self._latents(self._fine, repeat), vae, keep=True)
        latents = self._latents(row, repeat)
        same = latents.key == exact.latents.key  # the row of the fine sampler itself: its pictures are there
        return EngineImages(self._pipeline, latents, vae, against=exact, keep=same)

    def _latencies(self, rows: Sequence[Row]) -> dict[tuple[str, str], Latency]:
        settings = self.settings
        names = [row.name for row in rows]
        if settings.baseline not in names:
            raise no_baseline(settings.baseline, names)
        requests = {row.name: self._request(row, settings.timing_batch) for row in rows}
        samplers = {name: engine_sampler(self._pipeline, request) for name, request in requests.items()}
        if settings.eager is not None:
            samplers[EAGER] = eager_sampler(Path(settings.eager), requests[settings.baseline], EAGER_STEPS)
        return time_samplers(
            self._pipeline,
            samplers,
            settings.vaes,
            settings.timing_rounds,
            lambda done, of: self._say("timing", done, of),
        )

    def _row(self, row: Row, vae: str, latencies: Mapping[tuple[str, str], Latency]) -> RowResult:
        repeats = []
        for repeat in range(self.settings.repeats):
            found = describe(
                self._source(row, vae, repeat),
                self._extractor,
                self._cache,
                row.label,
                self._progress(row, vae),
            )
            check_same_extractor([found, self._reference])
            values = compute_metrics(found.population, self._reference.population, leave_out_noise=True)
            repeats.append(values | {name: float(np.mean(found.scores[name])) for name in SAME_SEED})
        evaluations, seconds, cpu_seconds = self._cost(row)
        mine, base = latencies[row.name, vae], latencies[self.settings.baseline, vae]
        return RowResult(
            name=row.name,
            label=row.label,
            group=row.group,
            sampler=self._request(row, 1).sampler.name,
            vae=vae,
            nfe=evaluations,
            latency=mine,
            acceleration=1 - mine.median_ms / base.median_ms,
            values={name: _spread([values[name] for values in repeats]) for name in repeats[0]},
            sampling_seconds=seconds,
            sampling_cpu_seconds=cpu_seconds,
        )

    def _progress(self, row: Row, vae: str) -> Callable[[int, int], None]:
        return lambda done, of: self._say(f"{row.label}, {vae}", done, of)

    def _cost(self, row: Row) -> tuple[dict[str, float], float, float]:
        """Evaluations of each network, averaged over images (guided ones count once), and both seconds."""
        chunks = [c for repeat in range(self.settings.repeats) for c in self._latents(row, repeat).chunks()]
        total = sum(len(chunk.latents) for chunk in chunks)
        calls = {
            network: sum(len(chunk.latents) * chunk.nfe[network] for chunk in chunks) / total
            for network in ("predictor", "refiner")
        }
        return calls, sum(chunk.seconds for chunk in chunks), sum(chunk.cpu_seconds for chunk in chunks)


def _spread(values: Sequence[float]) -> Spread:
    if len(values) == 1 or not np.isfinite(values).all():
        return Spread(float(np.mean(values)))
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)))


def shown_columns(result: TableResult) -> list[str]:
    """Names of the values that at least one row has, metrics first, in the registry's order."""
    present = {name for row in result.rows for name in row.values}
    return [name for name in (*METRICS, *SAME_SEED) if name in present]
