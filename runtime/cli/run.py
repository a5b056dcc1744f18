"""`flowturbo-run`: make pictures with an engine directory."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from numpy.typing import NDArray

from runtime.cli.command_base import Command, echo_json, is_terminal
from runtime.cli.dataclass_options import options
from runtime.cli.progress_display import show_progress
from runtime.cli.runner_options import TILE, PipelineOptions
from runtime.directory.manifest import MANIFEST_FILE
from runtime.execution.fixed_loop import Usage
from runtime.images import build_image_grid, save_png
from runtime.path_plot import check_plot_path, plot_paths
from runtime.picture_files import PICTURE_FORMATS, read_picture
from runtime.pipeline import ImageBatch, Pipeline
from runtime.request import GuidanceOptions, Request
from runtime.run_report import build_run_report, format_mixture, hash_noise
from runtime.sampling.controllers import Journal
from runtime.sampling.sampler import SamplerChoice
from runtime.system.errors import DataError, RequestError
from runtime.system.files import make_folder, write_atomically, write_json
from runtime.system.json_codec import to_json
from runtime.system.locks import lock_folder
from runtime.system.option_fields import REQUIRED, option
from runtime.system.progress import Progress
from runtime.system.version import VERSION

MAX_IMAGES = 100_000
GRID_FILE, MAX_GRID_IMAGES = "grid.png", 64
RUN_FILE = "run.json"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TileWord = int | Literal["auto", "none"]


@dataclass(frozen=True)
class PictureOptions:
    """Which pictures to make, and where they go."""

    folder: Path = option(REQUIRED, "--engine", help="Engine directory.")
    classes: tuple[str, ...] = option(
        REQUIRED, "--class", help="Class index or name; may be repeated. 207:0.6,250:0.4 mixes classes."
    )
    num: int = option(1, help="Images per class.", minimum=1, maximum=MAX_IMAGES)
    seed: int = option(0, help="Seed of the first image; the next has seed + 1.", minimum=0, maximum=2**62)
    vae: str | None = option(None, help="Decoder variant, as built.", default_text="the directory's first")
    out: Path = option(Path("out"), help="Folder for pictures and run.json.")
    as_json: bool = option(False, "--json", help="Print run.json and nothing else on stdout.")
    tile: TileWord = option(
        "auto",
        help="Decode in tiles of so many pixels: slower, in less memory. auto: where memory is short; none: never.",
        type=TILE,
        advanced=True,
    )
    noise: Path | None = option(
        None, help="Initial noise, .npy float32 [B, C, H, W], in place of the seeds'.", advanced=True
    )
    save_latents: Path | None = option(None, help="Write the final latents, .npy float32, as sampled.", advanced=True)
    reverse: Path | None = option(
        None,
        help="From data to noise, by dopri5 where no sampler is named: a picture (needs an encoder) or latents (.npy); "
        "--save-latents keeps the noise.",
        advanced=True,
    )
    plot_path: Path | None = option(
        None, help="Draw the steps that every image took (.png, .svg or .pdf).", advanced=True
    )


@click.command(cls=Command)
@options(PictureOptions, SamplerChoice, GuidanceOptions, PipelineOptions)
@click.version_option(VERSION)
def main(pictures: PictureOptions, sampler: SamplerChoice, guidance: GuidanceOptions, load: PipelineOptions) -> None:
    """Make pictures: flowturbo-run --engine engines --class 207

    One PNG per image, a grid, and run.json with what ran, every evaluation counted and timings per stage.
    """
    start_time = time.perf_counter()
    out, classes, num, save_latents = pictures.out, pictures.classes, pictures.num, pictures.save_latents
    if pictures.plot_path is not None:
        check_plot_path(pictures.plot_path, out)
    is_reverse = pictures.reverse is not None
    with (
        ExitStack() as stack,
        load.load(pictures.folder, None if pictures.tile == "none" else pictures.tile) as pipeline,
    ):
        loaded_time = time.perf_counter()
        request = pipeline.request(
            [name for name in classes for _ in range(num)],
            seeds=range(pictures.seed, pictures.seed + num * len(classes)),
            vae=pictures.vae,
            sampler=replace(sampler, backwards=is_reverse),
            guidance=1.0 if is_reverse and guidance.guidance is None else guidance.guidance,
            guidance_channels=guidance.guidance_channels,
            negative=guidance.negative,
        )
        if (out / MANIFEST_FILE).exists():
            raise RequestError(f"--out {out} is an engine directory", remedy="name a folder for the pictures")
        stack.enter_context(lock_folder(make_folder(out), "another flowturbo-run"))
        if pictures.reverse is None:
            start_array = _read_noise(pictures.noise)
        else:
            start_array = _read_reverse_input(pictures.reverse, pictures.noise, save_latents, pipeline)
            request = replace(request, vae=None)
        if save_latents is not None:
            if save_latents.is_dir() or save_latents.resolve() == (out / RUN_FILE).resolve():
                raise RequestError(
                    f"--save-latents cannot write {save_latents}",
                    allowed="a file of its own",
                    remedy="name one, for example --save-latents latents.npy",
                )
            make_folder(save_latents.absolute().parent)
        (out / RUN_FILE).unlink(missing_ok=True)  # an earlier run's would list other pictures if this one is stopped
        usage = Usage()
        writer = _PictureWriter(pipeline, request, out, start_array, keep_latents=save_latents is not None)
        with show_progress(quiet=pictures.as_json or not is_terminal()) as progress:
            for batch in _generate(pipeline, request, usage, start_array, progress):
                writer.add(batch)
        files = writer.finish(columns=num if len(classes) > 1 else None)
        if save_latents is not None:
            with write_atomically(save_latents) as temp_path, open(temp_path, "wb") as file:
                np.save(file, np.concatenate(writer.latents))
        report = build_run_report(pipeline, request, usage, writer.journals, hash_noise(start_array))
        report["files"] = files
        # Who takes the folder for this run's samples takes them too.
        report["other_pictures"] = sum(
            path.suffix.lower() in PICTURE_SUFFIXES and path.name not in {*files, GRID_FILE} for path in out.iterdir()
        )
        end_time = time.perf_counter()
        report["seconds"] |= {"load": loaded_time - start_time, "png": writer.seconds, "total": end_time - start_time}
        write_json(out / RUN_FILE, report)
        if pictures.plot_path is not None:
            plot_paths(pictures.plot_path, request, writer.journals)
    if pictures.as_json:
        echo_json(report)
    else:
        _print_summary(report, out, save_latents)


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


def _read_reverse_input(
    path: Path, noise: Path | None, save_latents: Path | None, pipeline: Pipeline
) -> NDArray[np.float32] | None:
    """The latents to go back from: of a .npy file, or of a picture that the encoder takes."""
    if noise is not None or save_latents is None:
        raise RequestError(
            "--reverse " + ("with --noise: the data is where it starts" if noise else "without --save-latents"),
            remedy="name where the noise goes, for example --save-latents noise.npy; --noise noise.npy makes the "
            "picture again",
        )
    if path.suffix == ".npy":
        return _read_noise(path, "--reverse")
    try:
        picture = read_picture(path, upright=True)
    except DataError as error:
        raise RequestError(
            f"--reverse {error.given}",
            allowed=f"a picture ({', '.join(sorted(PICTURE_FORMATS))}), or latents in a .npy file",
            remedy=error.remedy,
        ) from error
    return pipeline.encode(picture[None])


def _generate(
    pipeline: Pipeline, request: Request, usage: Usage, noise: NDArray[np.float32] | None, progress: Progress
) -> Iterator[ImageBatch]:
    """Give the batches, and show how many evaluations are done; adaptive samplers do not know their number."""
    if request.sampler.adaptive_solver is not None:
        progress.stage(f"sampling {len(request.labels)} images with {request.sampler.name}")
        yield from pipeline.generate_batches(request, usage, noise=noise)
        return
    total = len(request.sampler.plan) * sum(map(len, pipeline.split_batches(request)))
    done = itertools.count(1)
    yield from pipeline.generate_batches(
        request,
        usage,
        noise=noise,
        callback=lambda event: progress.update(f"sampling {request.sampler.name}", next(done), total),
    )


class _PictureWriter:
    """Write pictures as they come, so that finished ones are on disk; keep the first ones for the grid."""

    def __init__(
        self, pipeline: Pipeline, request: Request, out: Path, noise: NDArray[np.float32] | None, *, keep_latents: bool
    ) -> None:
        if request.vae is not None:
            (out / GRID_FILE).unlink(missing_ok=True)  # an earlier run's grid would show other pictures
        self._request, self._out, self._keep_latents = request, out, keep_latents
        self._noise_hash = hash_noise(noise)
        self._uses_seeds = noise is None or request.sampler.num_draws > 0
        self._null_label = pipeline.manifest.model.null_label
        self.journals: list[Journal] = []
        self.latents: list[NDArray[np.float32]] = []
        self.seconds = 0.0
        self._grid_images: list[NDArray[np.uint8]] = []
        self._names: list[str] = []
        self._metadata = {
            "Software": f"flowturbo {VERSION}",
            "schedule": request.sampler.name,
            "sampler": json.dumps(to_json(request.sampler.settings), sort_keys=True),
            "engine": pipeline.manifest.engine_hash,
            "vae": request.vae,
            "guidance channels": request.guidance_channels,
            "guidance interval": f"{request.sampler.interval.start:g},{request.sampler.interval.end:g}",
            "ran": f"{pipeline.ran.backend} {pipeline.ran.provider} {pipeline.precision}",
        }

    def add(self, batch: ImageBatch) -> None:
        """Write the pictures of a batch."""
        start_time = time.perf_counter()
        self.journals += batch.journals
        if self._keep_latents:
            self.latents.append(batch.latents)
        for index, image in enumerate([] if batch.images is None else batch.images, start=batch.start):
            label, scale = format_mixture(self._request.conditions[index]), self._request.scales[index]
            origin = f"seed{self._request.seeds[index]}"  # of the file's name: no other picture has the same
            if self._noise_hash is not None:
                origin = f"noise{index}" + (f"-{origin}" if self._uses_seeds else "")
            image_metadata: dict[str, object] = {"class": label, "guidance": f"{scale:g}"}
            if self._request.conditions[index].negative_label != self._null_label:
                image_metadata["negative class"] = self._request.conditions[index].negative_label
            image_metadata |= {} if self._noise_hash is None else {"noise": f"{self._noise_hash}:{index}"}
            image_metadata |= {"seed": self._request.seeds[index]} if self._uses_seeds else {}
            self._names.append(f"class{label}-{origin}.png")
            save_png(self._out / self._names[-1], image, self._metadata | image_metadata)
        if batch.images is not None:
            self._grid_images += list(batch.images[: max(0, MAX_GRID_IMAGES - len(self._grid_images))])
        self.seconds += time.perf_counter() - start_time

    def finish(self, columns: int | None) -> list[str]:
        """Write the grid of the first pictures, `columns` wide; return the names of all files."""
        if len(self._names) > 1:
            grid_columns = columns if columns and columns <= MAX_GRID_IMAGES**0.5 * 2 else None
            save_png(self._out / GRID_FILE, build_image_grid(self._grid_images, grid_columns), self._metadata)
            return [*self._names, GRID_FILE]
        return self._names


def _print_summary(report: dict[str, Any], out: Path, save_latents: Path | None) -> None:
    ran, nfe, seconds = report["ran"], report["nfe"], report["seconds"]
    images: Sequence[Any] = report["images"]
    click.echo(
        f"{len(images)} image{'s' if len(images) > 1 else ''} with {report['sampler']} "
        f"(NFE {nfe['predictor']:g} predictor + {nfe['refiner']:g} refiner"
        f"{', mean over images' if 'nfe' in images[0] else ''}) in {seconds['total']:.2f} s"
    )
    if short_images := [str(index) for index, image in enumerate(images) if image.get("short")]:
        click.echo(
            f"warning: the evaluations of --max-nfe ran short for image {', '.join(short_images[:10])}", err=True
        )
    click.echo(f"ran on {ran['backend']} {ran['provider']} in {ran['precision']} ({ran['chosen']})")
    if num_others := report["other_pictures"]:
        click.echo(
            f"warning: {out} also holds {num_others} picture{'s' if num_others > 1 else ''} of other runs; run.json "
            "lists those of this one\n  Do: name an empty --out where the folder is to be scored",
            err=True,
        )
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


if __name__ == "__main__":
    main()
