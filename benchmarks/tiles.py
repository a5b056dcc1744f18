"""python -m benchmarks.tiles ENGINES --tile PX: what decoding in tiles costs in time and accuracy, and saves in memory.

Latents are those of photographs where the directory has an encoder and a folder is named, else normal noise. Memory is
the highest resident size of a process of its own that only decodes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.memory import read_resident_memory
from runtime.cli.command_base import PATH, Command, echo_json
from runtime.pipeline import Pipeline
from runtime.sampling.noise import sample_noise


def load_latents(pipeline: Pipeline, photographs: Path | None, count: int) -> NDArray[np.float32]:
    """Of the first photographs by name, cut to a square; or noise."""
    side = pipeline.manifest.compute_side(pipeline.resolution)
    if photographs is None:
        return sample_noise(range(count), (pipeline.manifest.model.channels, side, side))
    files = sorted(path for path in photographs.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pictures = [_read_square(path, pipeline.resolution) for path in files[:: max(1, len(files) // count)][:count]]
    return pipeline.encode(np.stack(pictures))


def _read_square(path: Path, side: int) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        picture = image.convert("RGB")
    short_side = min(picture.size)
    left, top = (picture.width - short_side) // 2, (picture.height - short_side) // 2
    return np.asarray(
        picture.crop((left, top, left + short_side, top + short_side)).resize((side, side), Image.Resampling.BICUBIC)
    )


def _decode_in_child(folder: Path, resolution: int | None, tile: int | None, latents: Path, out: Path) -> None:
    """Decodes one by one in a fresh process; prints its memory and time."""
    with Pipeline.load(folder, provider="cpu", resolution=resolution, decode_tile=tile) as pipeline:
        start, loaded_bytes = time.perf_counter(), read_resident_memory().total
        pictures = [pipeline.decode(latent[None]) for latent in np.load(latents)]
        seconds = time.perf_counter() - start
    np.save(out, np.concatenate(pictures))
    print(json.dumps({"seconds": seconds, "loaded": loaded_bytes, "peak": read_resident_memory().peak}))


def measure_tiling(
    folder: Path, resolution: int | None, tile: int, photographs: Path | None, count: int, work: Path
) -> Any:
    """Time, memory and pictures of the whole decoder and of tiles."""
    with Pipeline.load(folder, provider="cpu", resolution=resolution) as pipeline:
        np.save(work / "latents.npy", load_latents(pipeline, photographs, count))
    results: dict[str, Any] = {}
    for name, size in (("whole", None), ("tiles", tile)):
        arguments = [str(folder), "--child", str(work), *(["--resolution", str(resolution)] if resolution else [])]
        arguments += [] if size is None else ["--tile", str(size)]
        command = [sys.executable, "-m", "benchmarks.tiles", *arguments]
        results[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    whole, tiles = (np.load(work / f"{name}.npy").astype(np.int32) for name in ("whole", "tiles"))
    error = np.abs(whole - tiles)
    results["mean_error"] = error.mean(axis=(1, 2, 3)).tolist()
    results["largest_error"] = int(error.max())
    results["slower"] = results["tiles"]["seconds"] / results["whole"]["seconds"]
    return results


@click.command(cls=Command)
@click.argument("folder", type=PATH)
@click.option("--tile", type=int, help="Pixels a side of a tile.")
@click.option("--resolution", type=int)
@click.option("--photographs", type=PATH, help="Folder; the directory needs an encoder.")
@click.option("--count", default=4, show_default=True, type=click.IntRange(1))
@click.option("--work", type=PATH, default=Path("."), show_default=True, help="Folder for latents and pictures.")
@click.option("--child", type=PATH, hidden=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    folder: Path,
    tile: int | None,
    resolution: int | None,
    photographs: Path | None,
    count: int,
    work: Path,
    child: Path | None,
    as_json: bool,
) -> None:
    """Decoding in tiles against the whole decoder."""
    if child is not None:
        out = child / f"{'whole' if tile is None else 'tiles'}.npy"
        _decode_in_child(folder, resolution, tile, child / "latents.npy", out)
        return
    if tile is None:
        raise click.UsageError("name the size of the tiles: --tile PX")
    results = measure_tiling(folder, resolution, tile, photographs, count, work)
    if as_json:
        echo_json(results)
        return
    for name in ("whole", "tiles"):
        part = results[name]
        click.echo(
            f"{name}: {part['seconds']:.1f} s, memory {part['loaded'] / 1e6:.0f} MB before, "
            f"{part['peak'] / 1e6:.0f} MB at most"
        )
    errors = ", ".join(f"{value:.2f}" for value in results["mean_error"])
    click.echo(
        f"grey levels of 255 between the two, on average per picture: {errors}; at most {results['largest_error']}"
    )


if __name__ == "__main__":
    main()
