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


def make_photographs(root: Path, classes: int = 2, each: int = 8, side: int = 64) -> Path:
    """Noise pictures in class folders."""
    g = np.random.Generator(np.random.Philox(0))
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(g.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(root / f"class{label}/{i}.png")
    return root


def sit_words(latents: Path, out: Path, steps: int) -> list[str]:
    """A small SiT with a checkpoint every third step, so that many kills fall into the writing of one."""
    return [
        *("sit", "--data", str(latents), "--out", str(out), "--batch-size", "8", "--max-steps", str(steps)),
        *("--checkpoint-every", "3", "--keep", "2", "--lr", "1e-3", "--warmup", "20", "--lr-schedule", "cosine"),
        *("--device", "cpu", *NETWORK),
    ]


def _train(words: list[str], log: str) -> None:
    """What a process does: `flowturbo-train`, with what it says in a file."""
    from flowturbo.cli.train import main as flowturbo_train

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    flowturbo_train(words)


class Machine:
    """Starts training processes that share their imports, not their work: forks of a server that has only imported."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.txt"
        os.environ["OMP_NUM_THREADS"] = "1"  # one thread: sums in one order
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        modules = ["flowturbo.cli.train", "flowturbo.training.sit_task", "flowturbo.training.loop", "matplotlib.pyplot"]
        self._context.set_forkserver_preload(modules)

    def start(self, words: list[str]) -> ForkServerProcess:
        """A process that trains."""
        process = self._context.Process(target=_train, args=(words, str(self.log)))
        process.start()
        return process

    def run(self, words: list[str]) -> None:
        """Raises FlowTurboError: the process failed."""
        self.finish(self.start(words))

    def finish(self, process: ForkServerProcess) -> bool:
        """Waits for the end; whether it was killed. Raises FlowTurboError: it failed by itself."""
        process.join()
        code = process.exitcode
        process.close()
        if code not in (0, -9):
            raise FlowTurboError(f"training ended with {code}: {self.log.read_text()[-2000:]}")
        return code == -9

    def kill(self, words: list[str], out: Path, after: float) -> bool:
        """Kills a run `after` so many seconds of having written its configuration; whether it was still alive."""
        started, process = _stamp(out), self.start(words)
        while process.is_alive() and _stamp(out) == started:
            time.sleep(0.002)
        process.join(after)
        process.kill()
        return self.finish(process)


def _stamp(run: Path) -> int:
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
    machine, latents = Machine(folder), folder / "latents"
    data = make_photographs(folder / "data")
    machine.run(["cache-latents", "--data", str(data), "--resolution", "64", "--out", str(latents), "--device", "cpu"])
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    machine.run(sit_words(latents, undisturbed, steps))
    g = np.random.Generator(np.random.Philox(seed))
    resume = [*sit_words(latents, killed, steps), "--resume"]
    hits = sum(machine.kill(resume, killed, seconds * float(g.random())) for _ in range(kills))
    machine.run(resume)
    compare(undisturbed, killed, steps)
    return hits


def compare(a: Path, b: Path, steps: int) -> None:
    """Raises FlowTurboError unless both runs ended alike."""
    from safetensors.torch import load_file

    from flowturbo.training.training_report import read_metrics

    for name in ("final.safetensors", f"step-{steps:08d}.safetensors"):
        ours, theirs = load_file(a / name), load_file(b / name)
        wrong = [key for key in ours if not ours[key].equal(theirs[key])]
        if wrong or ours.keys() != theirs.keys():
            raise FlowTurboError(f"{name} differs: {len(wrong)} of {len(ours)} tensors, e.g. {wrong[:1]}")
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
