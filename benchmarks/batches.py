"""python -m benchmarks.batches ENGINES: pictures a second by batch, and the gain of conditioning ahead of time.

Conditioning: an evaluation that makes its modulations each time, as a network that reads time and label must, against
one that has them in the cache, as every picture after the first; and the bytes of weights that it then need not read.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from flowturbo.evaluation.speed.rounds import time_calls
from flowturbo.evaluation.speed.statistics import compute_speedup
from flowturbo.evaluation.speed.timed_pipeline import TimedPipeline
from runtime.cli.command_base import PATH, Command, echo_json
from runtime.pipeline import Pipeline
from runtime.request import Request


def measure_throughput(
    pipeline: Pipeline, batches: list[int], schedule: str, rounds: int, *, decode: bool
) -> dict[str, float]:
    """Return the throughput of each batch over that of the first."""
    requests = {
        str(batch): _build_batch_request(pipeline, batch, decode=decode, schedule=schedule) for batch in batches
    }
    times_ms = time_calls({name: partial(pipeline.run, request) for name, request in requests.items()}, rounds)
    first = str(batches[0])
    return {name: compute_speedup(times_ms[first], ms) * int(name) / int(first) for name, ms in times_ms.items()}


def measure_conditioning(pipeline: TimedPipeline, rounds: int) -> dict[str, float]:
    """Compare an evaluation that makes its modulations with one that has them; return the bytes of both parts too."""
    request = _build_batch_request(pipeline, 1, decode=False, solver="euler", steps=1)

    def run_without_cache() -> None:
        pipeline.forget_modulations()
        pipeline.run(request)

    times_ms = time_calls({"fresh": run_without_cache, "kept": partial(pipeline.run, request)}, rounds)
    build_key = (pipeline.resolution, pipeline.choice.target)
    engine_paths = {e.graph: e.path for e in pipeline.manifest.engines if (e.resolution, e.target) == build_key}
    sizes = {graph.path: graph.weight_bytes for graph in pipeline.manifest.graphs}
    trunk_bytes, conditioning_bytes = (sizes.get(engine_paths[graph], 0) for graph in ("predictor", "conditioning"))
    return {
        "speedup": compute_speedup(times_ms["fresh"], times_ms["kept"]),
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
    """Measure throughput by batch, and the gain of conditioning ahead of time."""
    sizes = [int(part) for part in batches.split(",")]
    pipeline = TimedPipeline.open(folder, provider="cpu")
    with pipeline:
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
