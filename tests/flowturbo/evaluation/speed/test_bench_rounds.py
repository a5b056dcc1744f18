"""Rounds on a clock of our own: who is visited when, what is kept, and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from recorded_progress import RecordedProgress

from flowturbo.evaluation.speed import rounds
from flowturbo.evaluation.speed.bench_report import compute_drift, summarise_condition
from flowturbo.evaluation.speed.conditions import Condition, EngineSubject, build_engine_subject
from flowturbo.evaluation.speed.rounds import (
    MAX_WARMUP,
    MIN_ROUNDS,
    Rounds,
    Sample,
    measure_in_turns,
    time_calls,
)
from flowturbo.evaluation.speed.timed_pipeline import CUDA_EVENTS, MONOTONIC, HostTimer, TimedPipeline, find_stage
from runtime.backends import fake
from runtime.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore:refiner steps")


def condition(name: str) -> Condition:
    return Condition(name, "engines", "none", "fp32", "H1", {}, 1.0, 3, (0.0, 1.0), 32, 1, None, "fresh")


class Clock:
    """Nanoseconds that pass only where somebody says so."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns

    def pass_ms(self, ms: float) -> None:
        self.ns += round(1e6 * ms)


@dataclass
class Scripted:
    """A subject whose n-th run takes what a function says."""

    condition: Condition
    takes: Callable[[int], float]
    visits: list[str]
    latents: np.ndarray[tuple[int], np.dtype[np.float32]] = field(default_factory=lambda: np.zeros(1, np.float32))
    nfe: dict[str, float] = field(default_factory=dict)
    runs: int = 0
    clock_name: str = MONOTONIC

    @property
    def name(self) -> str:
        return self.condition.name

    def sample(self) -> Sample:
        self.visits.append(self.condition.engine)
        self.runs += 1
        return Sample(self.takes(self.runs), 0.0, {})


def scripted(**takes: Callable[[int], float]) -> tuple[list[Scripted], list[str]]:
    visits: list[str] = []
    return [Scripted(condition(name), how, visits) for name, how in takes.items()], visits


