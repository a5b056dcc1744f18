"""The modules that are traced: exactly the engine contract (runtime/directory/contract.py), in PyTorch.

Inputs and outputs are float32 (labels and indices int32). The networks inside run in the dtype they were cast to, with
norms and the time embedding in float32. Reshapes use −1 and sizes known at export, so that no shape arithmetic stays
in the graph.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flowturbo.models.sit import Attention, SiT
from flowturbo.models.vae import Vae
from runtime.sampling.plan import HISTORY


class ConditioningGraph(nn.Module):
    """(t, y) → mods: everything of a SiT that depends on time and label, a third of its weights."""

    def __init__(self, model: SiT) -> None:
        super().__init__()
        self.config = model.config
        self.t_embedder = model.t_embedder
        self.y_embedder = model.y_embedder
        self.modulations = nn.ModuleList(part.adaLN_modulation for part in [*model.blocks, model.final_layer])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:  # [N], [N] -> [N, M]
        if self.config.time_direction == "data-to-noise":
            t = 1.0 - t
        c = self.t_embedder(t) + self.y_embedder(y)
        return torch.cat([modulation(c) for modulation in self.modulations], dim=1).float()


class _TrunkOnly(nn.Module):
    """A SiT without its conditioning weights, so that they are not written into the trunk's file."""

    def __init__(self, model: SiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, mods: Tensor) -> Tensor:
        return self.model.trunk(x, mods)


def _sum_weighted(coefficients: Tensor, slopes: Tensor) -> Tensor:
    """Σ_k coefficients[k, b]·slopes[k, b]: [K, B], [K, B, C, H, W] -> [B, C, H, W]."""
    return (coefficients.reshape(HISTORY, -1, 1, 1, 1) * slopes).sum(dim=0)


def _broadcast(coefficients: Tensor) -> Tensor:  # [B] -> [B, 1, 1, 1]
    return coefficients.reshape(-1, 1, 1, 1)


class PredictorGraph(nn.Module):
    """One evaluation of the predictor: form the point, evaluate, guide, combine, estimate the error."""

    def __init__(self, model: SiT) -> None:
        super().__init__()
        self.network = _TrunkOnly(model)
        self.side = model.config.latent_size
        self.channels = model.config.out_channels
        self.dtype = model.x_embedder.proj.weight.dtype

    def forward(
        self,
        base: Tensor,  # [B, C, H, W]
        slopes: Tensor,  # [K, B, C, H, W]
        point_coef: Tensor,  # [K + 1, B]
        update_coef: Tensor,  # [K + 2, B]
        error_coef: Tensor,  # [K + 1, B]
        atol: Tensor,  # [B]
        rtol: Tensor,  # [B]
        mods: Tensor,  # [N, M]
        row_image: Tensor,  # [N]
        mix: Tensor,  # [C, N, N]
    ) -> tuple[Tensor, ...]:
        x = self._form_points(base, slopes, point_coef, row_image)
        velocities = self._evaluate_guided(x, mods, mix)
        return self._combine(base, slopes, update_coef, error_coef, atol, rtol, velocities)

    def _form_points(self, base: Tensor, slopes: Tensor, point_coef: Tensor, row_image: Tensor) -> Tensor:
        x = _broadcast(point_coef[0]) * base + _sum_weighted(point_coef[1:], slopes)
        return x.index_select(0, row_image)  # [N, C, H, W]

    def _evaluate_guided(self, x: Tensor, mods: Tensor, mix: Tensor) -> Tensor:
        """Network and guidance; mix[c] maps the rows of channel c."""
        out = self.network(x.to(self.dtype), mods.to(self.dtype)).float()  # [N, C, H, W]
        pixels = self.side * self.side
        by_channel = out.reshape(-1, self.channels, pixels).permute(1, 0, 2)  # [C, N, H·W]
        guided: Tensor = mix @ by_channel
        return guided.permute(1, 0, 2).reshape(-1, self.channels, self.side, self.side)

    def _combine(
        self,
        base: Tensor,
        slopes: Tensor,
        update_coef: Tensor,
        error_coef: Tensor,
        atol: Tensor,
        rtol: Tensor,
        velocities: Tensor,
    ) -> tuple[Tensor, ...]:
        slope = velocities[: base.shape[0]]
        x_next = (
            _broadcast(update_coef[0]) * base
            + _sum_weighted(update_coef[1:-1], slopes)
            + _broadcast(update_coef[-1]) * slope
        )
        error = _sum_weighted(error_coef[:-1], slopes) + _broadcast(error_coef[-1]) * slope
        tolerance = _broadcast(atol) + _broadcast(rtol) * torch.maximum(base.abs(), x_next.abs())
        err = (error / tolerance).square().mean(dim=(1, 2, 3)).sqrt()
        slope_rms = slope.square().mean(dim=(1, 2, 3)).sqrt()
        return slope, velocities, x_next, err, slope_rms


