"""The deployed loop on the shipped fake device: what it computes, how often it calls, and what its buffers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import NULL, SIDE, M, OverlapCheckEngine, integrate_reference, make_loop, make_noise, read_host_array

from runtime.backends.base import BackendOptions, Buffer, Engine, EngineFile
from runtime.backends.fake import DATA_STD, FakeBackend, compute_label_mean
from runtime.directory.contract import build_trunk_spec
from runtime.execution import fixed_loop
from runtime.execution.fixed_loop import Usage, build_coefficient_arrays
from runtime.pipeline import Pipeline
from runtime.sampling.guidance import build_class_branches
from runtime.sampling.history import assign_slots
from runtime.sampling.plan import BASE, HISTORY, NEW, Evaluation, Plan, count_evaluations
from runtime.sampling.sampler import SamplerChoice, resolve_sampler
from runtime.sampling.solvers import SOLVERS
from runtime.system.errors import EngineError, NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore:refiner steps")  # short schedules keep these tests fast


def plan_of(name: str, steps: int | None = None) -> Plan:
    choice = SamplerChoice(solver=name, steps=steps) if name in SOLVERS else SamplerChoice(schedule=name)
    return resolve_sampler(choice).plan


@pytest.mark.parametrize("name", [*SOLVERS, "H1P5R3", "H2P8R2", "P3", "H0P2R2", "H20P20"])
@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.0], [4.0, 1.0, 2.5]], ids=["unguided", "guided"])
def test_runs_every_plan_as_written(name: str, scales: list[float]) -> None:
    plan, start = plan_of(name), make_noise(1, 2, 3)
    rows = build_class_branches([0, 3, 7], scales, NULL, 4)
    found = make_loop().run(plan, start, rows, Usage())
    np.testing.assert_allclose(found, integrate_reference(plan, start, rows), rtol=2e-4, atol=2e-4)


def test_a_sampler_converges_to_the_data_it_is_told_of() -> None:
    """The fake's labels are N(μ, s²), so that a perfect sampler ends at μ + s·noise; Heun gets there with order two."""
    start, labels = make_noise(5, 6), [2, 8]
    rows = build_class_branches(labels, [1.0, 1.0], NULL, 4)
    target = compute_label_mean(np.asarray(labels, np.float32)).reshape(-1, 1, 1, 1) + DATA_STD * start

    def error(steps: int) -> float:
        return float(np.abs(make_loop().run(plan_of("heun", steps), start, rows, Usage()) - target).max())

    errors = [error(n) for n in (8, 16, 32)]
    assert errors[2] < 2e-3
    assert np.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("name", [*SOLVERS, "H1P5R3", "H2P3"])
def test_one_engine_call_per_evaluation(name: str) -> None:
    calls: dict[str, int] = {}

    class Counted:
        def __init__(self, graph: str, engine: Engine) -> None:
            self.graph, self.engine = graph, engine

        def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
            calls[self.graph] = calls.get(self.graph, 0) + 1
            self.engine.run(inputs, outputs)

        def close(self) -> None:
            self.engine.close()

    plan, usage = plan_of(name), Usage()
    make_loop(Counted).run(plan, make_noise(1, 2), build_class_branches([1, 2], [4.0, 4.0], NULL, 4), usage)
    assert calls["predictor"] == count_evaluations(plan, "predictor") == usage.calls["predictor"]
    assert calls.get("refiner", 0) == count_evaluations(plan, "refiner") == usage.calls.get("refiner", 0)
    conditioning = calls["conditioning"] + calls.get("refiner_conditioning", 0)
    assert conditioning == usage.calls["conditioning"] <= 2  # a whole schedule at once, per network


@pytest.mark.parametrize("name", [*SOLVERS, "H1P5R3", "H12P12R4", "P30"])
def test_outputs_never_land_in_what_is_read(name: str) -> None:
    make_loop(OverlapCheckEngine).run(plan_of(name), make_noise(1), build_class_branches([1], [4.0], NULL, 4), Usage())


def test_unused_slots_are_finite_at_every_start() -> None:
    """A NaN with coefficient 0 would poison a sum: what one picture left behind must not reach the next."""
    loop, rows = make_loop(), build_class_branches([1], [1.0], NULL, 4)
    with pytest.raises(NonFiniteError), np.errstate(all="ignore"):
        loop.run(plan_of("ab4"), np.full_like(make_noise(1), np.inf), rows, Usage())
    again = loop.run(plan_of("euler", 3), make_noise(1), rows, Usage())
    np.testing.assert_array_equal(again, make_loop().run(plan_of("euler", 3), make_noise(1), rows, Usage()))


def test_memory_that_a_broken_picture_left_is_not_used_again() -> None:
    """Fixed batches are filled up with what is there, and guidance multiplies it by 0: NaN would stay NaN."""
    loop, rows = make_loop(), build_class_branches([1, 2], [4.0, 1.0], NULL, 4)
    with pytest.raises(NonFiniteError), np.errstate(all="ignore"):
        loop.run(plan_of("euler", 3), np.full_like(make_noise(1, 2), np.inf), rows, Usage())
    assert not loop.workspaces.list_sizes()


def test_later_pictures_reuse_memory_and_are_the_same() -> None:
    loop, rows = make_loop(), build_class_branches([1, 2], [4.0, 1.0], NULL, 4)
    first = loop.run(plan_of("H1P5R3"), make_noise(1, 2), rows, Usage())
    kept = first.copy()
    loop.run(plan_of("heun"), make_noise(3, 4), rows, Usage())
    np.testing.assert_array_equal(first, kept)  # what was returned is a copy
    np.testing.assert_array_equal(loop.run(plan_of("H1P5R3"), make_noise(1, 2), rows, Usage()), kept)