def test_every_round_visits_everybody_once_in_changing_order() -> None:
    subjects, visits = scripted(a=lambda n: 1.0, b=lambda n: 2.0, c=lambda n: 3.0)
    measured = measure_in_turns(subjects, Rounds(repeats=20, duration=None, warmup=0))
    orders = [tuple(visits[i : i + 3]) for i in range(0, len(visits), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 3
    assert [len(series.samples) for series in measured.series] == [20, 20, 20]
    assert len(measured.yardstick_ms) == 20


def test_nothing_is_discarded() -> None:
    subjects, _ = scripted(a=lambda n: 1e6 if n == 4 else 1.0)
    measured = measure_in_turns(subjects, Rounds(repeats=10, duration=None, warmup=0))
    times = [sample.image_ms for sample in measured.series[0].samples]
    assert times == [1.0, 1.0, 1.0, 1e6, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_warming_up_goes_on_until_runs_get_no_faster() -> None:
    subjects, _ = scripted(a=lambda n: [100.0, 50.0, 20.0, 20.0, 20.0][min(n, 5) - 1], b=lambda n: 100 * 0.8**n)
    measured = measure_in_turns(subjects, Rounds(repeats=1, duration=None))
    assert measured.series[0].warmup_ms == [100.0, 50.0, 20.0, 20.0]
    assert len(measured.series[1].warmup_ms) == MAX_WARMUP


def test_a_duration_ends_each_condition_by_itself_after_a_few_rounds() -> None:
    subjects, _ = scripted(slow=lambda n: 3000.0, quick=lambda n: 100.0)
    measured = measure_in_turns(subjects, Rounds(duration=2.0, warmup=0))
    assert [len(series.samples) for series in measured.series] == [MIN_ROUNDS, 20]


def test_a_quick_condition_ends_after_so_many_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "MAX_ROUNDS", 25)
    subjects, _ = scripted(quick=lambda n: 1.0)
    measured = measure_in_turns(subjects, Rounds(duration=1.0, warmup=0))
    assert len(measured.series[0].samples) == 25


def test_whichever_limit_comes_first_ends_it() -> None:
    subjects, _ = scripted(slow=lambda n: 1000.0)
    measured = measure_in_turns(subjects, Rounds(repeats=50, duration=3.5, warmup=0))
    assert len(measured.series[0].samples) == 4


def test_a_limit_of_each_subject_ends_it_after_its_least_rounds() -> None:
    subjects, visits = scripted(slow=lambda n: 3000.0, whole=lambda n: 3000.0)
    limits = [Rounds(repeats=8, duration=2.0, warmup=1, min_repeats=3), Rounds(repeats=8, duration=None, warmup=1)]
    measured = measure_in_turns(subjects, limits)
    assert [len(series.samples) for series in measured.series] == [3, 8]
    assert visits[:2] == ["slow", "whole"]  # they warm up one after the other


def test_progress_says_how_much_is_done() -> None:
    subjects, _ = scripted(a=lambda n: 1.0)
    progress = RecordedProgress()
    measure_in_turns(subjects, Rounds(repeats=2, duration=None, warmup=1), progress=progress)
    assert progress.lines == [f"warming up {subjects[0].name}"]
    assert [done for _, done, _ in progress.updates] == [0, 50, 100]


def test_calls_take_turns_after_one_that_warms_up() -> None:
    seen: list[str] = []
    times = time_calls({name: lambda n=name: seen.append(n) for name in "abc"}, rounds=3)  # type: ignore[misc]
    assert "".join(seen[:3]) == "abc"
    assert [sorted(seen[i : i + 3]) for i in (3, 6, 9)] == [list("abc")] * 3
    assert all(len(each) == 3 for each in times.values())


def test_a_pause_is_not_counted() -> None:
    times = time_calls({"nothing": lambda: None}, rounds=2, settle_seconds=0.05)
    assert max(times["nothing"]) < 50


def test_threads_may_come_to_rest_before_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr(rounds.time, "sleep", rests.append)
    subjects, _ = scripted(a=lambda n: 1.0, b=lambda n: 1.0)
    measure_in_turns(subjects, Rounds(repeats=3, duration=None, warmup=1), settle_seconds=0.05)
    assert rests == [0.05] * 6


def test_a_drift_is_seen() -> None:
    assert compute_drift([1.0] * 5) is None
    assert compute_drift([10.0] * 9) == 1.0
    assert compute_drift([10.0, 10.0, 10.0, 11.0, 11.0, 11.0, 12.0, 12.0, 12.0]) == pytest.approx(1.2)


GRAPHS = {"conditioning": 5.0, "predictor": 20.0, "refiner_conditioning": 1.0, "refiner": 2.0, "decoder-small": 30.0}


@pytest.fixture
def clocked(tiny_engines: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[EngineSubject, Clock]:
    """A real directory on the fake device, whose every call takes what `GRAPHS` says, on a clock of our own."""
    clock, run = Clock(), fake.FakeEngine.run

    def timed_run(self: fake.FakeEngine, inputs: object, outputs: object) -> None:
        run(self, inputs, outputs)  # type: ignore[arg-type]
        clock.pass_ms(GRAPHS[self._file.graph])

    monkeypatch.setattr(fake.FakeEngine, "run", timed_run)
    pipeline = TimedPipeline.open(tiny_engines, backend="fake")
    pipeline.recorder.timer = HostTimer(clock)
    subject = build_engine_subject("tiny", pipeline, (), 2, {"schedule": "H1P2R3"}, conditioning="fresh")
    subject.clock = clock
    return subject, clock


@pytest.mark.parametrize(
    ("graph", "stage"),
    [
        ("conditioning", "conditioning"),
        ("refiner_conditioning", "conditioning"),
        ("predictor", "predictor"),
        ("decoder-ema", "decoder"),
        ("head-ema", "decoder"),
        ("tile-ema", "decoder"),
    ],
)
def test_graphs_belong_to_stages(graph: str, stage: str) -> None:
    assert find_stage(graph) == stage


def test_every_engine_call_of_a_picture_is_timed(clocked: tuple[EngineSubject, Clock]) -> None:
    subject, _ = clocked
    sample = subject.sample()
    assert subject.nfe == {"predictor": 4, "refiner": 6}
    assert sample.calls == {
        "conditioning": [5.0, 1.0],
        "predictor": [20.0] * 4,
        "refiner": [2.0] * 6,
        "decoder": [30.0],
    }
    assert sample.image_ms == 5 + 1 + 80 + 12 + 30
    assert (sample.png_ms, sample.host_ms) == (0.0, 0.0)


def test_conditioning_is_paid_for_anew_or_kept(clocked: tuple[EngineSubject, Clock]) -> None:
    subject, _ = clocked
    first, second = subject.sample(), subject.sample()
    assert first.calls["conditioning"] == second.calls["conditioning"] == [5.0, 1.0]
    kept = build_engine_subject("tiny", subject.pipeline, (), 2, {"schedule": "H1P2R3"}, conditioning="kept")
    assert kept.sample().calls["conditioning"] == []


def test_host_time_is_what_is_left(clocked: tuple[EngineSubject, Clock], monkeypatch: pytest.MonkeyPatch) -> None:
    subject, clock = clocked
    batches = Pipeline.generate_batches

    def slower(self: Pipeline, *arguments: object, **more: object) -> object:
        clock.pass_ms(7.0)
        return batches(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "generate_batches", slower)
    assert subject.sample().host_ms == 7.0


def test_a_timed_pipeline_makes_the_same_latents(tiny_engines: Path) -> None:
    """On real engines: the wrapper changes nothing but the clock."""
    with Pipeline.load(tiny_engines, threads=1) as plain, TimedPipeline.open(tiny_engines, threads=1) as timed:
        for options in ({"schedule": "H1P1R1"}, {"adaptive": "lte", "tolerance": 0.1}):
            request = plain.request([1, 2], **options)  # type: ignore[arg-type]
            result = timed.run(request)
            assert np.array_equal(plain.run(request).latents, result.latents)
            calls = timed.recorder.take()
            assert {stage: len(ms) for stage, ms in calls.items() if ms} == result.usage.calls
        assert timed.weight_bytes() == sum(g.weight_bytes for g in timed.manifest.graphs)


def test_a_result_says_what_its_samples_say(clocked: tuple[EngineSubject, Clock]) -> None:
    subject, clock = clocked
    measured = measure_in_turns([subject], Rounds(repeats=4, duration=None, warmup=1), clock=clock)
    result = summarise_condition(measured.series[0], energy=None, energy_problem="", latents_off=None)
    assert result.image.p50_ms == 128
    assert result.clock == MONOTONIC
    assert result.images_per_s == pytest.approx(2 / 0.128, rel=1e-4)
    predictor = result.stages["predictor"]
    assert (predictor.count, predictor.p50_ms, predictor.calls_per_run, predictor.per_run_ms) == (16, 20.0, 4, 80.0)
    assert result.stages["png"].count == 4
    assert result.warmup_ms == (128.0,)


def test_a_result_names_the_clock_of_its_calls(clocked: tuple[EngineSubject, Clock]) -> None:
    subject, clock = clocked

    class Events(HostTimer):
        name = CUDA_EVENTS

    subject.pipeline.recorder.timer = Events(clock)
    measured = measure_in_turns([subject], Rounds(repeats=1, duration=None, warmup=0), clock=clock)
    assert (
        summarise_condition(measured.series[0], energy=None, energy_problem="", latents_off=None).clock == CUDA_EVENTS
    )
