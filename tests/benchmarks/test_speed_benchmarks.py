"""The benchmarks of speed and memory run on small engines; what they find on this machine is no test."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.batches import measure_conditioning, measure_throughput
from benchmarks.host import measure_host_time, measure_memory_growth
from benchmarks.memory import measure_process_memory, read_stage_memory, sum_weight_bytes
from benchmarks.threads import WAIT_SETTINGS, measure_settings
from flowturbo.evaluation.speed.macs import estimate_sit_cost
from flowturbo.evaluation.speed.statistics import compute_speedup
from flowturbo.evaluation.speed.timed_pipeline import TimedPipeline
from flowturbo.models.sit import build_sit_config
from runtime.directory.manifest import read_manifest

pytestmark = pytest.mark.filterwarnings("ignore:refiner steps")


def test_a_ratio_is_of_rounds_not_of_medians() -> None:
    """A machine that slows down half way slows both: the ratio stays."""
    assert compute_speedup((2.0, 4.0, 8.0), (1.0, 2.0, 4.0)) == 2.0
    assert compute_speedup((3.0, 4.0, 100.0), (1.0, 2.0, 4.0)) == 3.0


def test_memory_of_a_fresh_process(tiny_engines: Path) -> None:
    stages = measure_process_memory(tiny_engines, 1)
    assert list(stages) == ["imported", "loaded", "picture 1", "picture 2"]
    assert all(value > 0 for stage in stages.values() for value in stage.values())
    weights = sum_weight_bytes(tiny_engines, 32)
    assert 0 < weights <= sum(graph.weight_bytes for graph in read_manifest(tiny_engines).graphs)
    assert read_stage_memory()["peak"] >= read_stage_memory()["anonymous"]


def test_host_time_is_less_than_the_picture(tiny_engines: Path) -> None:
    found = measure_host_time(tiny_engines, "H1P1R1", batch=1, repeats=2)
    assert 0 < found["host_ms"] < found["image_ms"]
    assert found["engine_calls"] == 2 + 1 + 2 + 1
    assert abs(measure_memory_growth(tiny_engines, 20)["growth"]) < 0.05


def test_threads_and_batches_are_compared(tiny_engines: Path) -> None:
    found = measure_settings(tiny_engines, 1, "H1", rounds=3, pictures=1)
    assert set(found["setting"]) == set(WAIT_SETTINGS)
    assert all(value > 0 for part in found.values() for value in part.values())
    pipeline = TimedPipeline.open(tiny_engines, provider="cpu", threads=1)
    with pipeline:
        assert measure_throughput(pipeline, [1, 2], "H1", 1, decode=False)["1"] == 1.0
        ahead = measure_conditioning(pipeline, 2)
    assert 0 < ahead["conditioning_bytes"] < ahead["trunk_bytes"] * 2


def test_multiplications_are_those_of_the_published_table() -> None:
    """23.0 G for SiT-B/2 and 6.1 G for SiT-S/2 at 256 px."""
    for name, giga in (("SiT-S/2", 6.1), ("SiT-B/2", 23.0)):
        assert estimate_sit_cost(build_sit_config(name).to_json(), 32).trunk_macs == pytest.approx(giga * 1e9, rel=0.02)
