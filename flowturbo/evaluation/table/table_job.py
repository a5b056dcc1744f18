"""Make a table as a job: pictures in several processes, then the timing, then the files."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowturbo.evaluation.load_options import LoadOptions
from flowturbo.evaluation.quality.features import Extractor
from flowturbo.evaluation.quality.populations import ImageSet
from flowturbo.evaluation.quality.references import ExtractorOptions, load_reference
from flowturbo.evaluation.table.entries import SamplerEntry
from flowturbo.evaluation.table.table_report import (
    TableFacts,
    replace_infinite,
    table_to_json,
    write_table,
    write_table_json,
)
from flowturbo.evaluation.table.table_run import TableRun, TableSettings, make_baseline_error
from runtime.cli.progress_display import show_progress
from runtime.directory.records import Manifest
from runtime.pipeline import Pipeline, describe_pipeline
from runtime.request import resolve_vae
from runtime.system.errors import CheckpointError, FlowTurboError, RequestError
from runtime.system.files import make_folder
from runtime.system.hardware import count_physical_cores
from runtime.system.progress import Progress


def resolve_vaes(manifest: Manifest, names: Sequence[str]) -> tuple[str, ...]:
    """Return decoder variants of a directory; all if none is named."""
    if not manifest.vaes:
        raise RequestError("this directory has no decoder", remedy="rebuild it with --vae")
    return tuple(str(resolve_vae(manifest, name)) for name in names) or tuple(manifest.vaes)


@dataclass(frozen=True)
class TableJob:
    """All that makes a table, as plain values that can be sent to other processes.

    Attributes:
        engines, resolution, load_options: the directory, and how `Pipeline.load` opens it.
        reference, crop: what pictures are compared with; pixels that a folder of them is cropped to.
        out: folder of the table and of the cache.
    """

    engines: Path
    resolution: int | None
    load_options: LoadOptions
    reference: Path
    crop: int | None
    extractor_options: ExtractorOptions
    entries: tuple[SamplerEntry, ...]
    settings: TableSettings
    out: Path


@contextmanager
def _open_run(job: TableJob, progress: Progress) -> Iterator[tuple[Pipeline, Extractor, ImageSet, TableRun]]:
    cache = make_folder(job.out / "cache")
    load_options: LoadOptions = {**job.load_options, "decode_tile": None}
    with (
        job.extractor_options.open(job.reference, job.load_options.get("threads")) as extractor,
        Pipeline.load(job.engines, resolution=job.resolution, **load_options) as pipeline,
    ):
        settings = replace(job.settings, vaes=resolve_vaes(pipeline.manifest, job.settings.vaes))
        reference = load_reference(job.reference, extractor, resolution=job.crop, cache=cache, progress=progress)
        yield pipeline, extractor, reference, TableRun(pipeline, extractor, reference, settings, cache, progress)


def fill_shard(job: TableJob, shard: tuple[int, int], progress: Progress) -> None:
    """Make one shard's part of all pictures and features, in the cache of the table."""
    with _open_run(job, progress) as (_, _, _, run):
        run.fill_cache(job.entries, shard)


class _WorkerProgress(Progress):
    """Show a worker's progress, and end the worker when its parent is gone."""

    def __init__(self, shown: Progress) -> None:
        self._shown, self._parent_pid = shown, os.getppid()

    def update(self, task: str, done: int, total: int) -> None:
        self._shown.update(task, done, total)
        if os.getppid() != self._parent_pid:
            raise SystemExit


def _fill_in_process(job: TableJob, shard: tuple[int, int]) -> None:
    """Hide errors and warnings: the table's own process meets them again."""
    warnings.simplefilter("ignore")
    with suppress(FlowTurboError), show_progress(quiet=shard[0] > 0) as progress:
        fill_shard(job, shard, _WorkerProgress(progress))


def make_table(job: TableJob, *, processes: int, page: Path, title: str, command: str, progress: Progress) -> Any:
    """Make the table and its files; return it as JSON data.

    Args:
        processes: make pictures in this many processes first; this process alone does the timing afterwards.
        page: Markdown file to write; `title` and `command` are in it.

    Raises:
        RequestError: the baseline is no row.
        CheckpointError: there is no file of the eager baseline.
    """
    started, entry_names = time.perf_counter(), [row.name for row in job.entries]
    # The timing at the end needs both: check them before hours of sampling.
    if job.settings.baseline not in entry_names:
        raise make_baseline_error(job.settings.baseline, entry_names)
    if job.settings.eager is not None and not Path(job.settings.eager).is_file():
        raise CheckpointError(f"no checkpoint at {job.settings.eager}", remedy="check the path of --eager")
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
    with _open_run(job, progress) as (pipeline, extractor, reference, run):
        manifest, settings, origin = pipeline.manifest, run.settings, reference.origin
        engines = describe_pipeline(pipeline) | {
            "hash": manifest.engine_hash,
            "resolution": pipeline.resolution,
            "max_batch": manifest.max_batch,
            "guidance": manifest.defaults.guidance if settings.guidance is None else settings.guidance,
            "guidance_channels": settings.guidance_channels or manifest.defaults.guidance_channels,
        }
        machine = f"{count_physical_cores()} cores"
        facts = TableFacts(command, engines, machine, extractor.name, extractor.hash, origin.what, origin.count)
        result = run.run(job.entries, lambda so_far: write_table_json(so_far, facts, job.out))
    result.seconds = time.perf_counter() - started
    write_table(result, facts, job.out, page, title)
    return replace_infinite(table_to_json(result, facts))
