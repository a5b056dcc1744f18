"""VAE training: the perceptual distance, the presets of decoder fine-tuning, and what a split batch computes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_data import write_photographs

from flowturbo.cli.train import main
from flowturbo.data.photographs import Photographs, list_photographs, normalise_pixels
from flowturbo.training.lpips import VGG_WIDTHS, Lpips, load_lpips
from flowturbo.training.random_draws import Microbatch
from flowturbo.training.vae_task import VaeConfig, VaeTask, build_vae, measure_scaling_factor
from runtime.system.errors import CheckpointError, TrainingError

VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
"""torchvision's configuration D."""


def random_weights() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """State dicts as torchvision (with its classifier's first tensor) and LPIPS publish them."""
    g = torch.Generator().manual_seed(0)
    vgg, index, channels = {}, 0, 3
    for width in VGG16:
        if isinstance(width, int):
            vgg[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3, generator=g) * (9 * channels) ** -0.5
            vgg[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=g)
            channels, index = width, index + 1
        index += 1  # the ReLU, or the pool
    vgg["classifier.0.bias"] = torch.zeros(4096)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, w[-1], 1, 1, generator=g) for i, w in enumerate(VGG_WIDTHS)}
    return vgg, linear


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two files, and one of the whole under lpips' own names."""
    folder = tmp_path_factory.mktemp("lpips")
    vgg, linear = random_weights()
    torch.save(vgg, folder / "vgg16.pth")
    torch.save(linear, folder / "vgg.pth")
    stage_of = {index: 1 + sum(index >= start for start in (5, 10, 17, 24)) for index in range(31)}
    whole = {
        f"net.slice{stage_of[int(k.split('.')[1])]}.{k.removeprefix('features.')}": v
        for k, v in vgg.items()
        if k.startswith("features.")
    }
    save_file({**whole, **{k.replace("lin", "lins.", 1): v for k, v in linear.items()}}, folder / "whole.safetensors")
    return {name: folder / name for name in ("vgg16.pth", "vgg.pth", "whole.safetensors")}


