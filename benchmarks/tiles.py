"""python -m benchmarks.tiles ENGINES --tile PX: time, accuracy and memory of decoding in tiles.

Latents come from photographs where the directory has an encoder and a folder is named, else from normal noise. Memory
is the highest resident size of a separate process that only decodes.
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

from flowturbo.data.photographs import centre_crop
from flowturbo.evaluation.speed.memory import read_process_memory
from runtime.cli.command_base import PATH, Command, echo_json
from runtime.picture_files import list_pictures, open_picture
from runtime.pipeline import Pipeline
from runtime.sampling.noise import sample_noise


def load_latents(pipeline: Pipeline, photographs: Path | None, count: int) -> NDArray[np.float32]:
    """Encode photographs of the folder, centre-cropped; make noise without a folder."""
    side, resolution = pipeline.manifest.compute_side(pipeline.resolution), pipeline.resolution
    if photographs is None:
        return sample_noise(range(count), (pipeline.manifest.model.channels, side, side))
    files = list_pictures(photographs)
    selected = files[:: max(1, len(files) // count)][:count]
    return pipeline.encode(np.stack([centre_crop(open_picture(path), resolution) for path in selected]))


def measure_tiling(
    folder: Path, resolution: int | None, tile: int, photographs: Path | None, count: int, work: Path
) -> Any:
    """Compare the whole decoder with tiles: time, memory and pictures."""
    with Pipeline.load(folder, provider="cpu", resolution=resolution) as pipeline:
        np.save(work / "latents.npy", load_latents(pipeline, photographs, count))
    results: Any = {}
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
    """Compare decoding in tiles with the whole decoder."""
    if child is not None:
        with Pipeline.load(folder, provider="cpu", resolution=resolution, decode_tile=tile) as pipeline:
            start, loaded_bytes = time.perf_counter(), read_process_memory().rss_bytes
            pictures = [pipeline.decode(latent[None]) for latent in np.load(child / "latents.npy")]
            seconds = time.perf_counter() - start
        np.save(child / f"{'whole' if tile is None else 'tiles'}.npy", np.concatenate(pictures))
        peak_bytes = read_process_memory().peak_rss_bytes
        click.echo(json.dumps({"seconds": seconds, "loaded": loaded_bytes, "peak": peak_bytes}))
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
