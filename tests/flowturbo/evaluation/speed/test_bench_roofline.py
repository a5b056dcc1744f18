"""Arithmetic of the released models against published and measured figures, and the rule of thumb."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowturbo.evaluation.speed.conditions import build_engine_subject
from flowturbo.evaluation.speed.devices import DEVICES
from flowturbo.evaluation.speed.macs import (
    SD_DECODER,
    SIT_SIZES,
    count_decoder_macs,
    describe_sit_size,
    estimate_sit_cost,
)
from flowturbo.evaluation.speed.roofline import (
    MachineLimits,
    compute_utilization,
    count_workload,
    describe_model,
    describe_released_model,
    find_device,
    measure_limits,
    predict_latency,
)
from flowturbo.evaluation.speed.timed_pipeline import TimedPipeline
from flowturbo.models.sit import SiT, build_refiner_config, build_sit_config
from runtime.directory.manifest import read_manifest
from runtime.execution.decoding import DECODE_BATCH
from runtime.sampling.guidance import ImageCondition
from runtime.sampling.sampler import SamplerChoice, resolve_sampler
from runtime.system.errors import RequestError

GUIDED = [[ImageCondition(((1, 1.0),), 4.0, 1000)]]
PLAIN = [[ImageCondition(((1, 1.0),), 1.0, 1000)]]


@pytest.mark.parametrize(("size", "gmacs"), [("S", 6.1), ("B", 23.0), ("L", 80.7), ("XL", 118.6)])
def test_macs_of_the_released_sizes(size: str, gmacs: float) -> None:
    """The field's own table, GMAC per evaluation at 256 px, which counts conditioning as well."""
    work = estimate_sit_cost(describe_sit_size(size), 32)
    assert (work.trunk_macs + work.conditioning_macs) / 1e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("size", list(SIT_SIZES))
@pytest.mark.parametrize("refiner", [False, True])
def test_weights_are_the_models(size: str, refiner: bool) -> None:
    """Against the module itself: everything but biases, positions and the unused variance channels."""
    config = build_sit_config(f"SiT-{size}/2", learned_sigma=False)
    config = build_refiner_config(config) if refiner else config
    with torch.device("meta"):
        model = SiT(config)
    numbers = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    work = estimate_sit_cost(config.to_json(), 32)
    assert work.trunk_weights + work.conditioning_weights == numbers


