"""Samplers that look, over the fake device: batches of images that each go their own way, and what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from fakes import NULL, OverlapCheckEngine, integrate_reference, make_loop, make_noise, read_host_array
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.backends.base import Buffer, Engine
from runtime.execution.adaptive_loop import AdaptiveLoop, Trajectory
from runtime.execution.fixed_loop import FixedLoop, Usage
from runtime.sampling.controllers import Journal, StepControl
from runtime.sampling.guidance import BranchBatch, GuidanceInterval, build_class_branches
from runtime.sampling.plan import BASE, HISTORY, NEW, AdaptiveSteps, Evaluation
from runtime.sampling.solvers import ADAPTIVE_RULES, ADAPTIVE_SOLVERS
from runtime.system.errors import NonFiniteError

EVERY = {**ADAPTIVE_RULES, **ADAPTIVE_SOLVERS}
OWN = [name for name, rule in EVERY.items() if not rule.is_joint]
LABELS, SCALES = [1, 7, 4], [4.0, 1.0, 2.5]
SETTINGS = {
    **{"norm": 0.15, "norm-ab2": 0.15, "lte": 0.02, "lte-heun": 0.02, "lte-ab2": 0.002},
    **{"blocks": 0.02, "dopri5": 1e-3},
}


def rows_for(labels: Sequence[int], scales: Sequence[float]) -> Any:
    def rows(images: Sequence[int], guided: bool) -> BranchBatch:
        own = [scales[i] if guided else 1.0 for i in images]
        return build_class_branches([labels[i] for i in images], own, NULL, 4)

    return rows


def control(name: str, **options: Any) -> StepControl:
    return StepControl(**{EVERY[name].parameter: SETTINGS[name], "refiner": EVERY[name].tries_refiner, **options})


def run(
    name: str,
    seeds: Sequence[int],
    labels: Sequence[int] = LABELS,
    scales: Sequence[float] = SCALES,
    loop: FixedLoop | None = None,
    usage: Usage | None = None,
    **options: Any,
) -> tuple[NDArray[np.float32], list[Journal]]:
    start, journals = make_noise(*seeds), [Journal() for _ in seeds]
    actors = [
        Trajectory(EVERY[name].steps(control(name, **options), journal, start[i]), (i,))
        for i, journal in enumerate(journals)
    ]
    closed = AdaptiveLoop(loop or make_loop(), rows_for(labels, scales), usage or Usage())
    return closed.run(actors, start), journals


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("interval", [GuidanceInterval(), GuidanceInterval(0.3, 0.8)], ids=["throughout", "interval"])
def test_every_image_goes_where_it_would_go_alone(name: str, interval: GuidanceInterval) -> None:
    """The same path and, to rounding, the same point as in plain float64 arithmetic, image by image."""
    found, journals = run(name, (1, 2, 3), interval=interval)
    assert len({tuple(step.dt for step in journal.steps) for journal in journals}) == 3, "each its own path"
    for i in range(3):
        alone, own = run(name, (i + 1,), LABELS[i : i + 1], SCALES[i : i + 1], interval=interval)
        np.testing.assert_allclose(found[i], alone[0], rtol=1e-5, atol=1e-5)
        assert [(s.block, s.accepted) for s in own[0].steps] == [(s.block, s.accepted) for s in journals[i].steps]
        if interval == GuidanceInterval():
            journal = Journal()
            steps = EVERY[name].steps(control(name), journal, make_noise(i + 1)[0])
            exact = integrate_reference(
                steps, make_noise(i + 1), build_class_branches(LABELS[i : i + 1], SCALES[i : i + 1], NULL, 4)
            )
            np.testing.assert_allclose(alone, exact, rtol=2e-3, atol=2e-3)
            assert journal.nfe == own[0].nfe


class Counted:
    """Images and rows of every call, and what the conditioning was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def wrap(self, graph: str, engine: Engine) -> Engine:
        counted = self

        class Counting:
            def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
                images = inputs["base"].shape[0] if "base" in inputs else 0
                counted.calls.append(
                    (
                        graph,
                        images,
                        next(iter(inputs.values())).shape[0] if not images else inputs["row_image"].shape[0],
                    )
                )
                engine.run(inputs, outputs)

            def close(self) -> None:
                engine.close()

        return Counting()

    def of(self, graph: str) -> list[tuple[int, int]]:
        return [(images, rows) for name, images, rows in self.calls if name == graph]


@pytest.mark.parametrize("name", OWN)
def test_finished_images_leave_the_batch(name: str) -> None:
    counted = Counted()
    usage = Usage()
    _, journals = run(name, (1, 2, 3), loop=make_loop(counted.wrap), usage=usage)
    for network in ("predictor", "refiner"):
        calls = counted.of(network)
        assert sum(images for images, _ in calls) == sum(journal.nfe[network] for journal in journals)
        assert len(calls) == usage.calls.get(network, 0)
    longest = max(journal.nfe["predictor"] for journal in journals)
    assert len(counted.of("predictor")) < sum(journal.nfe["predictor"] for journal in journals)
    if name != "blocks":
        assert len(counted.of("predictor")) == longest
        assert counted.of("predictor")[-1][0] < 3


@pytest.mark.parametrize("name", OWN)
def test_outside_its_interval_the_other_branch_is_not_evaluated(name: str) -> None:
    counted = Counted()
    run(name, (1,), [3], [4.0], loop=make_loop(counted.wrap), interval=GuidanceInterval(0.3, 0.8))
    rows = [rows for _, rows in counted.of("predictor")]
    assert set(rows) == {1, 2}
    assert rows[0] == rows[-1] == 1