class RefinerGraph(PredictorGraph):
    """One evaluation of the refiner: it reads [x, velocity] and its output is added to `residual`."""

    def forward(  # type: ignore[override]  # two more inputs than the predictor, as the contract says
        self,
        base: Tensor,
        slopes: Tensor,
        point_coef: Tensor,
        update_coef: Tensor,
        error_coef: Tensor,
        atol: Tensor,
        rtol: Tensor,
        mods: Tensor,
        row_image: Tensor,
        mix: Tensor,
        velocity: Tensor,  # [N, C, H, W]
        residual: Tensor,  # [N, C, H, W]
    ) -> tuple[Tensor, ...]:
        x = self._form_points(base, slopes, point_coef, row_image)
        velocities = self._evaluate_guided(torch.cat([x, velocity], dim=1), mods, mix) + residual
        return self._combine(base, slopes, update_coef, error_coef, atol, rtol, velocities)


class DecoderGraph(nn.Module):
    """Sampler's latents → pictures in [0, 1], and a check that no pixel was NaN or infinite before clamping."""

    def __init__(self, vae: Vae, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae, self.module, self.dtype = vae, vae.module, dtype

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        scaled = self.vae.undo_scaling(latents).to(self.dtype)
        module: Any = self.module
        return to_picture(module.decode(scaled, return_dict=False)[0].float())


def to_picture(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return a decoder's float32 output in [−1, 1] as pictures in [0, 1], and 1 per image that is finite, else 0."""
    # A sum is finite only where every term is, and 0·x is 0 only for finite x: no IsInf op, which TensorRT lacks.
    finite = ((pixels * 0).abs().sum(dim=(1, 2, 3)) == 0).float()
    return (pixels / 2 + 0.5).clamp(0, 1), finite


class EncoderGraph(nn.Module):
    """Pictures in [0, 1] → mean and standard deviation of scaled latents."""

    def __init__(self, vae: Vae, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae, self.module, self.dtype = vae, vae.module, dtype

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.vae.encode(images.to(self.dtype))
        return mean.float(), std.float()


def make_deployable(model: SiT) -> SiT:
    """Return the network to trace, over the weights of `model`, which does not change.

    Attention is written out, and the unused variance channels of the last layer are cut off.
    """
    if model.config.learned_sigma:
        deployable_copy = _drop_sigma(model)
    else:  # the copy shares every tensor: a SiT-XL has 2.7 GB of them
        shared: dict[int, Tensor] = {id(weight): nn.Parameter(weight.detach()) for weight in model.parameters()}
        shared |= {id(buffer): buffer for buffer in model.buffers()}
        deployable_copy = copy.deepcopy(model, shared)
    for module in deployable_copy.modules():
        if isinstance(module, Attention):
            module.is_unfused = True
    return deployable_copy.eval().requires_grad_(False)


def _drop_sigma(model: SiT) -> SiT:
    config = replace(model.config, learned_sigma=False)
    with torch.device("meta"):
        pruned = SiT(config)
    state = model.state_dict()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        by_patch = state[key].unflatten(0, (config.patch**2, 2, config.out_channels))
        state[key] = by_patch[:, 0].flatten(0, 1).contiguous()
    pruned.load_state_dict(state, assign=True)
    return pruned
