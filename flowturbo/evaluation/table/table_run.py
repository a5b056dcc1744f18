"""The table of samplers: quality, same-seed error, evaluations and latency of each on the same engines.

Latents are sampled once per sampler and decoded by every VAE. All that takes long is cached chunk by chunk in one
folder, so a killed run continues where it was, and processes with shards share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flowturbo.evaluation.quality.engine_images import EngineImages
from flowturbo.evaluation.quality.features import Extractor
from flowturbo.evaluation.quality.metrics import METRICS, compute_metrics
from flowturbo.evaluation.quality.populations import FeatureCache, ImageSet, check_same_extractor, measure_image_set
from flowturbo.evaluation.quality.same_seed import REFERENCE_SAMPLER, REFERENCE_STEPS
from flowturbo.evaluation.quality.sampled_latents import SampledLatents, make_balanced_draw
from flowturbo.evaluation.table.entries import BASELINE_NAME, SIT, SamplerEntry
from flowturbo.evaluation.table.latency import Latency, make_eager_sampler, make_engine_sampler, time_samplers
from runtime.pipeline import Pipeline
from runtime.request import Request, RequestOptions
from runtime.system.errors import RequestError
from runtime.system.files import make_folder
from runtime.system.progress import Progress

EAGER, EAGER_STEPS = "eager", 25
"""The reference repositories' own baseline: 25 Heun steps in uncompiled PyTorch."""

SAME_SEED_SCORES = ("psnr_db", "ssim", "latent_rms")


@dataclass(frozen=True)
class TableSettings:
    """The settings of a table.

    Attributes:
        num, repeats, seed: images of a repeat; repeats with other seeds; the first seed.
        vaes: decoders; of a job all if empty.
        guidance, guidance_channels: the engines' defaults if None; a row may have its own.
        baseline: name of the row that acceleration is measured against.
        fine_steps: Heun steps of the sampler that stands for the exact solution.
        same_seed: images of a repeat, the first ones, that are compared with that sampler's; all if None. A few hundred
            are enough for a solver's error; distribution metrics need thousands.
        eager: predictor checkpoint of a second, uncompiled baseline in PyTorch.
        timing_rounds, timing_batch: pictures timed per row; images made at once.
    """

    num: int
    vaes: tuple[str, ...] = ()
    repeats: int = 1
    seed: int = 0
    guidance: float | None = None
    guidance_channels: int | None = None
    baseline: str = BASELINE_NAME
    fine_steps: int = REFERENCE_STEPS
    same_seed: int | None = None
    eager: str | None = None
    timing_rounds: int = 10
    timing_batch: int = 1


@dataclass(frozen=True)
class Spread:
    """Mean over repeats and their standard deviation, None for one repeat."""

    mean: float
    std: float | None = None

    @classmethod
    def over_repeats(cls, values: Sequence[float]) -> Spread:
        """Summarise one value of each repeat."""
        has_std = len(values) > 1 and bool(np.isfinite(values).all())
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if has_std else None)


