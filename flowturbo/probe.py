"""Find out by a few evaluations whether a network is what its file and options say: names and shapes do not tell."""

from __future__ import annotations

from pathlib import Path

import torch

from flowturbo.models.sit import SiT
from runtime.system.errors import CheckpointError

CONTRADICTION = 0.9
"""Correlation of the output with unit noise from which a network is refused; trained networks reach 0.97."""
_AGREEMENT = -0.5
"""At t = 0 the velocity of a SiT is data − noise: below this correlation nothing else is looked at."""
_ROWS = 2
_DIT_TIMES = (999.0, 900.0)


def check_prediction(path: Path, model: SiT) -> None:
    """Check that a predictor does not behave like a network of another kind; untrained ones pass.

    Raises:
        CheckpointError: its weights are all alike, it predicts noise as DiT does, or its time runs the other way.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    if all(bool((matrix == matrix.flatten()[0]).all()) for matrix in matrices):
        raise CheckpointError(
            f"{path} holds no trained network: all numbers of each of its matrices are equal",
            remedy="take another checkpoint",
        )
    if measure_correlation(model, 0.0) <= _AGREEMENT:
        return
    is_turned = model.config.time_direction == "data-to-noise"
    sign = -1 if is_turned else 1
    if all(sign * measure_correlation(model, 1 - t if is_turned else t) >= CONTRADICTION for t in _DIT_TIMES):
        raise CheckpointError(
            f"{path} predicts the noise at the times 0 to 999, as DiT does; its tensors have SiT's names",
            allowed="networks that predict a velocity: SiT, REPA's SiT, FlowTurbo's predictors",
            remedy="take a SiT checkpoint; DiT is not supported",
        )
    if measure_correlation(model, 1.0) >= CONTRADICTION:
        other = "noise-to-data" if is_turned else "data-to-noise"
        raise CheckpointError(
            f"{path}: its time runs from {other.replace('-', ' ')}, but it was read as {model.config.time_direction}",
            remedy=f"--time-direction {other}",
        )


@torch.inference_mode()
def measure_correlation(model: SiT, t: float) -> float:
    """Return the correlation of the output with its input, which is unit noise, at a time; 0 of a constant output."""
    config = model.config
    shape = (_ROWS, config.in_channels, config.latent_size, config.latent_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = torch.full((_ROWS,), config.find_null_label(1.0))
    out = model(x, torch.full((_ROWS,), t), y)
    pair = torch.stack([x.flatten(), out.flatten()]).double()
    correlation = float(torch.corrcoef(pair)[0, 1])
    return correlation if abs(correlation) <= 1.01 else 0.0  # a constant output has none: NaN
