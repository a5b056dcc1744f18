"""Sample in plain PyTorch by the plans that engines run: the reference that they are compared with.

Letters: B images, N branches (B ≤ N ≤ 2B without mixtures), C latent channels, H = W latent side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from flowturbo.flow import VelocityNetwork
from runtime.sampling.guidance import REFERENCE_CHANNELS, BranchBatch, ImageCondition, build_branches
from runtime.sampling.plan import Evaluation, Plan, integrate

EvaluationHook = Callable[[Evaluation], AbstractContextManager[None]]
"""Give the block that one evaluation of the plan runs in."""


def make_conditions(labels: Sequence[int], scales: Sequence[float], null_label: int) -> list[ImageCondition]:
    """Return the conditions of B images of one class each, guided away from the null label."""
    return [ImageCondition(((label, 1.0),), scale, null_label) for label, scale in zip(labels, scales, strict=True)]


class GuidedNetworks:
    """Networks under classifier-free guidance: what one evaluation of a plan computes.

    Args:
        networks: the predictor, and the refiner where the plan has one.
        conditions: labels and scale of each of the B images.
        channels: C.
        guided_channels: the first so many channels are guided.
        device: where the networks run.
    """

    def __init__(
        self,
        networks: Mapping[str, VelocityNetwork],
        conditions: Sequence[ImageCondition],
        channels: int,
        guided_channels: int = REFERENCE_CHANNELS,
        device: torch.device | str = "cpu",
    ) -> None:
        self._networks = networks
        self._branches = {
            guided: _BranchTensors(build_branches(conditions, channels, guided_channels, guided=guided), device)
            for guided in (True, False)
        }

    def evaluate(
        self, network: str, x: Tensor, t: Tensor | float, v: Tensor | None = None, *, guided: bool = True
    ) -> Tensor:
        """Return the velocities [N, C, H, W] of all branches, mixed by guidance; differentiable in x and t.

        Args:
            x: points of the images [B, C, H, W].
            t: flow time, one for all images.
            v: for the refiner, the velocities [N, C, H, W] that it reads.
            guided: False outside the guidance interval, where the other branch is not evaluated.
        """
        branches = self._branches[guided]
        points = x[branches.row_image]
        if v is not None:
            points = torch.cat([points, v], dim=1)  # [N, 2C, H, W]
        times = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(points))
        velocities = self._networks[network](points, times, branches.labels)
        return torch.einsum("cnm,mchw->nchw", branches.mix, velocities)


class _BranchTensors:
    def __init__(self, branches: BranchBatch, device: torch.device | str) -> None:
        self.labels = torch.from_numpy(branches.labels).long().to(device)  # [N]
        self.row_image = torch.from_numpy(branches.row_image).long().to(device)  # [N]
        self.mix = torch.from_numpy(branches.mix).to(device)  # [C, N, N]


@torch.no_grad()
def sample(
    networks: Mapping[str, VelocityNetwork],
    plan: Plan,
    conditions: Sequence[ImageCondition],
    noise: Tensor,
    *,
    guided_channels: int = REFERENCE_CHANNELS,
    draws: Sequence[Tensor] = (),
    hook: EvaluationHook = lambda evaluation: nullcontext(),
) -> Tensor:
    """Return the latents [B, C, H, W] at the end of a plan of fixed steps. Sums are formed in float32.

    Args:
        networks: the predictor, and the refiner where the plan has one; on the device of `noise`.
        conditions: labels and scale of each image; `make_conditions`, or those of a `Request`.
        noise: where the images start, [B, C, H, W].
        guided_channels: the first so many channels are guided.
        draws: noise of a stochastic plan, in order, each [B, C, H, W].
        hook: called before each evaluation; the network runs inside the block that it returns.
    """
    guided_networks = GuidedNetworks(networks, conditions, noise.shape[1], guided_channels, noise.device)
    evaluations = iter(plan)

    def evaluate(x: Tensor, t: float, v: Tensor | None = None) -> Tensor:
        evaluation = next(evaluations)
        with hook(evaluation):
            return guided_networks.evaluate(evaluation.network, x, t, v, guided=evaluation.guided).float()

    latents: Tensor = integrate(plan, noise, evaluate, lambda x, t, v, add: evaluate(x, t, v) + add, noise=draws)
    return latents
