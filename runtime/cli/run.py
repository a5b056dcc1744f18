"""`flowturbo-run`: pictures from an engine directory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
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
from runtime.loop import Usage
from runtime.manifest import MANIFEST
from runtime.pipeline import Batch, Pipeline, describe
from runtime.plan import count
from runtime.request import Request
from runtime.solvers import FLOWTURBO, SOLVERS
from runtime.version import VERSION

MAX_IMAGES = 100_000
GRID, GRID_IMAGES = "grid.png", 64


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
@click.option("--guidance-channels", type=int, help="Latent channels that are guided: 3 as the reference, 4 for all.")
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
@click.version_option(VERSION)
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
    guidance_channels: int | None,
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
            guidance_channels=guidance_channels,
            vae=vae,
            force=force,
        )
        if (out / MANIFEST).exists():
            raise RequestError(f"--out {out} is an engine directory", remedy="name a folder for the pictures")
        make_folder(out)
        drawn = _read_noise(noise)
        if save_latents is not None:
            _check_latents_file(save_latents, out)
        usage = Usage()
        pictures = _Pictures(pipeline, request, out, drawn, keep_latents=save_latents is not None)
        for batch in _shown(pipeline, request, usage, drawn, as_json):
            pictures.add(batch)
        files = pictures.finish(columns=num if len(classes) > 1 else None)
        if save_latents is not None:
            _save_latents(save_latents, pictures.latents)
        report = _report(pipeline, request, usage, drawn)
        report["files"] = files
        ended = time.perf_counter()
        report["seconds"] |= {"load": loaded - started, "png": pictures.seconds, "total": ended - started}
        write_json(out / "run.json", report)
    if as_json:
        echo_json(report)
    else:
        _summary(report, out, save_latents)


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


def _check_latents_file(path: Path, out: Path) -> None:
    if path.resolve() == (out / "run.json").resolve() or path.is_dir() or path.name in ("", ".", ".."):
        raise RequestError(
            f"--save-latents cannot write {path}",
            allowed="a file of its own",
            remedy="name one, for example --save-latents latents.npy",
        )
    make_folder(path.absolute().parent)


def _save_latents(path: Path, latents: list[NDArray[np.float32]]) -> None:
    with replacing(path) as aside, open(aside, "wb") as file:
        np.save(file, np.concatenate(latents))


def _shown(
    pipeline: Pipeline, request: Request, usage: Usage, noise: NDArray[np.float32] | None, quiet: bool
) -> Iterator[Batch]:
    """The batches, with a progress bar where somebody watches."""
    if quiet or not on_terminal():
        yield from pipeline.batches(request, usage, noise=noise)
        return
    batches = -(-len(request.labels) // pipeline.manifest.max_batch)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"sampling {request.sampler.name}", total=len(request.sampler.plan) * batches)
        yield from pipeline.batches(request, usage, noise=noise, callback=lambda event: progress.advance(task))


class _Pictures:
    """Writes pictures as they come, so that what is done is on disk; keeps the first ones for the grid."""

    def __init__(
        self, pipeline: Pipeline, request: Request, out: Path, noise: NDArray[np.float32] | None, *, keep_latents: bool
    ) -> None:
        (out / GRID).unlink(missing_ok=True)  # an earlier run's grid would show other pictures
        self._request, self._out, self._keep_latents = request, out, keep_latents
        self._noise = None if noise is None else noise_name(noise)
        self.latents: list[NDArray[np.float32]] = []
        self.seconds = 0.0
        self._first: list[NDArray[np.uint8]] = []
        self._names: list[str] = []
        self._facts = {
            "Software": f"flowturbo {VERSION}",
            "schedule": request.sampler.name,
            "engine": pipeline.manifest.engine_hash,
            "vae": request.vae,
            "guidance channels": request.guidance_channels,
            "ran": f"{pipeline.ran.backend} {pipeline.ran.provider} {pipeline.precision}",
        }

    def add(self, batch: Batch) -> None:
        """Writes a batch's pictures."""
        started = time.perf_counter()
        if self._keep_latents:
            self.latents.append(batch.latents)
        for place, image in enumerate([] if batch.images is None else batch.images, start=batch.start):
            label, scale = self._request.labels[place], self._request.scales[place]
            origin = f"seed{self._request.seeds[place]}" if self._noise is None else f"noise{place}"
            own: dict[str, object] = {"class": label, "guidance": f"{scale:g}"}
            own |= {"seed": self._request.seeds[place]} if self._noise is None else {"noise": f"{self._noise}:{place}"}
            self._names.append(f"class{label}-{origin}.png")
            save_png(self._out / self._names[-1], image, self._facts | own)
        if batch.images is not None:
            self._first += list(batch.images[: max(0, GRID_IMAGES - len(self._first))])
        self.seconds += time.perf_counter() - started

    def finish(self, columns: int | None) -> list[str]:
        """Writes the grid of the first pictures, `columns` wide; gives the names of all files."""
        if len(self._names) > 1:
            fits = columns if columns and columns <= GRID_IMAGES**0.5 * 2 else None
            save_png(self._out / GRID, grid_of(self._first, fits), self._facts)
            return [*self._names, GRID]
        return self._names


def noise_name(noise: NDArray[np.float32]) -> str:
    """Short hash of a noise file's contents, which stands in for the seed."""
    return hashlib.sha256(np.ascontiguousarray(noise).tobytes()).hexdigest()[:12]


def _report(pipeline: Pipeline, request: Request, usage: Usage, noise: NDArray[np.float32] | None) -> dict[str, Any]:
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
        "guidance_channels": request.guidance_channels,
        "noise": None if noise is None else noise_name(noise),
        "nfe": {"predictor": count(plan, "predictor"), "refiner": count(plan, "refiner")},
        "engine_calls": usage.calls,
        "images": [
            {
                "class": label,
                "name": pipeline.manifest.model.classes[label],
                "seed": seed if noise is None else None,
                "guidance": scale,
            }
            for label, seed, scale in zip(request.labels, request.seeds, request.scales, strict=True)
        ],
        "seconds": dict(usage.seconds),
    }


def _summary(report: dict[str, Any], out: Path, save_latents: Path | None) -> None:
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
        where = (
            f"they are in {save_latents}" if save_latents else "nothing was written: --save-latents FILE.npy keeps them"
        )
        click.echo(f"no decoder: this directory was built with --vae none, so there are latents only; {where}")
    for name in report["files"]:
        click.echo(str(out / name))
