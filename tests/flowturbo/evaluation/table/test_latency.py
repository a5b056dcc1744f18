"""Latencies of a table's rows, on a clock of our own: what is timed, what is thrown away, and what is not repeated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flowturbo.evaluation.table.latency import MIN_SAMPLER_ROUNDS, Latency, LatentSampler, time_samplers

DECODE_MS = {"ema": 10.0, "mse": 20.0}


class Machine:
    """Seconds that pass only where somebody works; decodes as a pipeline does."""

    def __init__(self) -> None:
        self.seconds, self.runs = 0.0, list[str]()

    def clock(self) -> int:
        return round(1e9 * self.seconds)

    def decode(self, latents: NDArray[np.float32], vae: str) -> None:
        self.runs.append(vae)
        self.seconds += len(latents) * DECODE_MS[vae] / 1e3

    def sampler(self, name: str, times_ms: Iterable[float], images: int = 1) -> LatentSampler:
        taken = iter(times_ms)

        def sample() -> NDArray[np.float32]:
            self.runs.append(name)
            self.seconds += next(taken) / 1e3
            return np.zeros((images, 4, 2, 2), np.float32)

        return sample


@pytest.fixture
def machine() -> Machine:
    return Machine()


def timed(machine: Any, samplers: dict[str, LatentSampler], rounds: int) -> dict[tuple[str, str], Latency]:
    return time_samplers(machine, samplers, list(DECODE_MS), rounds, clock=machine.clock)


def test_a_row_is_its_sampling_and_its_decoder_without_the_first_round(machine: Machine) -> None:
    found = timed(
        machine, {"a": machine.sampler("a", [900, 100, 300, 200]), "b": machine.sampler("b", [900] + [50] * 3)}, 3
    )
    assert found["a", "ema"].median_ms == pytest.approx(210)
    assert found["a", "mse"].median_ms == pytest.approx(220)
    assert found["a", "ema"].p95_ms == pytest.approx(np.percentile([110, 310, 210], 95))
    assert found["b", "mse"] == Latency(pytest.approx(70), pytest.approx(70), 3)  # type: ignore[arg-type]
    turns = [machine.runs[start : start + 4] for start in range(0, 16, 4)]
    assert [sorted(turn) for turn in turns] == [["a", "b", "ema", "mse"]] * 4  # they take turns
    assert len(machine.runs) == 16


def test_a_batch_is_counted_by_its_images(machine: Machine) -> None:
    found = timed(machine, {"a": machine.sampler("a", [400] * 3, images=4)}, 2)
    assert found["a", "ema"].median_ms == pytest.approx(100 + 10)


def test_a_slow_row_is_timed_a_few_times_only(machine: Machine) -> None:
    times = {"slow": 3000, "middling": 450, "quick": 10}
    found = timed(machine, {name: machine.sampler(name, [ms] * 9) for name, ms in times.items()}, 8)
    assert {name: found[name, "ema"].rounds for name in times} == {
        "slow": MIN_SAMPLER_ROUNDS,
        "middling": 5,
        "quick": 8,
    }
    assert machine.runs.count("slow") == MIN_SAMPLER_ROUNDS + 1