@pytest.mark.parametrize("name", OWN)
def test_outputs_never_land_in_what_is_read(name: str) -> None:
    run(name, (1, 2, 3), loop=make_loop(OverlapCheckEngine))


def test_a_rejected_step_starts_again_where_it_started() -> None:
    found, journals = run("lte", (1, 2, 3), first_step=0.9)
    assert all(
        not journal.steps[0].accepted and journal.steps[0].t == journal.steps[1].t == 0.0 for journal in journals
    )
    exact = integrate_reference(
        EVERY["dopri5"].steps(StepControl(tolerance=1e-6), Journal(), make_noise(1, 2, 3)),
        make_noise(1, 2, 3),
        build_class_branches(LABELS, SCALES, NULL, 4),
    )
    assert float(np.abs(found - exact).max()) < 0.2


def test_nothing_of_a_picture_reaches_the_next() -> None:
    loop = make_loop()
    first, _ = run("blocks", (1, 2, 3), loop=loop)
    run("lte", (7, 8, 9), loop=loop)
    again, _ = run("blocks", (1, 2, 3), loop=loop)
    np.testing.assert_array_equal(first, again)
    assert len(loop.workspaces.list_sizes()) <= 8


def test_a_network_that_breaks_is_named() -> None:
    class Breaking:
        def __init__(self, graph: str, engine: Engine) -> None:
            self.graph, self.engine, self.calls = graph, engine, 0

        def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
            self.engine.run(inputs, outputs)
            self.calls += 1
            if self.graph == "predictor" and self.calls == 4:
                read_host_array(outputs["slope_rms"])[...] = np.nan

        def close(self) -> None:
            self.engine.close()

    with pytest.raises(NonFiniteError) as caught:
        run("lte", (1,), loop=make_loop(Breaking))
    assert "the predictor gave NaN or infinity at evaluation 4" in caught.value.given


def test_one_generator_may_steer_several_images_by_one_norm() -> None:
    start, rows = make_noise(1, 2, 3), build_class_branches(LABELS, SCALES, NULL, 4)
    journal = Journal()
    actor = Trajectory(EVERY["dopri5"].steps(StepControl(tolerance=1e-3), journal, start), (0, 1, 2))
    found = AdaptiveLoop(make_loop(), lambda images, guided: rows, Usage()).run([actor], start)
    exact = integrate_reference(EVERY["dopri5"].steps(StepControl(tolerance=1e-3), Journal(), start), start, rows)
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3)


def test_the_callback_hears_of_every_evaluation_of_every_image() -> None:
    heard: list[dict[str, Any]] = []
    start, journal = make_noise(1), Journal()
    actor = Trajectory(EVERY["lte"].steps(control("lte"), journal, start[0]), (0,))
    AdaptiveLoop(make_loop(), rows_for([1], [2.0]), Usage(), heard.append).run([actor], start)
    assert len(heard) == journal.total_nfe
    assert [event["index"] for event in heard] == list(range(journal.total_nfe))


def scripted(steps: int, keep: int) -> AdaptiveSteps:
    """Reads the slope of evaluation `keep` at every later one, however many there are."""
    for index in range(steps):
        point = {BASE: 1.0, keep: 0.01} if index > keep else {BASE: 1.0}
        yield Evaluation("predictor", index / steps, point, {BASE: 1.0, NEW: 0.02})
    return None


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(3, 40), st.integers(0, 2)), min_size=1, max_size=4))
def test_slopes_stay_as_long_as_they_are_read(scripts: list[tuple[int, int]]) -> None:
    """Images of different lengths that hold on to different slopes: batches part, slots are moved, nothing is lost."""
    start = make_noise(*range(len(scripts)))
    labels, scales = list(range(len(scripts))), [1.0] * len(scripts)
    actors = [Trajectory(scripted(*script), (i,)) for i, script in enumerate(scripts)]
    found = AdaptiveLoop(make_loop(OverlapCheckEngine), rows_for(labels, scales), Usage()).run(actors, start)
    for i, script in enumerate(scripts):
        exact = integrate_reference(
            scripted(*script), start[i : i + 1], build_class_branches([labels[i]], [1.0], NULL, 4)
        )
        np.testing.assert_allclose(found[i], exact[0], rtol=1e-4, atol=1e-4)


def test_more_slopes_than_the_history_holds_are_refused() -> None:
    def greedy() -> AdaptiveSteps:
        for index in range(HISTORY + 2):
            yield Evaluation("predictor", 0.5, {BASE: 1.0, **dict.fromkeys(range(index), 0.01)}, {BASE: 1.0, NEW: 0.1})
        return None

    with pytest.raises(AssertionError, match="history"):
        AdaptiveLoop(make_loop(), rows_for([1], [1.0]), Usage()).run([Trajectory(greedy(), (0,))], make_noise(1))


def test_a_slope_that_was_let_go_is_not_read() -> None:
    def forgetful() -> AdaptiveSteps:
        yield Evaluation("predictor", 0.0, {BASE: 1.0})
        yield Evaluation("predictor", 0.1, {BASE: 1.0})
        yield Evaluation("predictor", 0.2, {BASE: 1.0, 0: 0.1})
        return None

    with pytest.raises(AssertionError, match="has not read"):
        AdaptiveLoop(make_loop(), rows_for([1], [1.0]), Usage()).run([Trajectory(forgetful(), (0,))], make_noise(1))
