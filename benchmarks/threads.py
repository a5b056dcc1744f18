"""python -m benchmarks.threads ENGINES: how ONNX Runtime's threads wait, and two pipelines in one process, in turns.

Pictures of a pipeline whose threads wait as this package sets it, beside ONNX Runtime's own setting and others; then as
many pictures by two pipelines at once as by one after the other. An idle machine shows what waiting costs a picture,
a busy one what it takes from everybody else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import click

from benchmarks.rounds import Condition, interleaved, ratio
from runtime.backends import onnxruntime as backend
from runtime.cli.command_base import PATH, Command, echo_json
from runtime.pipeline import Pipeline

OURS, OWN = "as set here", "onnxruntime's own"
SETTINGS: Mapping[str, Callable[[int], dict[str, str]]] = {
    OURS: backend.spinning,
    OWN: lambda threads: {},
    "asleep at once": lambda threads: {"session.intra_op.allow_spinning": "0"},
    "looking until a run ends": lambda threads: {"session.force_spinning_stop": "1"},
    "looking for 200 µs": lambda threads: {
        "session.force_spinning_stop": "1",
        "session.intra_op.spin_duration_us": "200",
    },
}
PAUSE = 0.1
"""Seconds; threads with ONNX Runtime's own setting look for work for about 30 ms after a run."""


def load(folder: Path, threads: int | None, setting: str) -> Pipeline:
    """A pipeline whose threads wait as `setting` says, with every engine opened."""
    with patch.object(backend, "spinning", SETTINGS[setting]):
        pipeline = Pipeline.load(folder, provider="cpu", threads=threads)
        for variant in pipeline.manifest.vaes:
            pipeline._engine(f"decoder-{variant}")
    return pipeline


def measure(
    folder: Path, threads: int | None, schedule: str, rounds: int, pictures: int
) -> dict[str, dict[str, float]]:
    """How many times faster than ONNX Runtime's own setting each one is, and two pipelines than one after the other."""
    with ExitStack() as stack:
        pipelines = {name: stack.enter_context(load(folder, threads, name)) for name in SETTINGS}
        seconds = interleaved({n: lambda p=p: _make(p, schedule, 1) for n, p in pipelines.items()}, rounds, pause=PAUSE)  # type: ignore[misc]
        by_setting = {name: ratio(seconds, OWN, name) for name in SETTINGS}
        two: dict[str, Condition] = {}
        for name in (OURS, OWN):
            pair = (pipelines[name], stack.enter_context(load(folder, threads, name)))
            two[f"{name}, in turn"] = lambda pair=pair: [_make(p, schedule, pictures) for p in pair]  # type: ignore[misc]
            two[f"{name}, at once"] = lambda pair=pair: _at_once(pair, schedule, pictures)  # type: ignore[misc]
        both = interleaved(two, max(2, rounds // 3), pause=PAUSE)
    at_once = {name: ratio(both, f"{name}, in turn", f"{name}, at once") for name in (OURS, OWN)}
    return {"setting": by_setting, "two_at_once": at_once}


def _make(pipeline: Pipeline, schedule: str, pictures: int) -> None:
    label = sorted(pipeline.manifest.model.classes)[0]
    for seed in range(pictures):
        pipeline.generate(label, seeds=[seed], schedule=schedule)


def _at_once(pair: tuple[Pipeline, Pipeline], schedule: str, pictures: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pipeline: _make(pipeline, schedule, pictures), pair))


@click.command(cls=Command)
@click.argument("folder", type=PATH)
@click.option("--threads", type=click.IntRange(1), help="[default: physical cores]")
@click.option("--schedule", default="H1P5R3", show_default=True)
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(3))
@click.option("--pictures", default=3, show_default=True, type=click.IntRange(1), help="Of each of two pipelines.")
@click.option("--json", "as_json", is_flag=True)
def main(folder: Path, threads: int | None, schedule: str, rounds: int, pictures: int, as_json: bool) -> None:
    """How threads should wait, and whether two pipelines get in each other's way."""
    found = measure(folder, threads, schedule, rounds, pictures)
    if as_json:
        echo_json(found)
        return
    for name, times in found["setting"].items():
        click.echo(f"threads {name}: a picture {times:.2f} × as fast as with ONNX Runtime's own setting")
    for name, times in found["two_at_once"].items():
        click.echo(f"two pipelines, threads {name}: at once {times:.2f} × as fast as one after the other")


if __name__ == "__main__":
    main()
