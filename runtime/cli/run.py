"""`flowturbo-run`: pictures from an engine directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from runtime.backends import BACKENDS
from runtime.backends.onnxruntime import PROVIDERS
from runtime.cli.common import Command, echo_json, on_terminal
from runtime.errors import RequestError
from runtime.files import make_folder, replacing, write_json
from runtime.images import grid_of, save_png
from runtime.pipeline import Pipeline, Request, Result, describe
from runtime.plan import Callback, count
from runtime.solvers import FLOWTURBO, SOLVERS
from runtime.version import VERSION

MAX_IMAGES = 100_000


@click.command(cls=Command)
@click.option("--engine", "folder", required=True, type=click.Path(path_type=Path), help="Engine directory.")
@click.option("--class", "classes", multiple=True, required=True, help="Class index or name; may be repeated.")
@click.option("--num", default=1, show_default=True, type=click.IntRange(1, MAX_IMAGES), help="Images per class.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**62),
    help="Seed of the first image; the next has seed + 1.",
)
@click.option("--resolution", type=int, help="Pixels a side; must have been built.  [default: the first built]")
@click.option("--schedule", help="FlowTurbo blocks, for example H1P5R3.  [default: the directory's]")
@click.option("--solver", type=click.Choice([FLOWTURBO, *SOLVERS]), help="A solver in place of a schedule.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Steps of the solver (never grid points).")
@click.option("--guidance", type=float, help="Guidance scale; 1 is none.  [default: the directory's]")
@click.option("--vae", help="Decoder variant, as built.  [default: the directory's first]")
@click.option("--backend", type=click.Choice(list(BACKENDS)), help="[default: the fastest that can run here]")
@click.option("--provider", type=click.Choice(list(PROVIDERS)), help="ONNX Runtime execution provider.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: physical cores]")
@click.option("--allow-fallback", is_flag=True, help="Accept a slower provider than the one asked for.")
@click.option("--allow-foreign", is_flag=True, help="Try engines that another device or release built.")
@click.option(
    "--noise", type=click.Path(path_type=Path), help="Initial noise, .npy float32 [B, C, H, W], in place of the seeds'."
)
@click.option(
    "--save-latents", type=click.Path(path_type=Path), help="Write the final latents, .npy float32, as sampled."
)
@click.option(
    "--out",
    default=Path("out"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for pictures and run.json.",
)
@click.option("--force", is_flag=True, help="Allow block orders that are known to fail.")
@click.option("--json", "as_json", is_flag=True, help="Print run.json and nothing else on stdout.")
def main(
    folder: Path,
    classes: tuple[str, ...],
    num: int,
    seed: int,
    resolution: int | None,
    schedule: str | None,
    solver: str | None,
    steps: int | None,
    guidance: float | None,
    vae: str | None,
    backend: str | None,
    provider: str | None,
    threads: int | None,
    allow_fallback: bool,
    allow_foreign: bool,
    noise: Path | None,
    save_latents: Path | None,
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Make pictures: flowturbo-run --engine engines --class 207

    One PNG per image, a grid, and run.json with what ran, every evaluation counted and timings per stage.
    """
    started = time.perf_counter()
    with Pipeline.load(
        folder,
        resolution=resolution,
        backend=backend,
        provider=provider,
        threads=threads,
        allow_fallback=allow_fallback,
        allow_foreign=allow_foreign,
    ) as pipeline:
        loaded = time.perf_counter()
        request = pipeline.request(
            [name for name in classes for _ in range(num)],
            seeds=range(seed, seed + num * len(classes)),
            schedule=schedule,
            solver=solver,
            steps=steps,
            guidance=guidance,
            vae=vae,
            force=force,
        )
        make_folder(out)
        result = _with_progress(pipeline, request, _read_noise(noise), as_json)
        sampled = time.perf_counter()
        report = _report(pipeline, request, result)
        report["files"] = _write(pipeline, result, out, save_latents)
        ended = time.perf_counter()
        report["seconds"] |= {"load": loaded - started, "write": ended - sampled, "total": ended - started}
        write_json(out / "run.json", report)
    if as_json:
        echo_json(report)
    else:
        _summary(report, out)