@dataclass(frozen=True)
class RowResult:
    """One sampler with one decoder.

    Attributes:
        nfe: evaluations per picture of each network, a guided one counting once.
        latency: of a picture; acceleration: 1 − its median over that of the baseline with the same decoder.
        values: metrics and same-seed scores by name.
        sampling_seconds, sampling_cpu_seconds: time of making the latents, by the clock and of the CPU, over all
            processes.
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
    """A table.

    Attributes:
        skipped: rows that these engines cannot run, with the reason.
        eager: the eager baseline by decoder, if there is one.
        seconds: wall time of this run.
    """

    settings: TableSettings
    rows: list[RowResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    eager: dict[str, Latency] = field(default_factory=dict)
    seconds: float = 0.0


def make_baseline_error(name: str, row_names: Sequence[str]) -> RequestError:
    """Return the error for a baseline that is none of the rows."""
    return RequestError(
        f"the baseline {name} is no row of this table",
        allowed=", ".join(row_names),
        remedy="add it with --rows, or name another with --baseline",
    )


class TableRun:
    """Make a table on one pipeline.

    Args:
        reference: what pictures are compared with, from the same extractor.
        cache: folder of latents and features.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        extractor: Extractor,
        reference: ImageSet,
        settings: TableSettings,
        cache: Path,
        progress: Progress,
    ) -> None:
        self._pipeline, self._extractor, self._reference = pipeline, extractor, reference
        self.settings, self._cache, self._progress = settings, make_folder(cache), progress
        steps = settings.fine_steps
        self._fine_entry = SamplerEntry(
            "fine", f"Heun {steps}, the reference", SIT, {**REFERENCE_SAMPLER, "steps": steps}
        )
        if reference.origin.extractor_hash != extractor.hash:
            raise RequestError(
                f"the reference {reference.origin.what} was seen by {reference.origin.extractor} "
                f"({reference.origin.extractor_hash}), the samples are by {extractor.name} ({extractor.hash})",
                allowed="one extractor for both",
                remedy="name the reference's with --features, or make the reference again: flowturbo-eval reference",
            )

    def fill_cache(self, entries: Sequence[SamplerEntry], shard: tuple[int, int]) -> None:
        """Make this shard's part of all latents and features; a later run on the same cache reads them."""
        for entry in self._select_possible(entries, TableResult(self.settings)):
            for repeat in range(self.settings.repeats):
                for vae in self.settings.vaes:
                    source = self._open_source(entry, vae, repeat)
                    chunks = FeatureCache(source, self._extractor, self._cache)
                    for _ in chunks.read_chunks(shard, self._progress, f"{entry.label}, {vae}"):
                        pass  # what counts is that it is on disk

    def run(self, entries: Sequence[SamplerEntry], on_row: Callable[[TableResult], None]) -> TableResult:
        """Make the whole table; call `on_row` with the table so far after every row.

        Raises:
            RequestError: the baseline is none of the rows that the engines can run.
        """
        result = TableResult(self.settings)
        possible_entries = self._select_possible(entries, result)
        settings, names = self.settings, [entry.name for entry in possible_entries]
        if settings.baseline not in names:
            raise make_baseline_error(settings.baseline, names)
        requests = {entry.name: self._build_request(entry, settings.timing_batch) for entry in possible_entries}
        samplers = {name: make_engine_sampler(self._pipeline, request) for name, request in requests.items()}
        if settings.eager is not None:
            samplers[EAGER] = make_eager_sampler(Path(settings.eager), requests[settings.baseline], EAGER_STEPS)
        self._progress.stage("timing")
        latencies = time_samplers(self._pipeline, samplers, settings.vaes, settings.timing_rounds, self._progress)
        result.eager = {vae: latencies[EAGER, vae] for vae in self.settings.vaes if (EAGER, vae) in latencies}
        for repeat in range(self.settings.repeats):
            fine_latents = self._open_latents(self._fine_entry, repeat)
            for _ in fine_latents.read_chunks(progress=self._progress, task=self._fine_entry.label):
                pass  # what counts is that it is on disk
        for entry in possible_entries:
            for vae in self.settings.vaes:
                result.rows.append(self._measure_row(entry, vae, latencies))
                on_row(result)
        return result

    def _select_possible(self, entries: Sequence[SamplerEntry], result: TableResult) -> list[SamplerEntry]:
        possible_entries = []
        for entry in entries:
            try:
                self._build_request(entry, 1)
                possible_entries.append(entry)
            except RequestError as error:
                result.skipped[entry.label] = error.given
        if not possible_entries:
            raise RequestError("no row that these engines can run", allowed="; ".join(result.skipped.values()))
        return possible_entries

    def _build_options(self, entry: SamplerEntry) -> RequestOptions:
        general = {"guidance": self.settings.guidance, "guidance_channels": self.settings.guidance_channels}
        return {name: value for name, value in {**general, **entry.sampler}.items() if value is not None}  # type: ignore[return-value]

    def _build_request(self, entry: SamplerEntry, num_images: int) -> Request:
        draw = make_balanced_draw(list(self._pipeline.manifest.model.classes), num_images, self.settings.seed)
        options: RequestOptions = {**self._build_options(entry), "seeds": draw.seeds}
        return self._pipeline.request(draw.labels, **options)

    def _open_latents(self, entry: SamplerEntry, repeat: int) -> SampledLatents:
        settings = self.settings
        classes = sorted(self._pipeline.manifest.model.classes)
        draw = make_balanced_draw(classes, settings.num, settings.seed + repeat * settings.num)
        if entry is self._fine_entry:
            draw = draw.select(slice(settings.same_seed))
        return SampledLatents(self._pipeline, draw, self._build_options(entry), self._cache / "latents")

    def _open_source(self, entry: SamplerEntry, vae: str, repeat: int) -> EngineImages:
        fine_images = EngineImages(self._pipeline, self._open_latents(self._fine_entry, repeat), vae, cache_images=True)
        latents = self._open_latents(entry, repeat)
        is_fine_entry = latents.key == fine_images.latents.key  # its pictures are there
        return EngineImages(self._pipeline, latents, vae, fine=fine_images, cache_images=is_fine_entry)

    def _measure_row(self, entry: SamplerEntry, vae: str, latencies: Mapping[tuple[str, str], Latency]) -> RowResult:
        repeats = []
        for repeat in range(self.settings.repeats):
            image_set = measure_image_set(
                self._open_source(entry, vae, repeat),
                self._extractor,
                self._cache,
                entry.label,
                self._progress,
                f"{entry.label}, {vae}",
            )
            check_same_extractor([image_set, self._reference])
            metric_values = compute_metrics(image_set.population, self._reference.population, leave_out_noise=True)
            repeats.append(metric_values | {name: float(np.mean(image_set.scores[name])) for name in SAME_SEED_SCORES})
        chunks = [c for repeat in range(self.settings.repeats) for c in self._open_latents(entry, repeat).read_chunks()]
        total = sum(len(chunk.latents) for chunk in chunks)
        latency, baseline_latency = latencies[entry.name, vae], latencies[self.settings.baseline, vae]
        return RowResult(
            name=entry.name,
            label=entry.label,
            group=entry.group,
            sampler=self._build_request(entry, 1).sampler.name,
            vae=vae,
            nfe={
                network: sum(len(chunk.latents) * chunk.nfe[network] for chunk in chunks) / total
                for network in ("predictor", "refiner")
            },
            latency=latency,
            acceleration=1 - latency.median_ms / baseline_latency.median_ms,
            values={name: Spread.over_repeats([values[name] for values in repeats]) for name in repeats[0]},
            sampling_seconds=sum(chunk.seconds for chunk in chunks),
            sampling_cpu_seconds=sum(chunk.cpu_seconds for chunk in chunks),
        )


def list_columns(result: TableResult) -> list[str]:
    """Return the names of values that at least one row has, metrics first, in the registry's order."""
    present = {name for row in result.rows for name in row.values}
    return [name for name in (*METRICS, *SAME_SEED_SCORES) if name in present]
