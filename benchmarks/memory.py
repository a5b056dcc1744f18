"""python -m benchmarks.memory ENGINES: memory of a process that loads an engine directory and makes a picture.

A machine must really have anonymous memory; pages of a mapped file can be dropped and read again. Weights are the bytes
of the directory's ONNX initialisers that the process uses.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

from flowturbo.evaluation.speed.memory import read_process_memory
from runtime.cli.command_base import PATH, Command, echo_json
from runtime.directory.manifest import read_manifest


def read_stage_memory() -> dict[str, int]:
    """Return bytes of this process: anonymous memory, pages of mapped files, and the highest total so far."""
    memory = read_process_memory()
    sizes = {"anonymous": memory.anonymous_bytes, "files": memory.file_bytes, "peak": memory.peak_rss_bytes}
    return {name: size for name, size in sizes.items() if size is not None}


def sum_weight_bytes(folder: Path, resolution: int) -> int:
    """Return the bytes of the weights of every graph that a picture needs."""
    manifest = read_manifest(folder)
    used_paths = {
        engine.path
        for engine in manifest.engines
        if engine.resolution == resolution
        and engine.target == "cpu"
        and (not engine.graph.startswith("decoder") or engine.graph == f"decoder-{manifest.defaults.vae}")
    }
    return sum(graph.weight_bytes for graph in manifest.graphs if graph.path in used_paths)


def measure_process_memory(folder: Path, batch: int) -> dict[str, dict[str, int]]:
    """Return the resident bytes of a fresh process at each stage."""
    command = [sys.executable, "-m", "benchmarks.memory", str(folder), "--batch", str(batch), "--child"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    stages: dict[str, dict[str, int]] = json.loads(process.stdout)
    return stages


@click.command(cls=Command)
@click.argument("folder", type=PATH)
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--child", is_flag=True, hidden=True)
@click.option("--json", "as_json", is_flag=True)
def main(folder: Path, batch: int, child: bool, as_json: bool) -> None:
    """Measure the memory of loading and running an engine directory, in a fresh process."""
    if child:
        from flowturbo.evaluation.speed.timed_pipeline import TimedPipeline

        memory = {"imported": read_stage_memory()}
        pipeline = TimedPipeline.open(folder, provider="cpu")
        with pipeline:
            if pipeline.manifest.defaults.vae is not None:
                pipeline.load_decoder(pipeline.manifest.defaults.vae)  # else the first picture loads it
            memory["loaded"] = read_stage_memory()
            request = pipeline.request([sorted(pipeline.manifest.model.classes)[0]] * batch)
            for seed in range(2):
                pipeline.run(request)
                memory[f"picture {seed + 1}"] = read_stage_memory()
        click.echo(json.dumps(memory))
        return
    stages = measure_process_memory(folder, batch)
    weights = sum_weight_bytes(folder, read_manifest(folder).resolutions[0])
    imported, loaded, last = (stages[name]["anonymous"] for name in ("imported", "loaded", "picture 2"))
    activations = last - loaded
    results = {
        "weights": weights,
        "stages": stages,
        "anonymous_per_weights": (loaded - imported) / weights,
        "activations": activations,
        "grown_by_second_picture": last - stages["picture 1"]["anonymous"],
    }
    if as_json:
        echo_json(results)
        return
    click.echo(f"weights: {weights / 1e6:.1f} MB")
    for stage, values in stages.items():
        click.echo(f"{stage}: " + ", ".join(f"{name} {value / 1e6:.1f} MB" for name, value in values.items()))
    click.echo(
        f"loaded, anonymous memory beyond the imports is {results['anonymous_per_weights']:.2f} × the weights; "
        f"activations then take {activations / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
