"""The PyTorch baseline makes the engines' pictures, from the engines' checkpoints, or says why it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from golden import measure_relative_difference

from flowturbo import torch_sampler
from flowturbo.cli.bench import main
from flowturbo.evaluation.speed import torch_baseline
from flowturbo.evaluation.speed.baselines import BaselineOptions, BaselineSubject, check_agreement
from flowturbo.evaluation.speed.conditions import build_engine_subject
from flowturbo.evaluation.speed.timed_pipeline import CUDA_EVENTS, MONOTONIC, STAGES, TimedPipeline
from flowturbo.evaluation.speed.torch_baseline import PLUGIN, TORCH_MODES, TorchBaseline
from runtime.sampling.guidance import build_branches
from runtime.system.errors import BackendError, CheckpointError, FlowTurboError, ProofError, RequestError

pytestmark = pytest.mark.filterwarnings("ignore:refiner steps")


@pytest.fixture(scope="module")
def pipeline(tiny_engines: Path) -> Iterator[TimedPipeline]:
    with TimedPipeline.open(tiny_engines, threads=1) as opened:
        assert isinstance(opened, TimedPipeline)
        yield opened


@pytest.fixture(scope="module")
def options(pipeline: TimedPipeline, checkpoints: Path, vae: Path) -> BaselineOptions:
    files = {role: checkpoints / f"golden_s-{role}.pt" for role in ("predictor", "refiner")}
    return BaselineOptions(pipeline.manifest, 32, {**files, "vae": vae}, 1, cuda=False)


def opened(options: BaselineOptions, *modes: str) -> list[TorchBaseline]:
    return PLUGIN.open(modes, options)


def calls() -> dict[str, list[float]]:
    return {stage: [] for stage in STAGES}


@pytest.mark.parametrize(
    "asked",
    [
        {"schedule": "H1P2R3"},
        {"schedule": "H1P2R3", "guidance": 1.0},
        {"schedule": "H2P3R3", "guidance_interval": (0.3, 0.8)},
        {"solver": "searched", "steps": 5, "negative": 3},
        {"solver": "sde-euler", "steps": 6},
        {"schedule": "H2", "guidance_channels": 4},
    ],
    ids=str,
)
def test_it_makes_the_engines_pictures(pipeline: TimedPipeline, options: BaselineOptions, asked: Any) -> None:
    request = pipeline.request(["1:0.6,2:0.4", 4], seeds=[5, 6], **asked)
    (eager,) = opened(options, "eager")
    times = calls()
    latents, pictures = eager.run(request, times)
    expected = pipeline.run(request)
    assert measure_relative_difference(latents, expected.latents) < 1e-4
    assert pictures is not None
    assert expected.images is not None
    assert np.abs(pictures.astype(int) - expected.images).max() <= 1
    assert {stage: len(ms) for stage, ms in times.items() if stage != "conditioning"} == {
        stage: expected.usage.calls.get(stage, 0) for stage in STAGES if stage != "conditioning"
    }


def test_bf16_differs_by_rounding_alone(pipeline: TimedPipeline, options: BaselineOptions) -> None:
    request = replace(pipeline.request([1, 2], schedule="H1P2R3"), vae=None)
    eager, half = opened(options, "eager", "eager-bf16")
    exact, (rounded, pictures) = eager.run(request, calls())[0], half.run(request, calls())
    assert pictures is None
    off = float(np.sqrt(np.mean((exact - rounded) ** 2) / np.mean(exact**2)))
    assert 1e-4 < off < 0.15
    assert rounded.dtype == np.float32


def test_compiled_modes_compile_and_share_weights(
    pipeline: TimedPipeline, options: BaselineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []

    def compile_(model: Any, **settings: Any) -> Any:
        compiled.append(model)
        assert settings == {"dynamic": False}
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    eager, both = opened(options, "eager", "compile")
    assert compiled == [eager._weights.get_network("predictor", "fp32"), eager._weights.get_network("refiner", "fp32")]
    request = pipeline.request([1], schedule="H1R1")
    assert np.array_equal(eager.run(request, calls())[0], both.run(request, calls())[0])
    assert len(compiled) == 3  # and the decoder, when it is first used
    assert "compiled" in both.runner
    assert "eager" in eager.runner


def test_other_pictures_are_no_baseline(pipeline: TimedPipeline, options: BaselineOptions) -> None:
    engine = build_engine_subject("tiny", pipeline, ("1",), 1, {"schedule": "H1P1R1"}, conditioning="fresh")
    engine.sample()
    (eager,) = opened(options, "eager")
    subject = BaselineSubject(engine.condition, engine.request, eager)
    subject.sample()
    assert check_agreement(subject, engine.condition, engine.latents) < 1e-4
    subject.request = pipeline.request([1], seeds=[1], schedule="H1P1R1")
    subject.sample()
    with pytest.raises(ProofError, match="makes another picture than tiny H1P1R1") as raised:
        check_agreement(subject, engine.condition, engine.latents)
    assert raised.value.allowed == "0.001"


def test_steps_that_depend_on_what_is_seen_are_refused(pipeline: TimedPipeline, options: BaselineOptions) -> None:
    (eager,) = opened(options, "eager")
    with pytest.raises(RequestError, match="depend on what it sees"):
        eager.run(pipeline.request([1], adaptive="lte"), calls())


def with_files(options: BaselineOptions, **files: Path) -> BaselineOptions:
    return replace(options, checkpoints={**options.checkpoints, **files})


def test_other_checkpoints_are_refused(
    pipeline: TimedPipeline, options: BaselineOptions, checkpoints: Path, tmp_path: Path
) -> None:
    other = checkpoints / "golden_nosigma-predictor.pt"
    with pytest.raises(CheckpointError, match="is not the predictor that the engines were built from"):
        opened(with_files(options, predictor=other), "eager")
    (eager,) = opened(with_files(options, vae=tmp_path), "eager")
    with pytest.raises(CheckpointError, match="is not the vae") as raised:
        eager.run(pipeline.request([1]), calls())
    assert "--checkpoint vae=DIR" in raised.value.remedy


def test_the_demos_checkpoints_are_taken_where_they_fit(options: BaselineOptions) -> None:
    with pytest.raises(CheckpointError, match="not built from the demo's predictor") as raised:
        opened(replace(options, checkpoints={}), "eager")
    assert "--checkpoint predictor=FILE" in raised.value.remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_is_not_compared_with_a_cpu(options: BaselineOptions) -> None:
    with pytest.raises(BackendError, match="not like for like"):
        opened(replace(options, cuda=True), "eager")


class OnGpu:
    """Checkpoints on a GPU, as far as a baseline asks before it runs."""

    device = torch.device("cuda")
    roles = ()


def test_calls_on_a_gpu_are_timed_by_its_events_and_the_report_says_so(options: BaselineOptions) -> None:
    assert TorchBaseline("torch:eager", TORCH_MODES["eager"], OnGpu()).clock_name == CUDA_EVENTS  # type: ignore[arg-type]
    (eager,) = opened(options, "eager")
    assert eager.clock_name == MONOTONIC


def test_branches_are_made_once_per_guidance(
    pipeline: TimedPipeline, options: BaselineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    monkeypatch.setattr(
        torch_sampler,
        "build_branches",
        lambda *given, guided: made.append(guided) or build_branches(*given, guided=guided),
    )
    (eager,) = opened(options, "eager")
    eager.run(pipeline.request([1], schedule="H2P3R3", guidance_interval=(0.3, 0.8)), calls())
    assert made == [True, False]  # predictor and refiner share them


def test_matrix_products_have_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_baseline, "_measure_product_flops", lambda dtype: 2.0 if dtype == torch.bfloat16 else 1.0)
    assert PLUGIN.measure_matrix_products() == {"fp32": 1.0, "bf16": 2.0}


def test_a_product_takes_time() -> None:
    assert 1e7 < torch_baseline._measure_product_flops(torch.float32, largest=64, repeats=2) < 1e14


def test_every_mode_is_named() -> None:
    assert PLUGIN.modes == tuple(TORCH_MODES) == ("eager", "eager-bf16", "compile", "compile-bf16")


def bench(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_the_command_measures_it_in_the_same_rounds(
    tiny_engines: Path, options: BaselineOptions, tmp_path: Path
) -> None:
    files = [word for role, path in options.checkpoints.items() for word in ("--checkpoint", f"{role}={path}")]
    quick = ("--schedule", "H1P1R1", "--repeats", 2, "--warmup", 1, "--no-cold", "--no-energy", "--threads", 1)
    words = (tiny_engines, "--baseline", "torch:eager", *files, *quick)
    said = bench(*words, "--out", tmp_path / "bench.json").stdout
    assert "as fast as torch:eager" in said
    data = json.loads((tmp_path / "bench.json").read_text())
    engine, torch_ = data["conditions"]
    assert (data["comparisons"][0]["condition"], data["comparisons"][0]["against"]) == (0, 1)
    assert torch_["condition"]["implementation"] == "torch:eager"
    assert torch_["latents_off"] < 1e-4
    assert torch_["stages"]["predictor"]["calls_per_run"] == engine["stages"]["predictor"]["calls_per_run"]
    assert torch_["stages"]["conditioning"]["count"] == 0


def test_a_baseline_that_makes_another_picture_ends_the_command(
    tiny_engines: Path, options: BaselineOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = TorchBaseline.run
    monkeypatch.setattr(TorchBaseline, "run", lambda self, request, calls: (run(self, request, calls)[0] * 1.01, None))
    files = [word for role, path in options.checkpoints.items() for word in ("--checkpoint", f"{role}={path}")]
    failed = bench(tiny_engines, "--baseline", "torch:eager", *files, "--out", tmp_path / "bench.json", code=1)
    assert "makes another picture" in failed.stderr
    assert list(tmp_path.iterdir()) == []
    assert issubclass(ProofError, FlowTurboError)
