"""Networks with SiT's names and shapes that are something else are found by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import Golden
from torch import Tensor

from flowturbo import demo
from flowturbo.checkpoints import load_network
from flowturbo.models.sit import SiT, SiTConfig, TimeDirection
from flowturbo.probe import check_prediction, measure_correlation
from runtime.system.errors import CheckpointError

PATH = Path("some.pt")


def build_copying_sit(sign: float) -> SiT:
    """A SiT whose output is its input times `sign`, at any time: what DiT makes of noise at its last times."""
    model = SiT(SiTConfig(1, 32, 2, 2, 8, classes=3, learned_sigma=False)).requires_grad_(False).eval()
    eye = torch.eye(16)
    channels_last = eye.reshape(4, 2, 2, 16).permute(1, 2, 0, 3).reshape(16, 16)  # the output has its channels last
    model.x_embedder.proj.weight.copy_(100 * torch.cat([eye, -eye]).reshape(32, 4, 2, 2))  # positions hardly count
    model.final_layer.linear.weight.copy_(sign * torch.cat([channels_last, torch.zeros(16, 16)], dim=1))
    return model


class ReversedSiT(SiT):
    """A velocity whose time runs from data to noise, as a network with another direction computes it."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t.reshape(-1, 1, 1, 1) == 1, x, 0.6 * x.flip(0))


def test_a_network_that_predicts_noise_is_refused() -> None:
    model = build_copying_sit(1)
    assert measure_correlation(model, 999) > 0.95
    with pytest.raises(CheckpointError, match="as DiT does") as caught:
        check_prediction(PATH, model)
    assert str(PATH) in caught.value.given and "velocity" in caught.value.allowed and "SiT" in caught.value.remedy


def test_a_velocity_passes() -> None:
    check_prediction(PATH, build_copying_sit(-1))


def test_time_that_runs_the_other_way_is_refused() -> None:
    with pytest.raises(CheckpointError, match="runs from data to noise") as caught:
        check_prediction(PATH, ReversedSiT(build_copying_sit(1).config))
    assert caught.value.remedy == "--time-direction data-to-noise"


@pytest.mark.parametrize("direction", ["noise-to-data", "data-to-noise"])
def test_the_demo_model_runs_one_way_only(direction: TimeDirection) -> None:
    model = load_network(demo.PREDICTOR, "predictor", time_direction=direction).model
    if direction == "noise-to-data":
        check_prediction(PATH, model)
    else:
        with pytest.raises(CheckpointError, match="--time-direction noise-to-data"):
            check_prediction(PATH, model)


def test_random_and_fresh_networks_pass(golden: Golden) -> None:
    check_prediction(PATH, golden.predictor)
    check_prediction(PATH, SiT(golden.predictor.config).eval())  # its output is zero


@pytest.mark.parametrize("change", [torch.zeros_like, torch.ones_like])
def test_networks_of_equal_numbers_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    model = build_copying_sit(-1)
    for parameter in model.parameters():
        parameter.copy_(change(parameter))
    with pytest.raises(CheckpointError, match="no trained network"):
        check_prediction(PATH, model)
