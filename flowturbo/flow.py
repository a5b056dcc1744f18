"""The linear path and its losses: SiT's velocity matching and FlowTurbo's refiner distillation.

Conventions: t = 0 is noise and t = 1 data, x_t = (1 − t)·noise + t·data, velocity = data − noise.
Letters: B images, C channels, H = W latent side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowturbo.models.sit import SiT
from runtime.sampling.guidance import REFERENCE_CHANNELS

VelocityNetwork = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Velocity at x [N, C or 2C, H, W], flow time t [N], labels y [N]: [N, C, H, W]."""


def interpolate_path(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t on the straight line from `noise` (t = 0) to `data` (t = 1); t [B]."""
    t = t.view(-1, *[1] * (data.ndim - 1))
    return (1 - t) * noise + t * data


def per_sample_mse(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared difference of each image: [B]."""
    return (a - b).float().square().flatten(1).mean(dim=1)


def flow_loss(model: VelocityNetwork, data: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Return the loss of velocity matching (SiT, eq. 7) per image [B]: mean of |model(x_t, t, y) − (data − noise)|²."""
    return per_sample_mse(model(interpolate_path(data, noise, t), t, y), data - noise)


def refine_velocity(refiner: SiT, x: Tensor, t: Tensor, velocity: Tensor, y: Tensor) -> Tensor:
    """Return the refined velocity, refiner([x, v], t, y) + v (FlowTurbo, eq. 9)."""
    change: Tensor = refiner(torch.cat([x, velocity], dim=1), t, y)
    return change + velocity


def guide_velocities(velocities: Tensor, scale: Tensor) -> Tensor:
    """Return the guided velocities of both branches [2B, C, H, W] for a loss: what `torch_sampler` mixes for samples.

    It takes scales as a tensor, and has no matrix product that autocast would round.

    Args:
        velocities: [2B, C, H, W] outputs with the label, then without.
        scale: [B]; 1 gives both branches the output with the label.
    """
    with_label, without_label = velocities.chunk(2)
    mixed = without_label + _broadcast_per_image(scale, velocities) * (with_label - without_label)
    guided = mixed[:, :REFERENCE_CHANNELS]
    return torch.cat(
        [torch.cat([guided, branch[:, REFERENCE_CHANNELS:]], dim=1) for branch in (with_label, without_label)]
    )


def _broadcast_per_image(value: Tensor | float, like: Tensor) -> Tensor | float:
    return value.view(-1, *[1] * (like.ndim - 1)) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class RefinerLossOptions:
    """What a refiner's loss adds to FlowTurbo's released one.

    Attributes:
        guidance: [B] scale of the velocities it learns to refine; None for unguided ones.
        null_label: the label of the unguided branch; needed with `guidance`.
        second_call: also trains the second call of the consistent block.
        past_the_end: lets the second call's time pass 1, as the released code lets the first's.
    """

    guidance: Tensor | None = None
    null_label: int = 0
    second_call: bool = False
    past_the_end: bool = False


def refiner_loss(
    refiner: SiT,
    teacher: VelocityNetwork,
    data: Tensor,
    noise: Tensor,
    t: Tensor,
    dt: Tensor | float,
    y: Tensor,
    y_student: Tensor | None = None,
    options: RefinerLossOptions | None = None,
) -> Tensor:
    """Return the distillation loss of the velocity refiner (FlowTurbo, algorithm 1) per image: [B].

    The refiner sees the teacher's slope at t and must give the teacher's slope at t + dt, at the point that an
    Euler step reaches. `y_student` holds the labels after dropout; the student and the second teacher call share
    them and the first teacher call keeps the true ones, as in the released code.

    Under guidance the same is asked of what a deployed step computes: both branches read their guided slopes, their
    outputs are guided at the same scale and added to these, and the result must be the teacher's guided slope.

    The consistent block (`blocks.plan_refiner_block`) calls the refiner once more, from its slope d, one further step
    ahead: refiner([x' + dt·d, d]) + d. That call is trained like the first, with d in place of the teacher's slope. No
    gradient flows through d, so each call has one target. The loss is the mean over both.
    """
    options = options or RefinerLossOptions()
    y_student = y if y_student is None else y_student
    num_images = len(data)

    def evaluate_branches(network: VelocityNetwork, points: Tensor, t: Tensor, y: Tensor) -> Tensor:
        # points [N, C or 2C, H, W]
        if options.guidance is None:
            return network(points, t, y)
        labels = torch.cat([y, torch.full_like(y, options.null_label)])
        return guide_velocities(network(points, torch.cat([t, t]), labels), options.guidance)

    def repeat_branches(x: Tensor) -> Tensor:
        return x if options.guidance is None else torch.cat([x, x])

    def refine_ahead(x: Tensor, t: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Return the refined slope of all branches, and its loss [B]."""
        with torch.no_grad():
            target = evaluate_branches(teacher, repeat_branches(x), t, y_student)
        refined = evaluate_branches(refiner, torch.cat([repeat_branches(x), slope], dim=1), t, y_student) + slope
        return refined, per_sample_mse(refined, target).view(-1, num_images).mean(dim=0)

    with torch.no_grad():
        x_t = interpolate_path(data, noise, t)
        slope = evaluate_branches(teacher, repeat_branches(x_t), t, y)
        x, t = x_t + _broadcast_per_image(dt, data) * slope[:num_images], t + dt
    refined, loss = refine_ahead(x, t, slope)
    if not options.second_call:
        return loss
    slope, second_dt = refined.detach(), torch.as_tensor(dt, device=t.device).expand_as(t)
    if not options.past_the_end:
        second_dt = torch.minimum(second_dt, (1 - t).clamp(min=0))
    _, second_loss = refine_ahead(x + _broadcast_per_image(second_dt, data) * slope[:num_images], t + second_dt, slope)
    return (loss + second_loss) / 2
