"""What the host does between engine calls: no latent is copied or made there, and nothing is left behind."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fakes import M, make_loop, make_noise

from runtime.backends.base import Buffer, Engine, HostBuffer
from runtime.directory.contract import build_trunk_spec
from runtime.execution.fixed_loop import FixedLoop, LoadedNetwork, Usage
from runtime.sampling.guidance import build_class_branches
from runtime.sampling.noise import sample_noise
from runtime.sampling.sampler import SamplerChoice, resolve_sampler

pytestmark = pytest.mark.filterwarnings("ignore:refiner steps")

SHORT, LONG = "H1P5R3", "H3P20R9"  # 13 and 44 evaluations
ROWS = build_class_branches([1, 2], [4.0, 2.0], 10, 4)


def run(loop: FixedLoop, schedule: str, start: Any, **more: Any) -> None:
    loop.run(resolve_sampler(SamplerChoice(schedule=schedule)).plan, start, ROWS, Usage(), **more)


def test_no_latent_is_copied_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many copies of latents in 44 evaluations as in 13: noise in, history cleared, latents out."""
    copied: Counter[str] = Counter()
    for name in ("upload", "numpy", "copy_from"):
        whole = getattr(HostBuffer, name)

        def counted(self: HostBuffer, *arguments: Any, _name: str = name, _whole: Any = whole) -> Any:
            copied[_name] += self.array.ndim >= 4
            return _whole(self, *arguments)

        monkeypatch.setattr(HostBuffer, name, counted)
    counts = []
    for schedule in (SHORT, LONG):
        copied.clear()
        run(make_loop(), schedule, make_noise(1, 2))
        counts.append(dict(copied))
    assert counts[0] == counts[1] == {"upload": 2, "numpy": 1}


class Idle:
    """An engine that computes nothing, so that what is allocated is the host's."""

    def __init__(self, graph: str, engine: Engine) -> None:
        self.engine = engine

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        pass

    def close(self) -> None:
        self.engine.close()


def idle_loop(side: int) -> FixedLoop:
    """A loop over idle engines with latents of 16·side² bytes each."""
    loop = make_loop(Idle)
    networks = {
        name: LoadedNetwork(trunk.engine, build_trunk_spec(4, side, M, refiner=name == "refiner"), trunk.conditioner)
        for name, trunk in loop.networks.items()
    }
    return FixedLoop(loop.backend, networks)


def test_no_memory_of_a_latents_size_is_made_in_a_step() -> None:
    start = sample_noise([1, 2], (4, 64, 64))
    loop, most = idle_loop(64), []
    run(loop, SHORT, start)  # makes the workspace

    def watch(event: Mapping[str, Any]) -> None:
        current, peak = tracemalloc.get_traced_memory()
        if event["index"]:  # before the first evaluation the noise goes in
            most.append(peak - current)
        tracemalloc.reset_peak()

    tracemalloc.start()
    try:
        run(loop, SHORT, start, callback=watch)
    finally:
        tracemalloc.stop()
    assert len(most) == 12
    assert max(most) < start.nbytes / len(start) / 2


def test_pictures_leave_nothing_behind() -> None:
    """The short form of `python -m benchmarks.host`, which watches 1,000 pictures from outside."""
    loop = make_loop()

    def pictures(count: int) -> int:
        for seed in range(count):
            run(loop, SHORT, make_noise(seed, seed + 1))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        held = [pictures(3), *(pictures(20) for _ in range(3))]
    finally:
        tracemalloc.stop()
    # Less than one latent in twenty pictures. What leaks does so every time; what else lives in this process may not.
    assert min(later - earlier for earlier, later in pairwise(held)) < np.float32().nbytes * make_noise(1).size
