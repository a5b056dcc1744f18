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

from benchmarks.rounds import compute_speedup, time_in_turns
from runtime.cli.command_base import PATH, Command, echo_json
from runtime.pipeline import Pipeline
from runtime.request import Request


def measure_throughput(
    pipeline: Pipeline, batches: list[int], schedule: str, rounds: int, *, decode: bool
) -> dict[str, float]:
    """Throughput of each batch over that of the first."""
    requests = {
        str(batch): _build_batch_request(pipeline, batch, decode=decode, schedule=schedule) for batch in batches
    }
    times = time_in_turns({name: lambda r=r: pipeline.run(r) for name, r in requests.items()}, rounds)  # type: ignore[misc]
    first_name = str(batches[0])
    return {name: compute_speedup(times, first_name, name) * int(name) / int(first_name) for name in requests}


def measure_conditioning(pipeline: Pipeline, rounds: int) -> dict[str, float]:
    """An evaluation with modulations made anew over one that finds them, and the shares of time and bytes."""
    request = _build_batch_request(pipeline, 1, decode=False, solver="euler", steps=1)
    conditioner = pipeline._loop.networks["predictor"].conditioner

    def run_without_cache() -> None:
        conditioner.clear_cache()
        pipeline.run(request)

    times = time_in_turns({"anew": run_without_cache, "found": lambda: pipeline.run(request)}, rounds)
    build_key = (pipeline.resolution, pipeline.choice.target)
    engine_paths = {e.graph: e.path for e in pipeline.manifest.engines if (e.resolution, e.target) == build_key}
    sizes = {graph.path: graph.weight_bytes for graph in pipeline.manifest.graphs}
    trunk_bytes, conditioning_bytes = (sizes.get(engine_paths[graph], 0) for graph in ("predictor", "conditioning"))
    return {
        "speedup": compute_speedup(times, "anew", "found"),
        "trunk_bytes": trunk_bytes,
        "conditioning_bytes": conditioning_bytes,
    }


def _build_batch_request(pipeline: Pipeline, batch: int, *, decode: bool, **sampler: Any) -> Request:
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
        results: dict[str, Any] = {
            "throughput": measure_throughput(pipeline, sizes, schedule, rounds, decode=decode),
            "conditioning": measure_conditioning(pipeline, rounds),
        }
    if as_json:
        echo_json(results)
        return
    for batch, speedup in results["throughput"].items():
        click.echo(f"batch {batch}: {speedup:.2f} × the pictures a second of batch {sizes[0]}")
    conditioning = results["conditioning"]
    total_bytes = conditioning["trunk_bytes"] + conditioning["conditioning_bytes"]
    click.echo(
        f"conditioning ahead: an evaluation is {conditioning['speedup']:.2f} × as fast and reads "
        f"{conditioning['trunk_bytes'] / 1e6:.0f} MB of weights in place of {total_bytes / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
