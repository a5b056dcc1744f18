"""`flowturbo-run`: pictures from an engine directory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from runtime.cli.command_base import PATH, Command, echo_json, on_terminal
from runtime.cli.sampler_options import TILE, backend_options, request_options, sampler_options
from runtime.directory.manifest import MANIFEST
from runtime.execution.fixed_loop import Usage
from runtime.images import grid_of, save_png
from runtime.path_plot import check_plot, plot_paths
from runtime.pipeline import Batch, Pipeline
from runtime.request import Request
from runtime.run_report import mixture_name, noise_name, run_report
from runtime.sampling.controllers import Journal
from runtime.system.errors import RequestError
from runtime.system.files import make_folder, replacing, write_json
from runtime.system.json_codec import to_json
from runtime.system.version import VERSION

MAX_IMAGES = 100_000
GRID, GRID_IMAGES = "grid.png", 64


@click.command(cls=Command)
@click.option("--engine", "folder", required=True, type=PATH, help="Engine directory.")
@click.option(
    "--class",
    "classes",
    multiple=True,
    required=True,
    help="Class index or name; may be repeated. 207:0.6,250:0.4 mixes classes.",
)
@click.option("--num", default=1, show_default=True, type=click.IntRange(1, MAX_IMAGES), help="Images per class.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**62),
    help="Seed of the first image; the next has seed + 1.",
)
@sampler_options
@click.option("--vae", help="Decoder variant, as built.  [default: the directory's first]")
@backend_options
@click.option(
    "--tile",
    "decode_tile",
    type=TILE,
    default="auto",
    show_default=True,
    help="Decode in tiles of so many pixels: slower, in less memory. auto: only where memory is short; none: never.",
)
@click.option("--noise", type=PATH, help="Initial noise, .npy float32 [B, C, H, W], in place of the seeds'.")
@click.option("--save-latents", type=PATH, help="Write the final latents, .npy float32, as sampled.")
@click.option(
    "--reverse",
    type=PATH,
    help="From data to noise, by dopri5 unless told: a picture (needs an encoder) or latents (.npy); --save-latents "
    "keeps the noise.",
)
@click.option("--plot-path", type=PATH, help="Draw the steps that every image took (.png, .svg or .pdf).")
@click.option("--out", default=Path("out"), show_default=True, type=PATH, help="Folder for pictures and run.json.")
@click.option("--json", "as_json", is_flag=True, help="Print run.json and nothing else on stdout.")
@click.version_option(VERSION)
def main(
    folder: Path,
    classes: tuple[str, ...],
    num: int,
    seed: int,
    vae: str | None,
    noise: Path | None,
    save_latents: Path | None,
    reverse: Path | None,
    plot_path: Path | None,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Make pictures: flowturbo-run --engine engines --class 207

    One PNG per image, a grid, and run.json with what ran, every evaluation counted and timings per stage.
    """
    started = time.perf_counter()
    sampling = request_options(options, images=num * len(classes))
    if plot_path is not None:
        check_plot(plot_path, out)
    with Pipeline.load(folder, **options) as pipeline:
        loaded = time.perf_counter()
        sampling |= {"seeds": range(seed, seed + num * len(classes)), "vae": vae}
        if reverse is not None:
            sampling |= {"backwards": True}
            sampling.setdefault("guidance", 1.0)
        request = pipeline.request([name for name in classes for _ in range(num)], **sampling)
        if (out / MANIFEST).exists():
            raise RequestError(f"--out {out} is an engine directory", remedy="name a folder for the pictures")
        make_folder(out)
        drawn = _read_noise(noise) if reverse is None else _read_data(reverse, noise, save_latents, pipeline)
        request = request if reverse is None else replace(request, vae=None)
        if save_latents is not None:
            _check_latents_file(save_latents, out)
        usage = Usage()
        pictures = _Pictures(pipeline, request, out, drawn, keep_latents=save_latents is not None)
        for batch in _shown(pipeline, request, usage, drawn, as_json):
            pictures.add(batch)
        files = pictures.finish(columns=num if len(classes) > 1 else None)
        if save_latents is not None:
            _save_latents(save_latents, pictures.latents)
        report = run_report(pipeline, request, usage, pictures.journals, noise_name(drawn))
        report["files"] = files
        ended = time.perf_counter()
        report["seconds"] |= {"load": loaded - started, "png": pictures.seconds, "total": ended - started}
        write_json(out / "run.json", report)
        if plot_path is not None:
            plot_paths(plot_path, request, pictures.journals)
    if as_json:
        echo_json(report)
    else:
        _summary(report, out, save_latents)


def _read_noise(path: Path | None, option: str = "--noise") -> NDArray[np.float32] | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            array: NDArray[np.float32] = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise RequestError(
            f"{option} {path} cannot be read: {error}", allowed="a .npy file of one float32 array [B, C, H, W]"
        ) from error
    return array