def _read_noise(path: Path | None) -> NDArray[np.float32] | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            array: NDArray[np.float32] = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise RequestError(
            f"--noise {path} cannot be read: {error}", allowed="a .npy file of one float32 array [B, C, H, W]"
        ) from error
    return array


def _with_progress(pipeline: Pipeline, request: Request, noise: NDArray[np.float32] | None, quiet: bool) -> Result:
    if quiet or not on_terminal():
        return pipeline.run(request, noise=noise)
    batches = -(-len(request.labels) // pipeline.manifest.max_batch)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"sampling {request.sampler.name}", total=len(request.sampler.plan) * batches)
        callback: Callback = lambda event: progress.advance(task)  # noqa: E731 - one expression
        return pipeline.run(request, noise=noise, callback=callback)


def _report(pipeline: Pipeline, request: Request, result: Result) -> dict[str, Any]:
    plan = request.sampler.plan
    return {
        "schema": 1,
        "engine": {
            "folder": str(pipeline.folder),
            "hash": pipeline.manifest.engine_hash,
            "resolution": pipeline.resolution,
        },
        "ran": describe(pipeline),
        "sampler": request.sampler.name,
        "vae": request.vae,
        "nfe": {"predictor": count(plan, "predictor"), "refiner": count(plan, "refiner")},
        "engine_calls": result.usage.calls,
        "images": [
            {"class": label, "name": pipeline.manifest.model.classes[label], "seed": seed, "guidance": scale}
            for label, seed, scale in zip(request.labels, request.seeds, request.scales, strict=True)
        ],
        "seconds": dict(result.usage.seconds),
    }


def _write(pipeline: Pipeline, result: Result, out: Path, save_latents: Path | None) -> list[str]:
    if save_latents is not None:
        make_folder(save_latents.absolute().parent)
        with replacing(save_latents) as aside, open(aside, "wb") as file:
            np.save(file, result.latents)
    if result.images is None:
        return []
    facts = {
        "Software": f"flowturbo {VERSION}",
        "schedule": result.request.sampler.name,
        "engine": pipeline.manifest.engine_hash,
        "vae": result.request.vae,
        "ran": f"{pipeline.ran.backend} {pipeline.ran.provider} {pipeline.precision}",
    }
    names = _file_names(result.request)
    for i, name in enumerate(names):
        label, seed, scale = result.request.labels[i], result.request.seeds[i], result.request.scales[i]
        own = {"class": label, "seed": seed, "guidance": f"{scale:g}"}
        save_png(out / name, result.images[i], facts | own)
    if len(names) > 1:
        save_png(out / "grid.png", grid_of(list(result.images)), facts)
        names.append("grid.png")
    return names


def _file_names(request: Request) -> list[str]:
    return [f"class{label}-seed{seed}.png" for label, seed in zip(request.labels, request.seeds, strict=True)]


def _summary(report: dict[str, Any], out: Path) -> None:
    ran, nfe, seconds = report["ran"], report["nfe"], report["seconds"]
    images: Sequence[Any] = report["images"]
    click.echo(
        f"{len(images)} image{'s' if len(images) > 1 else ''} with {report['sampler']} "
        f"(NFE {nfe['predictor']} predictor + {nfe['refiner']} refiner) in {seconds['total']:.2f} s"
    )
    click.echo(f"ran on {ran['backend']} {ran['provider']} in {ran['precision']} ({ran['chosen']})")
    for note in ran["notes"]:
        click.echo(f"note: {note}")
    if report["vae"] is None:
        click.echo(
            "no decoder: this directory was built with --vae none, so there are latents only (--save-latents FILE.npy)"
        )
    for name in report["files"]:
        click.echo(str(out / name))
