"""python -m benchmarks.kill_resume: kills a training process at random moments, resumes it, and compares the end.

The run must end with the very weights of an undisturbed one, bit by bit, and with one line per step in metrics.jsonl.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import click
import numpy as np
from PIL import Image

from runtime.cli.command_base import Command
from runtime.system.errors import FlowTurboError

NETWORK = ["--width", "32", "--depth", "2", "--heads", "2", "--patch", "2", "--num-classes", "2"]


def make_photographs(root: Path, classes: int = 2, images_per_class: int = 8, side: int = 64) -> Path:
    """Noise pictures in class folders."""
    g = np.random.Generator(np.random.Philox(0))
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(images_per_class):
            Image.fromarray(g.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(root / f"class{label}/{i}.png")
    return root


def build_train_arguments(latents: Path, out: Path, steps: int) -> list[str]:
    """A small SiT with a checkpoint every third step, so that many kills fall into the writing of one."""
    return [
        *("sit", "--data", str(latents), "--out", str(out), "--batch-size", "8", "--max-steps", str(steps)),
        *("--checkpoint-every", "3", "--keep", "2", "--lr", "1e-3", "--warmup", "20", "--lr-schedule", "cosine"),
        *("--device", "cpu", *NETWORK),
    ]


def _run_training(arguments: list[str], log: str) -> None:
    """What a process does: `flowturbo-train`, with what it says in a file."""
    from flowturbo.cli.train import main as flowturbo_train

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    flowturbo_train(arguments)


class TrainingServer:
    """Starts training processes that share their imports, not their work: forks of a server that has only imported."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.txt"
        os.environ["OMP_NUM_THREADS"] = "1"  # one thread: sums in one order
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        modules = ["flowturbo.cli.train", "flowturbo.training.sit_task", "flowturbo.training.loop", "matplotlib.pyplot"]
        self._context.set_forkserver_preload(modules)

    def start(self, arguments: list[str]) -> ForkServerProcess:
        """A process that trains."""
        process = self._context.Process(target=_run_training, args=(arguments, str(self.log)))
        process.start()
        return process

    def run(self, arguments: list[str]) -> None:
        """Raises FlowTurboError: the process failed."""
        self.wait_for(self.start(arguments))

    def wait_for(self, process: ForkServerProcess) -> bool:
        """Waits for the end; whether it was killed. Raises FlowTurboError: it failed by itself."""
        process.join()
        code = process.exitcode
        process.close()
        if code not in (0, -9):
            raise FlowTurboError(f"training ended with {code}: {self.log.read_text()[-2000:]}")
        return code == -9

    def kill(self, arguments: list[str], out: Path, delay_seconds: float) -> bool:
        """Kill a run this long after it wrote its configuration; return whether it was still alive."""
        mtime_before, process = _read_config_mtime_ns(out), self.start(arguments)
        while process.is_alive() and _read_config_mtime_ns(out) == mtime_before:
            time.sleep(0.002)
        process.join(delay_seconds)
        process.kill()
        return self.wait_for(process)


def _read_config_mtime_ns(run: Path) -> int:
    try:
        return (run / "config.json").stat().st_mtime_ns
    except OSError:
        return 0


def kill_and_resume(folder: Path, *, kills: int, seed: int, steps: int, seconds: float = 1.0) -> int:
    """Trains undisturbed and with kills; returns how many kills hit a live process.

    The moments are uniform over the first `seconds` after a start has written its configuration, in which it loads,
    trains and writes; a process that ends before its kill counts as none.

    Raises:
        FlowTurboError: the end differs, or metrics.jsonl has not one line per step.
    """
    server, latents = TrainingServer(folder), folder / "latents"
    data = make_photographs(folder / "data")
    server.run(["cache-latents", "--data", str(data), "--resolution", "64", "--out", str(latents), "--device", "cpu"])
    undisturbed_run, killed_run = folder / "undisturbed", folder / "killed"
    server.run(build_train_arguments(latents, undisturbed_run, steps))
    g = np.random.Generator(np.random.Philox(seed))
    resume_arguments = [*build_train_arguments(latents, killed_run, steps), "--resume"]
    num_hits = sum(server.kill(resume_arguments, killed_run, seconds * float(g.random())) for _ in range(kills))
    server.run(resume_arguments)
    check_identical_runs(undisturbed_run, killed_run, steps)
    return num_hits


def check_identical_runs(a: Path, b: Path, steps: int) -> None:
    """Raises FlowTurboError unless both runs ended alike."""
    from safetensors.torch import load_file

    from flowturbo.training.run_log import read_metrics

    for name in ("final.safetensors", f"step-{steps:08d}.safetensors"):
        tensors_a, tensors_b = load_file(a / name), load_file(b / name)
        differing = [key for key in tensors_a if not tensors_a[key].equal(tensors_b[key])]
        if differing or tensors_a.keys() != tensors_b.keys():
            raise FlowTurboError(f"{name} differs: {len(differing)} of {len(tensors_a)} tensors, e.g. {differing[:1]}")
    rows = [read_metrics(run / "metrics.jsonl") for run in (a, b)]
    if rows[0] != rows[1] or [row["step"] for row in rows[1]] != list(range(steps)):
        raise FlowTurboError("metrics.jsonl differs, or has not exactly one line per step")


@click.command(cls=Command)
@click.option("--kills", default=20, show_default=True, type=click.IntRange(1))
@click.option("--steps", default=1500, show_default=True, type=click.IntRange(3), help="Of the run that is killed.")
@click.option("--seconds", default=2.0, show_default=True, help="Kills fall into the first so many of each start.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the moments.")
def main(kills: int, steps: int, seconds: float, seed: int) -> None:
    """Kill a training run with SIGKILL at random moments, resume it each time, and compare with an undisturbed one."""
    with tempfile.TemporaryDirectory() as folder:
        hits = kill_and_resume(Path(folder), kills=kills, seed=seed, steps=steps, seconds=seconds)
    click.echo(f"{hits} of {kills} kills hit a live process; the weights at the end are identical bit by bit")


if __name__ == "__main__":
    sys.exit(main())
