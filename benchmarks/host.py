"""python -m benchmarks.host ENGINES: the host's time around engine calls, and memory over many pictures.

Host time is what the calling thread computes outside of engine calls (noise, guidance, schedule, buffers, conversion to
8 bit), in its own CPU time, so that other programs do not count. Memory is the resident size over many pictures on the
fake device, which holds no memory itself.
"""

from __future__ import annotations

import gc
import math
import time
from pathlib import Path
from statistics import median

import click

from flowturbo.evaluation.speed.memory import read_process_memory
from flowturbo.evaluation.speed.timed_pipeline import HostTimer, TimedPipeline
from runtime.cli.command_base import PATH, Command, echo_json
from runtime.pipeline import Pipeline


def measure_host_time(folder: Path, schedule: str, batch: int, repeats: int) -> dict[str, float]:
    """Return the host's milliseconds of a picture and of an engine call, and their share of the picture; medians."""
    pipeline = TimedPipeline.open(folder, provider="cpu")
    with pipeline:
        pipeline.recorder.timer = HostTimer(time.thread_time_ns)
        labels = [sorted(pipeline.manifest.model.classes)[0]] * batch
        request = pipeline.request(labels, schedule=schedule)
        measurements = []
        for repeat in range(repeats + 1):
            start, cpu_start = time.perf_counter(), time.thread_time()
            pipeline.run(request)
            image_ms, cpu_ms = 1e3 * (time.perf_counter() - start), 1e3 * (time.thread_time() - cpu_start)
            calls_ms = [ms for calls in pipeline.recorder.take().values() for ms in calls]
            if repeat:  # the first one also makes memory and modulations
                measurements.append((image_ms, cpu_ms - sum(calls_ms), len(calls_ms)))
    image, host, calls = (median(column) for column in zip(*measurements, strict=True))
    return {
        "image_ms": image,
        "host_ms": host,
        "engine_calls": calls,
        "host_ms_per_call": host / calls,
        "host_share": host / image,
    }


def measure_memory_growth(folder: Path, images: int) -> dict[str, float]:
    """Return resident megabytes after a tenth of the pictures and after all of them, on the fake device."""
    with Pipeline.load(folder, backend="fake") as pipeline:
        label = sorted(pipeline.manifest.model.classes)[0]

        def run(seeds: range) -> float:
            for seed in seeds:
                pipeline.generate(label, seeds=[seed], guidance=1.0 + seed % 7)
            gc.collect()
            return read_process_memory().rss_bytes or math.nan

        early_bytes, late_bytes = run(range(images // 10)), run(range(images // 10, images))
    return {
        "images": images,
        "early_mb": early_bytes / 1e6,
        "late_mb": late_bytes / 1e6,
        "growth": late_bytes / early_bytes - 1,
    }


@click.command(cls=Command)
@click.argument("folder", type=PATH)
@click.option("--schedule", default="H1P5R3", show_default=True)
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--repeats", default=20, show_default=True, type=click.IntRange(1))
@click.option("--images", default=1000, show_default=True, type=click.IntRange(0), help="For memory; 0 leaves it out.")
@click.option("--json", "as_json", is_flag=True)
def main(folder: Path, schedule: str, batch: int, repeats: int, images: int, as_json: bool) -> None:
    """Measure the host's time around engine calls, and resident memory over many pictures."""
    results = {"host": measure_host_time(folder, schedule, batch, repeats)}
    if images:
        results["memory"] = measure_memory_growth(folder, images)
    if as_json:
        echo_json(results)
        return
    host = results["host"]
    click.echo(
        f"host: {host['host_ms']:.2f} ms of a picture's {host['image_ms']:.1f} ms ({host['host_share']:.2%}), "
        f"{host['host_ms_per_call']:.3f} ms for each of {host['engine_calls']:.0f} engine calls"
    )
    if images:
        memory = results["memory"]
        click.echo(
            f"memory over {images} pictures: {memory['early_mb']:.1f} MB after a tenth of them, "
            f"{memory['late_mb']:.1f} MB after all ({memory['growth']:+.2%})"
        )


if __name__ == "__main__":
    main()