def spelt_out(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Zhang et al. 2018, equation 1, layer by layer over torchvision's indices."""
    vgg, linear = random_weights()
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    x, y = (a - shift) / scale, (b - shift) / scale
    total, layer = torch.zeros(len(a)), 0
    for index in range(30):
        if f"features.{index}.weight" in vgg:
            x, y = (
                F.conv2d(v, vgg[f"features.{index}.weight"], vgg[f"features.{index}.bias"], padding=1) for v in (x, y)
            )
            x, y = x.relu(), y.relu()
        if index in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            p, q = (F.normalize(v, dim=1, eps=1e-10) for v in (x, y))
            total += ((p - q) ** 2 * linear[f"lin{layer}.model.1.weight"]).sum(dim=1).mean(dim=(1, 2))
            layer += 1
        if index in (4, 9, 16, 23):
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
    return total


def test_lpips_is_its_equation_from_any_of_its_files(weights: dict[str, Path]) -> None:
    a, b = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    b.requires_grad_(True)
    expected = spelt_out(a, b)
    for files in ([weights["vgg16.pth"], weights["vgg.pth"]], [weights["whole.safetensors"]]):
        model = load_lpips(files)
        torch.testing.assert_close(model(a, b), expected, rtol=1e-4, atol=1e-6)
    assert model(a, a).tolist() == [0, 0]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    (gradient,) = torch.autograd.grad(model(a, b).sum(), b)
    assert float(gradient.abs().sum()) > 0


def test_lpips_says_what_is_missing(weights: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks linear.0") as caught:
        load_lpips([weights["vgg16.pth"]])
    assert "--lpips vgg16.pth --lpips vgg.pth" in caught.value.remedy
    save_file({**random_weights()[1], "lin0.model.1.weight": torch.zeros(1, 3, 1, 1)}, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"linear.0 is \[3\], not \[64\]"):
        load_lpips([weights["vgg16.pth"], tmp_path / "bad.safetensors"])


def vae_task(photographs: Photographs, **options: Any) -> VaeTask:
    torch.manual_seed(0)
    config = VaeConfig(channels=(8, 8, 8), groups=4, crop=16, **options)
    perceptual = Lpips() if config.lpips else None
    if perceptual is not None:
        torch.nn.init.ones_(perceptual.linear[0])
    return VaeTask(build_vae(config, 16), photographs, config, 0, perceptual)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    return Photographs(list_photographs(write_photographs(tmp_path_factory.mktemp("data"), ("a", "b"))), 24)


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_a_split_batch_has_the_loss_of_the_whole(photographs: Photographs, loss: Any) -> None:
    """Also of the half-scale samples, of which one part has none here."""
    task = vae_task(photographs, loss=loss, lpips=0.5)
    with torch.no_grad():
        whole = task.compute_losses(task.load_batch(Microbatch(range(0, 4), 0)))
        halves = [task.compute_losses(task.load_batch(Microbatch(range(i, i + 2), 0))) for i in (0, 2)]
    for name in ("loss", "error", "scale_error"):
        assert float(sum(half[name] for half in halves)) / 2 == pytest.approx(float(whole[name]), rel=1e-4)
    assert float(halves[0]["scale_error"]) == 0


def test_the_perceptual_distance_joins_the_loss(photographs: Photographs) -> None:
    with torch.no_grad():
        plain, seen = (
            (task := vae_task(photographs, lpips=weight, equivariance=0.0)).compute_losses(
                task.load_batch(Microbatch(range(2), 0))
            )
            for weight in (0.0, 2.0)
        )
    assert float(seen["loss"]) > float(plain["loss"])


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["vae", *words], catch_exceptions=False)


def test_a_preset_trains_only_the_decoder(weights: dict[str, Path], tmp_path: Path) -> None:
    data = str(write_photographs(tmp_path / "data", ("a",)))
    small = ["--data", data, "--resolution", "16", "--batch-size", "4", "--max-steps", "2"]
    first = run(*small, "--out", str(tmp_path / "first"), "--channels", "16,16,16")
    assert first.exit_code == 0, first.output
    lpips = [word for name in ("vgg16.pth", "vgg.pth") for word in ("--lpips", str(weights[name]))]
    done = run(
        *small, "--out", str(tmp_path / "ema"), "--init", str(tmp_path / "first/vae"), "--preset", "ema", *lpips,
        "--kl", "0.5",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "ema" / "config.json").read_text())
    wanted = {"freeze_encoder": True, "equivariance": 0.0, "loss": "l1", "lpips": 1.0, "kl": 0.5}
    assert {name: config["vae"][name] for name in wanted} == wanted  # --kl was given by hand
    assert set(config["files"]["init"]) == {"path", "sha256"}
    before, after = (load_file(tmp_path / name / "final.safetensors") for name in ("first", "ema"))
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder", "post_quant_conv"}
    with safe_open(tmp_path / "ema" / "final.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["flowturbo"])["role"] == "vae"
    diffusers = load_file(tmp_path / "ema" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(diffusers[key], after[key]) for key in after)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "mse"], "--preset mse without --init"),
        (["--channels", "16,x"], "--channels '16,x'"),
        (["--channels", "10"], "multiples of 16"),
        (["--crop", "32"], "training squares of 32 pixels from photographs of 16"),
        (["--crop", "6", "--channels", "16,16,16"], "training squares of 6 pixels"),
        (["--equivariance", "1.5"], "--equivariance is 1.5"),
        (["--kl", "-1"], "--kl is -1"),
        (["--kl", "nan"], "--kl is nan"),
        (["--lpips-weight", "inf", "--lpips", "nowhere.pth"], "--lpips-weight is inf"),
        (["--lpips", "nowhere.pth"], "no checkpoint at nowhere.pth"),
    ],
)
def test_mistakes_print_one_message(tmp_path: Path, words: list[str], said: str) -> None:
    data = str(write_photographs(tmp_path / "data", ("a",), count=1))
    done = run("--data", data, "--out", str(tmp_path / "run"), "--resolution", "16", *words)
    assert done.exit_code == 1, done.output
    assert said in done.output
    assert "Do: " in done.output
    assert not (tmp_path / "run").exists()


def test_the_scaling_factor_makes_sampled_latents_of_unit_size(photographs: Photographs) -> None:
    """Their variance is that of the means plus the mean variance; here the means are grey levels, in two channels."""

    class Grey:
        device = torch.device("cpu")

        def encode(self, images: torch.Tensor) -> Any:
            mean = images.mean(dim=1, keepdim=True).repeat(1, 2, 1, 1) + 0.5
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, var=torch.full_like(mean, 0.04)))

    pixels, _ = photographs.read_batch(range(len(photographs)))
    grey = normalise_pixels(pixels).mean(axis=1).astype(np.float64)
    assert measure_scaling_factor(Grey(), photographs) == pytest.approx((grey.var() + 0.04) ** -0.5, rel=1e-4)


def test_crops_too_small_for_lpips_are_refused() -> None:
    with pytest.raises(TrainingError, match="crops of 8"):
        VaeConfig(crop=8, lpips=1.0)
