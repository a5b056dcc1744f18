"""python -m benchmarks.threads ENGINES: how ONNX Runtime's threads wait, and two pipelines in one process, in turns.

First, pictures with the waiting that this package sets, with ONNX Runtime's own and with others. Then as many pictures
by two pipelines at once as by one after the other. An idle machine shows what waiting costs a picture, a busy one what
it costs other programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import click

from flowturbo.evaluation.speed.rounds import time_calls
from flowturbo.evaluation.speed.statistics import compute_speedup
from runtime.backends import onnxruntime as backend
from runtime.cli.command_base import PATH, Command, echo_json
from runtime.pipeline import Pipeline

OUR_SETTING, ORT_SETTING = "as set here", "onnxruntime's own"
WAIT_SETTINGS: Mapping[str, Callable[[int], dict[str, str]]] = {
    OUR_SETTING: backend.build_spin_settings,
    ORT_SETTING: lambda threads: {},
    "asleep at once": lambda threads: {"session.intra_op.allow_spinning": "0"},
    "looking until a run ends": lambda threads: {"session.force_spinning_stop": "1"},
    "looking for 200 µs": lambda threads: {
        "session.force_spinning_stop": "1",
        "session.intra_op.spin_duration_us": "200",
    },
}
PAUSE_SECONDS = 0.1
"""Pause before each sample: with ONNX Runtime's own setting, threads look for work for about 30 ms after a run."""


def load_pipeline(folder: Path, threads: int | None, setting: str) -> Pipeline:
    """Load a pipeline with threads that wait as `setting` says, and open all its engines."""
    with patch.object(backend, "build_spin_settings", WAIT_SETTINGS[setting]):
        pipeline = Pipeline.load(folder, provider="cpu", threads=threads)
        pipeline.generate(sorted(pipeline.manifest.model.classes)[0])  # the first picture opens the decoder
    return pipeline


def measure_settings(
    folder: Path, threads: int | None, schedule: str, rounds: int, pictures: int
) -> dict[str, dict[str, float]]:
    """Return the speed of each setting over ONNX Runtime's own, and of two pipelines at once over one by one."""

    def generate(pipeline: Pipeline, count: int) -> None:
        label = sorted(pipeline.manifest.model.classes)[0]
        for seed in range(count):
            pipeline.generate(label, seeds=[seed], schedule=schedule)

    def generate_in_turn(pipelines: tuple[Pipeline, Pipeline]) -> None:
        for pipeline in pipelines:
            generate(pipeline, pictures)

    def generate_at_once(pipelines: tuple[Pipeline, Pipeline]) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(partial(generate, count=pictures), pipelines))

    with ExitStack() as stack:
        pipelines = {name: stack.enter_context(load_pipeline(folder, threads, name)) for name in WAIT_SETTINGS}
        calls = {name: partial(generate, pipeline, 1) for name, pipeline in pipelines.items()}
        times_ms = time_calls(calls, rounds, settle_seconds=PAUSE_SECONDS)
        two_calls: dict[str, Callable[[], None]] = {}
        for name in (OUR_SETTING, ORT_SETTING):
            two_pipelines = (pipelines[name], stack.enter_context(load_pipeline(folder, threads, name)))
            two_calls[f"{name}, in turn"] = partial(generate_in_turn, two_pipelines)
            two_calls[f"{name}, at once"] = partial(generate_at_once, two_pipelines)
        two_ms = time_calls(two_calls, max(2, rounds // 3), settle_seconds=PAUSE_SECONDS)
    return {
        "setting": {name: compute_speedup(times_ms[ORT_SETTING], times_ms[name]) for name in WAIT_SETTINGS},
        "two_at_once": {
            name: compute_speedup(two_ms[f"{name}, in turn"], two_ms[f"{name}, at once"])
            for name in (OUR_SETTING, ORT_SETTING)
        },
    }


@click.command(cls=Command)
@click.argument("folder", type=PATH)
@click.option("--threads", type=click.IntRange(1), help="[default: physical cores]")
@click.option("--schedule", default="H1P5R3", show_default=True)
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(3))
@click.option("--pictures", default=3, show_default=True, type=click.IntRange(1), help="Of each of two pipelines.")
@click.option("--json", "as_json", is_flag=True)
def main(folder: Path, threads: int | None, schedule: str, rounds: int, pictures: int, as_json: bool) -> None:
    """Compare ways in which threads wait, and two pipelines at once with one after the other."""
    results = measure_settings(folder, threads, schedule, rounds, pictures)
    if as_json:
        echo_json(results)
        return
    for name, speedup in results["setting"].items():
        click.echo(f"threads {name}: a picture {speedup:.2f} × as fast as with ONNX Runtime's own setting")
    for name, speedup in results["two_at_once"].items():
        click.echo(f"two pipelines, threads {name}: at once {speedup:.2f} × as fast as one after the other")


if __name__ == "__main__":
    main()
