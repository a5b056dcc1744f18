"""python -m benchmarks.batches ENGINES: pictures a second by batch, and what conditioning ahead of time saves.

Conditioning: one evaluation whose modulations are made anew each time, as a network that reads time and label must,
against one that finds them in the cache, as every picture after the first does; and the bytes of weights that an
evaluation then need not read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.rounds import interleaved, ratio
from runtime.cli.command_base import PATH, Command, echo_json
from runtime.pipeline import Pipeline
from runtime.request import Request


def by_batch(pipeline: Pipeline, batches: list[int], schedule: str, rounds: int, *, decode: bool) -> dict[str, float]:
    """Throughput of each batch over that of the first."""
    requests = {str(batch): _request(pipeline, batch, decode=decode, schedule=schedule) for batch in batches}
    times = interleaved({name: lambda r=r: pipeline.run(r) for name, r in requests.items()}, rounds)  # type: ignore[misc]
    first = str(batches[0])
    return {name: ratio(times, first, name) * int(name) / int(first) for name in requests}


def conditioning(pipeline: Pipeline, rounds: int) -> dict[str, float]:
    """An evaluation with modulations made anew over one that finds them, and the shares of time and bytes."""
    request = _request(pipeline, 1, decode=False, solver="euler", steps=1)
    conditioner = pipeline._loop.networks["predictor"].conditioner

    def anew() -> None:
        conditioner.forget()
        pipeline.run(request)

    times = interleaved({"anew": anew, "found": lambda: pipeline.run(request)}, rounds)
    here = (pipeline.resolution, pipeline.choice.target)
    engines = {e.graph: e.path for e in pipeline.manifest.engines if (e.resolution, e.target) == here}
    sizes = {graph.path: graph.weight_bytes for graph in pipeline.manifest.graphs}
    trunk, ahead = (sizes.get(engines[graph], 0) for graph in ("predictor", "conditioning"))
    return {"speedup": ratio(times, "anew", "found"), "trunk_bytes": trunk, "conditioning_bytes": ahead}


def _request(pipeline: Pipeline, batch: int, *, decode: bool, **sampler: Any) -> Request:
    labels = sorted(pipeline.manifest.model.classes)
    request = pipeline.request([labels[i % len(labels)] for i in range(batch)], **sampler)
    return request if decode else replace(request, vae=None)


@click.command(cls=Command)
@click.argument("folder", type=PATH)
@click.option("--batch", "batches", default="1,2,4,8", show_default=True, help="Separated by commas.")
@click.option("--schedule", default="H1P5R3", show_default=True)
@click.option("--decode/--no-decode", default=True, show_default=True)
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True)
def main(folder: Path, batches: str, schedule: str, decode: bool, rounds: int, as_json: bool) -> None:
    """Throughput by batch, and the gain of conditioning ahead of time."""
    sizes = [int(part) for part in batches.split(",")]
    with Pipeline.load(folder, provider="cpu") as pipeline:
        found: dict[str, Any] = {
            "throughput": by_batch(pipeline, sizes, schedule, rounds, decode=decode),
            "conditioning": conditioning(pipeline, rounds),
        }
    if as_json:
        echo_json(found)
        return
    for batch, times in found["throughput"].items():
        click.echo(f"batch {batch}: {times:.2f} × the pictures a second of batch {sizes[0]}")
    ahead = found["conditioning"]
    whole = ahead["trunk_bytes"] + ahead["conditioning_bytes"]
    click.echo(
        f"conditioning ahead: an evaluation is {ahead['speedup']:.2f} × as fast and reads "
        f"{ahead['trunk_bytes'] / 1e6:.0f} MB of weights in place of {whole / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
