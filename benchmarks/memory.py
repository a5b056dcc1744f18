"""python -m benchmarks.memory ENGINES: memory of a process that loads an engine directory and makes a picture.

Anonymous memory is what a machine must really have; pages of a mapped file can be dropped and read again. Weights are
the bytes of the directory's ONNX initialisers that the process uses.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from runtime.cli.command_base import PATH, Command, echo_json
from runtime.directory.manifest import read_manifest

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class ResidentMemory:
    """Bytes: anonymous memory, pages of mapped files, and the highest total so far."""

    anonymous: int
    files: int
    peak: int

    @property
    def total(self) -> int:
        return self.anonymous + self.files


def read_resident_memory() -> ResidentMemory:
    """Of this process, from Linux."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE))
    return ResidentMemory(*(1024 * int(fields[name]) for name in ("RssAnon", "RssFile", "VmHWM")))


def sum_weight_bytes(folder: Path, resolution: int) -> int:
    """Bytes of the weights of every graph that a picture needs."""
    manifest = read_manifest(folder)
    used_paths = {
        engine.path
        for engine in manifest.engines
        if engine.resolution == resolution
        and engine.target == "cpu"
        and (not engine.graph.startswith("decoder") or engine.graph == f"decoder-{manifest.defaults.vae}")
    }
    return sum(graph.weight_bytes for graph in manifest.graphs if graph.path in used_paths)


def _run_child(folder: Path, batch: int) -> None:
    """What the measured process does; prints JSON."""
    from runtime.pipeline import Pipeline

    stages = {"imported": asdict(read_resident_memory())}
    with Pipeline.load(folder, provider="cpu") as pipeline:
        if pipeline.manifest.defaults.vae is not None:
            pipeline._load_engine(f"decoder-{pipeline.manifest.defaults.vae}")  # else it is loaded by the first picture
        stages["loaded"] = asdict(read_resident_memory())
        label = sorted(pipeline.manifest.model.classes)[0]
        request = pipeline.request([label] * batch)
        for seed in range(2):
            pipeline.run(request)
            stages[f"picture {seed + 1}"] = asdict(read_resident_memory())
    print(json.dumps(stages))


def measure_process_memory(folder: Path, batch: int) -> dict[str, dict[str, int]]:
    """Resident bytes of a fresh process at each stage."""
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
    """Anonymous and file-backed memory of loading and running an engine directory, in a fresh process."""
    if child:
        _run_child(folder, batch)
        return
    stages = measure_process_memory(folder, batch)
    weights = sum_weight_bytes(folder, read_manifest(folder).resolutions[0])
    imported, loaded, last = (stages[name]["anonymous"] for name in ("imported", "loaded", "picture 2"))
    results = {
        "weights": weights,
        "stages": stages,
        "anonymous_per_weights": (loaded - imported) / weights,
        "activations": last - loaded,
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
        f"activations then take {results['activations'] / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
