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

from benchmarks.rounds import TimedCall, compute_speedup, time_in_turns
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
"""Seconds; threads with ONNX Runtime's own setting look for work for about 30 ms after a run."""


def load_pipeline(folder: Path, threads: int | None, setting: str) -> Pipeline:
    """A pipeline whose threads wait as `setting` says, with every engine opened."""
    with patch.object(backend, "build_spin_settings", WAIT_SETTINGS[setting]):
        pipeline = Pipeline.load(folder, provider="cpu", threads=threads)
        for variant in pipeline.manifest.vaes:
            pipeline._load_engine(f"decoder-{variant}")
    return pipeline


def measure_settings(
    folder: Path, threads: int | None, schedule: str, rounds: int, pictures: int
) -> dict[str, dict[str, float]]:
    """How many times faster than ONNX Runtime's own setting each one is, and two pipelines than one after the other."""
    with ExitStack() as stack:
        pipelines = {name: stack.enter_context(load_pipeline(folder, threads, name)) for name in WAIT_SETTINGS}
        seconds = time_in_turns(
            {n: lambda p=p: _generate_pictures(p, schedule, 1) for n, p in pipelines.items()},
            rounds,
            pause_seconds=PAUSE_SECONDS,
        )  # type: ignore[misc]
        by_setting = {name: compute_speedup(seconds, ORT_SETTING, name) for name in WAIT_SETTINGS}
        two_pipeline_calls: dict[str, TimedCall] = {}
        for name in (OUR_SETTING, ORT_SETTING):
            two_pipelines = (pipelines[name], stack.enter_context(load_pipeline(folder, threads, name)))
            two_pipeline_calls[f"{name}, in turn"] = lambda two_pipelines=two_pipelines: [
                _generate_pictures(p, schedule, pictures) for p in two_pipelines
            ]  # type: ignore[misc]
            two_pipeline_calls[f"{name}, at once"] = lambda two_pipelines=two_pipelines: _generate_at_once(
                two_pipelines, schedule, pictures
            )  # type: ignore[misc]
        two_pipeline_times = time_in_turns(two_pipeline_calls, max(2, rounds // 3), pause_seconds=PAUSE_SECONDS)
    at_once = {
        name: compute_speedup(two_pipeline_times, f"{name}, in turn", f"{name}, at once")
        for name in (OUR_SETTING, ORT_SETTING)
    }
    return {"setting": by_setting, "two_at_once": at_once}


def _generate_pictures(pipeline: Pipeline, schedule: str, pictures: int) -> None:
    label = sorted(pipeline.manifest.model.classes)[0]
    for seed in range(pictures):
        pipeline.generate(label, seeds=[seed], schedule=schedule)


def _generate_at_once(two_pipelines: tuple[Pipeline, Pipeline], schedule: str, pictures: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pipeline: _generate_pictures(pipeline, schedule, pictures), two_pipelines))


@click.command(cls=Command)
@click.argument("folder", type=PATH)
@click.option("--threads", type=click.IntRange(1), help="[default: physical cores]")
@click.option("--schedule", default="H1P5R3", show_default=True)
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(3))
@click.option("--pictures", default=3, show_default=True, type=click.IntRange(1), help="Of each of two pipelines.")
@click.option("--json", "as_json", is_flag=True)
def main(folder: Path, threads: int | None, schedule: str, rounds: int, pictures: int, as_json: bool) -> None:
    """How threads should wait, and whether two pipelines get in each other's way."""
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
