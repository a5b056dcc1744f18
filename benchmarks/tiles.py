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

from benchmarks.memory import resident
from runtime.cli.command_base import PATH, Command, echo_json
from runtime.pipeline import Pipeline
from runtime.sampling.noise import noise_of_seeds


def latents_of(pipeline: Pipeline, photographs: Path | None, count: int) -> NDArray[np.float32]:
    """Of the first photographs by name, cut to a square; or noise."""
    side = pipeline.manifest.side(pipeline.resolution)
    if photographs is None:
        return noise_of_seeds(range(count), (pipeline.manifest.model.channels, side, side))
    files = sorted(path for path in photographs.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pictures = [_square(path, pipeline.resolution) for path in files[:: max(1, len(files) // count)][:count]]
    return pipeline.encode(np.stack(pictures))


def _square(path: Path, side: int) -> NDArray[np.uint8]:
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    return np.asarray(
        picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BICUBIC)
    )


def _child(folder: Path, resolution: int | None, tile: int | None, latents: Path, out: Path) -> None:
    """Decodes one by one in a fresh process; prints its memory and time."""
    with Pipeline.load(folder, provider="cpu", resolution=resolution, decode_tile=tile) as pipeline:
        started, loaded = time.perf_counter(), resident().total
        pictures = [pipeline.decode(one[None]) for one in np.load(latents)]
        seconds = time.perf_counter() - started
    np.save(out, np.concatenate(pictures))
    print(json.dumps({"seconds": seconds, "loaded": loaded, "peak": resident().peak}))


def measure(folder: Path, resolution: int | None, tile: int, photographs: Path | None, count: int, work: Path) -> Any:
    """Time, memory and pictures of the whole decoder and of tiles."""
    with Pipeline.load(folder, provider="cpu", resolution=resolution) as pipeline:
        np.save(work / "latents.npy", latents_of(pipeline, photographs, count))
    found: dict[str, Any] = {}
    for name, size in (("whole", None), ("tiles", tile)):
        words = [str(folder), "--child", str(work), *(["--resolution", str(resolution)] if resolution else [])]
        words += [] if size is None else ["--tile", str(size)]
        command = [sys.executable, "-m", "benchmarks.tiles", *words]
        found[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    whole, tiles = (np.load(work / f"{name}.npy").astype(np.int32) for name in ("whole", "tiles"))
    error = np.abs(whole - tiles)
    found["mean_error"] = error.mean(axis=(1, 2, 3)).tolist()
    found["largest_error"] = int(error.max())
    found["slower"] = found["tiles"]["seconds"] / found["whole"]["seconds"]
    return found


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
        _child(folder, resolution, tile, child / "latents.npy", out)
        return
    if tile is None:
        raise click.UsageError("name the size of the tiles: --tile PX")
    found = measure(folder, resolution, tile, photographs, count, work)
    if as_json:
        echo_json(found)
        return
    for name in ("whole", "tiles"):
        part = found[name]
        click.echo(
            f"{name}: {part['seconds']:.1f} s, memory {part['loaded'] / 1e6:.0f} MB before, "
            f"{part['peak'] / 1e6:.0f} MB at most"
        )
    errors = ", ".join(f"{value:.2f}" for value in found["mean_error"])
    click.echo(
        f"grey levels of 255 between the two, on average per picture: {errors}; at most {found['largest_error']}"
    )


if __name__ == "__main__":
    main()