@pytest.mark.parametrize(
    ("network", "call", "evaluation"), [("predictor", 1, 1), ("predictor", 7, 7), ("refiner", 1, 8), ("refiner", 6, 13)]
)
def test_a_network_that_breaks_is_named_with_its_evaluation(network: str, call: int, evaluation: int) -> None:
    class Breaking:
        """A device that overflows at one call."""

        def __init__(self, graph: str, engine: Engine) -> None:
            self.graph, self.engine, self.calls = graph, engine, 0

        def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
            self.engine.run(inputs, outputs)
            self.calls += 1
            if self.graph == network and self.calls == call:
                for buffer in outputs.values():
                    read_host_array(buffer)[...] = np.nan

        def close(self) -> None:
            self.engine.close()

    with pytest.raises(NonFiniteError) as caught:
        make_loop(Breaking).run(
            plan_of("H1P5R3"), make_noise(1, 2), build_class_branches([1, 2], [1.0, 1.0], NULL, 4), Usage()
        )
    assert f"the {network} gave NaN or infinity at evaluation {evaluation} of 13" in caught.value.given
    assert "--precision" in caught.value.remedy


def test_images_do_not_know_of_one_another() -> None:
    plan = plan_of("H1P5R3")
    together = make_loop().run(
        plan, make_noise(1, 2, 3), build_class_branches([1, 2, 3], [4.0, 1.0, 2.0], NULL, 4), Usage()
    )
    for i, (seed, label, scale) in enumerate([(1, 1, 4.0), (2, 2, 1.0), (3, 3, 2.0)]):
        alone = make_loop().run(plan, make_noise(seed), build_class_branches([label], [scale], NULL, 4), Usage())
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-5, atol=1e-5)


def test_callback_hears_of_every_evaluation() -> None:
    heard: list[dict[str, Any]] = []
    plan = plan_of("H1P5R3")
    make_loop().run(plan, make_noise(1), build_class_branches([1], [1.0], NULL, 4), Usage(), heard.append)
    assert [event["index"] for event in heard] == list(range(13))
    assert {event["evaluations"] for event in heard} == {13}
    assert "".join(event["block"] for event in heard) == "HHPPPPPRRRRRR"
    assert [event["t"] for event in heard] == [evaluation.t for evaluation in plan]


def test_a_callback_can_stop_it() -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["index"] == 2:
            raise KeyboardInterrupt

    loop, rows = make_loop(), build_class_branches([1], [1.0], NULL, 4)
    with pytest.raises(KeyboardInterrupt):
        loop.run(plan_of("euler", 5), make_noise(1), rows, Usage(), stop)
    np.testing.assert_array_equal(
        loop.run(plan_of("euler", 5), make_noise(1), rows, Usage()),
        make_loop().run(plan_of("euler", 5), make_noise(1), rows, Usage()),
    )


def test_a_closed_engine_says_so() -> None:
    engine = FakeBackend(BackendOptions()).load(
        EngineFile(Path("x.onnx"), "predictor", "fp32", build_trunk_spec(4, SIDE, M, refiner=False), "")
    )
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run({}, {})


def test_coefficients_sit_where_the_contract_says() -> None:
    plan: Sequence[Evaluation] = [
        *(Evaluation("predictor", 0.0, {BASE: 1.0}, {BASE: 1.0, NEW: 0.1}) for _ in range(HISTORY + 1)),
        Evaluation(
            "predictor",
            0.5,
            {BASE: 0.9, HISTORY: 0.2, 3: 0.3},
            {BASE: 0.8, HISTORY: 0.4, NEW: 0.5},
            {HISTORY: -0.6, NEW: 0.7},
        ),
    ]
    held = [slots.slots for slots in assign_slots(plan)]
    three, newest = held[-1][3], held[-1][HISTORY]
    arrays = build_coefficient_arrays(plan, held, images=2)
    assert {name: array.shape for name, array in arrays.items()} == {
        "point_coef": (18, HISTORY + 1, 2), "update_coef": (18, HISTORY + 2, 2), "error_coef": (18, HISTORY + 1, 2),
    }  # fmt: skip
    a, b, e = (arrays[name][-1, :, 0] for name in ("point_coef", "update_coef", "error_coef"))
    zeros = dict.fromkeys(range(17), 0)
    assert dict(enumerate(a)) == pytest.approx({**zeros, 0: 0.9, 1 + newest: 0.2, 1 + three: 0.3}, rel=1e-6)
    assert dict(enumerate(b)) == pytest.approx({**zeros, 0: 0.8, 1 + newest: 0.4, 17: 0.5}, rel=1e-6)
    assert dict(enumerate(e)) == pytest.approx({**zeros, newest: -0.6, 16: 0.7}, rel=1e-6)
    np.testing.assert_array_equal(arrays["point_coef"][..., 0], arrays["point_coef"][..., 1])


def test_workspaces_of_few_sizes_are_kept(tiny_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_loop, "MAX_WORKSPACES", 3)
    with Pipeline.load(tiny_engines, backend="fake") as opened:
        first = opened.run(opened.request([1], schedule="H1", guidance=1.0)).latents
        for scales in ([2.0], [1.0, 1.0], [2.0, 1.0], [2.0, 2.0]):
            opened.run(opened.request([1] * len(scales), schedule="H1", guidance=scales))
        assert len(opened._loop.workspaces.list_sizes()) == 3
        np.testing.assert_array_equal(opened.run(opened.request([1], schedule="H1", guidance=1.0)).latents, first)