@pytest.mark.parametrize(("resolution", "gmacs"), [(256, 311), (512, 1272)])
def test_macs_of_the_sd_decoder(resolution: int, gmacs: float) -> None:
    assert count_decoder_macs(SD_DECODER, resolution // 8, 4) / 1e9 == pytest.approx(gmacs, rel=0.03)


def test_macs_of_the_small_decoder() -> None:
    tiny = {"kind": "AutoencoderTiny", "channels": [64, 64, 64, 64], "blocks": [3, 3, 3, 1]}
    assert count_decoder_macs(tiny, 32, 4) / 1e9 == pytest.approx(17.7, rel=0.01)


def counted(module: torch.nn.Module, *inputs: torch.Tensor) -> float:
    """MACs of every convolution and linear layer of a forward pass."""
    total = 0.0

    def hook(layer: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal total
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        spots = out.numel() // out.shape[1] if isinstance(layer, torch.nn.Conv2d) else out.numel() // out.shape[-1]
        total += weight.numel() * spots

    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    hooks = [layer.register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        module(*inputs)
    for own in hooks:
        own.remove()
    return total


def test_macs_of_a_decoder_are_those_that_it_does(tiny_engines: Path, vae: Path) -> None:
    """The manifest's description of the tests' VAE, against its layers; attention's products are added by hand."""
    from flowturbo.models.vae import load_vae

    manifest = read_manifest(tiny_engines)
    shape = manifest.vaes["vae" if "vae" in manifest.vaes else next(iter(manifest.vaes))]["decoder"]
    module = load_vae(str(vae)).module
    decoder = torch.nn.Sequential(module.post_quant_conv, module.decoder)  # type: ignore[arg-type]
    expected = counted(decoder, torch.zeros(1, 4, 16, 16)) + 2 * 256 * 256 * shape["channels"][-1]
    assert count_decoder_macs(shape, 16, 4) == pytest.approx(expected, rel=1e-6)


def test_a_directorys_work_is_its_manifests(tiny_engines: Path) -> None:
    manifest = read_manifest(tiny_engines)
    model = describe_model(manifest, 32, manifest.defaults.vae)
    assert model.networks["predictor"] == estimate_sit_cost(manifest.model.predictor, 16)
    assert model.decoder_macs
    assert describe_model(manifest, 32, None).decoder_macs == 0.0


def test_guidance_doubles_the_rows_and_not_the_weights() -> None:
    model, evaluations = describe_released_model("B", 256), resolve_sampler(SamplerChoice(schedule="H1P5R3")).plan
    guided, plain = count_workload(model, evaluations, GUIDED), count_workload(model, evaluations, PLAIN)
    assert guided.flops["predictor"] == 2 * plain.flops["predictor"]
    assert guided.weights == plain.weights
    assert guided.calls == {"conditioning": 2, "predictor": 7, "refiner": 6, "decoder": 1}
    assert guided.flops["predictor"] == 7 * 2 * 2 * model.networks["predictor"].trunk_macs


@pytest.mark.filterwarnings("ignore:refiner steps")
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_a_split_batch_counts_every_call_that_is_made(tiny_engines: Path, batch: int) -> None:
    """These engines take three images at most: seven are three parts, whose trunks read their weights three times."""
    with TimedPipeline.open(tiny_engines, backend="fake") as pipeline:
        subject = build_engine_subject("tiny", pipeline, (), batch, {"schedule": "H1P2R3"}, conditioning="fresh")
        made = {stage: len(calls) for stage, calls in subject.sample().calls.items()}
    request = subject.request
    parts = [request.conditions[part] for (part,) in pipeline.split_batches(request)]
    bound = count_workload(describe_model(pipeline.manifest, 32, request.vae), request.sampler.plan, parts)
    assert bound.calls == made
    assert made["predictor"] == 4 * -(-batch // 3)
    one = count_workload(describe_model(pipeline.manifest, 32, request.vae), request.sampler.plan, [request.conditions])
    assert bound.flops == one.flops
    assert bound.weights["predictor"] == one.weights["predictor"] * len(parts)


def test_a_decoder_takes_a_few_pictures_at_a_time() -> None:
    images, plan = [GUIDED[0] * 9], resolve_sampler(SamplerChoice(schedule="H1")).plan
    assert count_workload(describe_released_model("S", 256), plan, images).calls["decoder"] == -(-9 // DECODE_BATCH)


def test_a_single_row_on_a_fast_device_waits_for_weights() -> None:
    model, evaluations = describe_released_model("XL", 256), resolve_sampler(SamplerChoice(schedule="H4")).plan
    bound = count_workload(model, evaluations, PLAIN)
    slow_memory = bound.compute_min_seconds(1e18, 1e9, 2)
    assert slow_memory["predictor"] == pytest.approx(8 * 2 * model.networks["predictor"].trunk_weights / 1e9)
    assert bound.compute_min_seconds(1e9, 1e18, 2)["predictor"] == pytest.approx(bound.flops["predictor"] / 1e9)


@pytest.mark.parametrize(("name", "sampling", "decoder"), [("AGX Orin", 230, 42), ("Orin Nano 8GB Super", 590, 107)])
def test_the_rule_of_thumb_gives_its_published_examples(name: str, sampling: float, decoder: float) -> None:
    model = describe_released_model("XL", 256)
    bound = count_workload(model, resolve_sampler(SamplerChoice(schedule="H1P5R3")).plan, GUIDED)
    found = predict_latency(find_device(name), model, bound, "H1P5R3", 1)
    assert found.sampling_ms == pytest.approx(sampling, rel=0.1)
    assert found.decoder_ms == pytest.approx(decoder, rel=0.1)


def test_an_estimate_is_of_one_image_of_a_batch() -> None:
    model, plan = describe_released_model("XL", 256), resolve_sampler(SamplerChoice(schedule="H1P5R3")).plan
    one, four = (
        predict_latency(find_device("AGX Orin"), model, count_workload(model, plan, [GUIDED[0] * n]), "H1P5R3", n)
        for n in (1, 4)
    )
    assert four.sampling_ms == pytest.approx(one.sampling_ms, rel=0.05)  # bound by arithmetic, nearly
    assert four.decoder_ms == pytest.approx(one.decoder_ms, rel=1e-3)


@pytest.mark.parametrize(("name", "tflops"), [("RTX 3090", 71), ("RTX 4090", 165.2), ("RTX 5090", 209.5)])
def test_geforce_rates_are_the_whitepapers(name: str, tflops: float) -> None:
    assert find_device(name).tflops == pytest.approx(tflops, rel=0.005)


def test_every_device_has_a_source_and_a_name_of_its_own() -> None:
    assert len({device.name for device in DEVICES}) == len(DEVICES)
    for device in DEVICES:
        assert device.source
        assert device.tflops > 0
        assert device.gbytes > 0
        assert 0 < device.efficiency < 1
        assert find_device(device.name) is device


@pytest.mark.parametrize(("name", "says"), [("RTX 6090", "no such device"), ("orin", "it fits Jetson Orin Nano")])
def test_a_device_must_be_one_of_the_table(name: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as raised:
        find_device(name)
    assert "RTX 4090" in raised.value.allowed


def test_adaptive_samplers_have_no_work_beforehand() -> None:
    with pytest.raises(RequestError, match="chooses its steps"):
        count_workload(describe_released_model("S", 256), (), GUIDED)


def test_this_machine_has_limits_and_engines_stay_below() -> None:
    limits = measure_limits(side=256, repeats=2, copy_bytes=8 << 20)
    assert limits.flops_per_s["fp32"] > 1e8
    assert limits.bytes_per_s > 1e8
    bound = count_workload(describe_released_model("S", 256), resolve_sampler(SamplerChoice(schedule="H1")).plan, PLAIN)
    least = compute_utilization(bound, {"predictor": 1e9}, limits, "fp32")
    assert [row.stage for row in least] == ["predictor"]
    assert 0 < least[0].share < 1e-3
    exact = MachineLimits({"fp32": 1e12}, 1e18, "made up")
    ms = 1e3 * bound.flops["predictor"] / 1e12
    assert compute_utilization(bound, {"predictor": ms}, exact, "fp32")[0].share == pytest.approx(1.0)
