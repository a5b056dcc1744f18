"""A table as a job: told in plain values, its pictures made in several processes, its files written."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowturbo.evaluation.progress import Say, report_progress
from flowturbo.evaluation.quality.features import Extractor
from flowturbo.evaluation.quality.populations import ImageSet
from flowturbo.evaluation.quality.references import load_reference, open_reference_extractor
from flowturbo.evaluation.table.entries import SamplerEntry
from flowturbo.evaluation.table.table_report import (
    TableFacts,
    replace_infinite,
    table_to_json,
    write_table,
    write_table_json,
)
from flowturbo.evaluation.table.table_run import TableRun, TableSettings, make_baseline_error
from runtime.directory.records import Manifest
from runtime.pipeline import Pipeline, describe_pipeline
from runtime.request import resolve_vae
from runtime.system.errors import CheckpointError, FlowTurboError, RequestError
from runtime.system.files import make_folder
from runtime.system.hardware import count_physical_cores


def resolve_vaes(manifest: Manifest, names: Sequence[str]) -> tuple[str, ...]:
    """Decoder variants of a directory; all if none is named."""
    if not manifest.vaes:
        raise RequestError("this directory has no decoder", remedy="rebuild it with --vae")
    return tuple(str(resolve_vae(manifest, name)) for name in names) or tuple(manifest.vaes)


@dataclass(frozen=True)
class TableJob:
    """All that makes a table, as plain values, so that other processes can be told.

    Attributes:
        engines, resolution, load_options: the directory, and how `Pipeline.load` opens it.
        reference, crop: what pictures are compared with; pixels that a folder of them is cropped to.
        features, input_size, input_range, features_provider: the extractor, as in `open_extractor`.
        vaes: decoders; all if empty.
        settings: the rest of `TableSettings`.
        out: folder of the table and of what is kept.
    """

    engines: Path
    resolution: int | None
    load_options: Mapping[str, Any]
    reference: Path
    crop: int | None
    features: str | None
    input_size: int | None
    input_range: str | None
    features_provider: str
    entries: tuple[SamplerEntry, ...]
    vaes: tuple[str, ...]
    settings: Mapping[str, Any]
    out: Path


@contextmanager
def _open_run(job: TableJob, say: Say) -> Iterator[tuple[Pipeline, Extractor, ImageSet, TableRun]]:
    cache = make_folder(job.out / "cache")
    with (
        open_reference_extractor(
            job.features,
            job.reference,
            job.input_size,
            job.input_range,
            job.features_provider,
            job.load_options.get("threads"),
        ) as extractor,
        Pipeline.load(job.engines, resolution=job.resolution, decode_tile=None, **job.load_options) as pipeline,
    ):
        settings = TableSettings(vaes=resolve_vaes(pipeline.manifest, job.vaes), **job.settings)
        reference = load_reference(
            job.reference,
            extractor,
            resolution=job.crop,
            cache=cache,
            report=lambda done, of: say("reference", done, of),
        )
        yield pipeline, extractor, reference, TableRun(pipeline, extractor, reference, settings, cache, say)


def fill_shard(job: TableJob, shard: tuple[int, int], say: Say) -> None:
    """Makes one shard's part of all pictures and features, to be found by whoever makes the table."""
    with _open_run(job, say) as (_, _, _, run):
        run.fill_cache(job.entries, shard)


def _fill_in_process(job: TableJob, shard: tuple[int, int]) -> None:
    """Errors and warnings are left to the table itself, which meets them again. Ends when its parent is gone."""
    parent_pid = os.getppid()
    warnings.simplefilter("ignore")
    with suppress(FlowTurboError), report_progress(quiet=shard[0] > 0) as say:

        def say_or_exit(what: str, done: int, of: int) -> None:
            say(what, done, of)
            if os.getppid() != parent_pid:
                raise SystemExit

        fill_shard(job, shard, say_or_exit)


def make_table(job: TableJob, *, processes: int, page: Path, title: str, command: str, say: Say) -> dict[str, Any]:
    """Makes the table and its files; gives it as JSON data.

    Args:
        processes: make pictures in so many processes first; timing is done afterwards, in this one alone.
        page: Markdown file to write; `title` and `command` are in it.
    """
    started = time.perf_counter()
    _check_job(job)
    if processes > 1:
        threads = job.load_options.get("threads") or max(1, count_physical_cores() // processes)
        worker_job = replace(job, load_options={**job.load_options, "threads": threads})
        spawn = multiprocessing.get_context("spawn")
        shards = [(worker_job, (i, processes)) for i in range(processes)]
        workers = [spawn.Process(target=_fill_in_process, args=shard, daemon=True) for shard in shards]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if exit_codes := [worker.exitcode for worker in workers if worker.exitcode]:
            warnings.warn(
                f"{len(exit_codes)} processes ended early ({exit_codes[0]}): this one makes the rest", stacklevel=2
            )
    with _open_run(job, say) as (pipeline, extractor, reference, run):
        facts = _build_facts(pipeline, run.settings, extractor, reference, command)
        result = run.run(job.entries, lambda so_far: write_table_json(so_far, facts, job.out))
    result.seconds = time.perf_counter() - started
    write_table(result, facts, job.out, page, title)
    data: dict[str, Any] = replace_infinite(table_to_json(result, facts))
    return data


def _check_job(job: TableJob) -> None:
    """Finds out before hours of sampling what the timing at their end would stumble over.

    Raises:
        RequestError: the baseline is no row.
        CheckpointError: there is no file of the eager baseline.
    """
    settings, entry_names = TableSettings(vaes=job.vaes, **job.settings), [row.name for row in job.entries]
    if settings.baseline not in entry_names:
        raise make_baseline_error(settings.baseline, entry_names)
    if settings.eager is not None and not Path(settings.eager).is_file():
        raise CheckpointError(f"no checkpoint at {settings.eager}", remedy="check the path of --eager")


def _build_facts(
    pipeline: Pipeline, settings: TableSettings, extractor: Extractor, reference: ImageSet, command: str
) -> TableFacts:
    defaults = pipeline.manifest.defaults
    engines = describe_pipeline(pipeline) | {
        "hash": pipeline.manifest.engine_hash,
        "resolution": pipeline.resolution,
        "max_batch": pipeline.manifest.max_batch,
        "guidance": defaults.guidance if settings.guidance is None else settings.guidance,
        "guidance_channels": settings.guidance_channels or defaults.guidance_channels,
    }
    origin = reference.origin
    return TableFacts(
        command, engines, f"{count_physical_cores()} cores", extractor.name, extractor.hash, origin.what, origin.count
    )