def _read_data(
    path: Path, noise: Path | None, save_latents: Path | None, pipeline: Pipeline
) -> NDArray[np.float32] | None:
    """Latents to go back from: a .npy file of them, or a picture that the encoder takes."""
    if noise is not None or save_latents is None:
        raise RequestError(
            "--reverse " + ("with --noise: the data is where it starts" if noise else "without --save-latents"),
            remedy="name where the noise goes, for example --save-latents noise.npy; --noise noise.npy makes the "
            "picture again",
        )
    if path.suffix == ".npy":
        return _read_noise(path, "--reverse")
    try:
        with Image.open(path) as opened:
            picture = np.asarray(opened.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(
            f"--reverse {path} cannot be read: {error}", allowed="a picture, or latents in a .npy file"
        ) from error
    return pipeline.encode(picture[None])


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
    if request.sampler.rule is not None:
        with Console(stderr=True).status(f"sampling {len(request.labels)} images with {request.sampler.name}"):
            yield from pipeline.batches(request, usage, noise=noise)
        return
    parts = sum(map(len, pipeline.batched(request)))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"sampling {request.sampler.name}", total=len(request.sampler.plan) * parts)
        yield from pipeline.batches(request, usage, noise=noise, callback=lambda event: progress.advance(task))


class _Pictures:
    """Writes pictures as they come, so that what is done is on disk; keeps the first ones for the grid."""

    def __init__(
        self, pipeline: Pipeline, request: Request, out: Path, noise: NDArray[np.float32] | None, *, keep_latents: bool
    ) -> None:
        if request.vae is not None:
            (out / GRID).unlink(missing_ok=True)  # an earlier run's grid would show other pictures
        self._request, self._out, self._keep_latents = request, out, keep_latents
        self._noise = noise_name(noise)
        self._seeded = noise is None or request.sampler.draws > 0
        self._null = pipeline.manifest.model.null_label
        self.journals: list[Journal] = []
        self.latents: list[NDArray[np.float32]] = []
        self.seconds = 0.0
        self._first: list[NDArray[np.uint8]] = []
        self._names: list[str] = []
        self._facts = {
            "Software": f"flowturbo {VERSION}",
            "schedule": request.sampler.name,
            "sampler": json.dumps(to_json(request.sampler.settings), sort_keys=True),
            "engine": pipeline.manifest.engine_hash,
            "vae": request.vae,
            "guidance channels": request.guidance_channels,
            "guidance interval": f"{request.sampler.interval.start:g},{request.sampler.interval.end:g}",
            "ran": f"{pipeline.ran.backend} {pipeline.ran.provider} {pipeline.precision}",
        }

    def add(self, batch: Batch) -> None:
        """Writes a batch's pictures."""
        started = time.perf_counter()
        self.journals += batch.journals
        if self._keep_latents:
            self.latents.append(batch.latents)
        for place, image in enumerate([] if batch.images is None else batch.images, start=batch.start):
            label, scale = mixture_name(self._request.branches[place]), self._request.scales[place]
            origin = self._origin(place)
            own: dict[str, object] = {"class": label, "guidance": f"{scale:g}"}
            if self._request.branches[place].other != self._null:
                own["negative class"] = self._request.branches[place].other
            own |= {} if self._noise is None else {"noise": f"{self._noise}:{place}"}
            own |= {"seed": self._request.seeds[place]} if self._seeded else {}
            self._names.append(f"class{label}-{origin}.png")
            save_png(self._out / self._names[-1], image, self._facts | own)
        if batch.images is not None:
            self._first += list(batch.images[: max(0, GRID_IMAGES - len(self._first))])
        self.seconds += time.perf_counter() - started

    def _origin(self, place: int) -> str:
        """What made this picture and no other, as its file name has it."""
        seed = f"seed{self._request.seeds[place]}"
        return seed if self._noise is None else f"noise{place}" + (f"-{seed}" if self._seeded else "")

    def finish(self, columns: int | None) -> list[str]:
        """Writes the grid of the first pictures, `columns` wide; gives the names of all files."""
        if len(self._names) > 1:
            fits = columns if columns and columns <= GRID_IMAGES**0.5 * 2 else None
            save_png(self._out / GRID, grid_of(self._first, fits), self._facts)
            return [*self._names, GRID]
        return self._names


def _summary(report: dict[str, Any], out: Path, save_latents: Path | None) -> None:
    ran, nfe, seconds = report["ran"], report["nfe"], report["seconds"]
    images: Sequence[Any] = report["images"]
    click.echo(
        f"{len(images)} image{'s' if len(images) > 1 else ''} with {report['sampler']} "
        f"(NFE {nfe['predictor']:g} predictor + {nfe['refiner']:g} refiner"
        f"{', mean over images' if 'nfe' in images[0] else ''}) in {seconds['total']:.2f} s"
    )
    if short := [str(place) for place, image in enumerate(images) if image.get("short")]:
        click.echo(f"warning: the evaluations of --max-nfe ran short for image {', '.join(short[:10])}", err=True)
    click.echo(f"ran on {ran['backend']} {ran['provider']} in {ran['precision']} ({ran['chosen']})")
    for note in ran["notes"]:
        click.echo(f"note: {note}")
    if report["backwards"]:
        click.echo(f"from data to noise: {save_latents}; --noise {save_latents} makes the picture again")
    elif report["vae"] is None:
        where = (
            f"they are in {save_latents}" if save_latents else "nothing was written: --save-latents FILE.npy keeps them"
        )
        click.echo(f"no decoder: this directory was built with --vae none, so there are latents only; {where}")
    for name in report["files"]:
        click.echo(str(out / name))
