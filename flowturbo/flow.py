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

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def path(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t on the straight line from `noise` (t = 0) to `data` (t = 1); t [B]."""
    t = t.view(-1, *[1] * (data.ndim - 1))
    return (1 - t) * noise + t * data


def per_sample_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each image: [B]."""
    return (a - b).float().square().flatten(1).mean(dim=1)


def flow_loss(model: Velocity, data: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Velocity matching (SiT, eq. 7) per image: |model(x_t, t, y) − (data − noise)|² averaged over C·H·W: [B]."""
    return per_sample_mse(model(path(data, noise, t), t, y), data - noise)


def refine(refiner: SiT, x: Tensor, t: Tensor, velocity: Tensor, y: Tensor) -> Tensor:
    """The refined velocity, refiner([x, v], t, y) + v (FlowTurbo, eq. 9)."""
    change: Tensor = refiner(torch.cat([x, velocity], dim=1), t, y)
    return change + velocity


def guided_rows(rows: Tensor, scale: Tensor | float, channels: int = REFERENCE_CHANNELS) -> Tensor:
    """Classifier-free guidance of both branches, as the deployed samplers form it (`runtime/sampling/guidance.py`).

    Args:
        rows: [2B, C, H, W] outputs with the label, then without.
        scale: one number, or one per image [B]; 1 gives both branches the output with the label.
        channels: the first so many are guided; in the others each branch keeps its own.
    """
    with_label, without = rows.chunk(2)
    mixed = without + _per_image(scale, rows) * (with_label - without)
    return torch.cat([torch.cat([mixed[:, :channels], own[:, channels:]], dim=1) for own in (with_label, without)])


def _per_image(value: Tensor | float, like: Tensor) -> Tensor | float:
    return value.view(-1, *[1] * (like.ndim - 1)) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class RefinerSteps:
    """How a refiner's loss is made, beside FlowTurbo's released one.

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
    teacher: Velocity,
    data: Tensor,
    noise: Tensor,
    t: Tensor,
    dt: Tensor | float,
    y: Tensor,
    y_student: Tensor | None = None,
    how: RefinerSteps | None = None,
) -> Tensor:
    """Distillation loss of the velocity refiner (FlowTurbo, algorithm 1) per image: [B].

    The refiner sees the teacher's slope at t and must give the teacher's slope at t + dt, at the point that an
    Euler step reaches. `y_student` holds the labels after dropout; the student and the second teacher call share
    them and the first teacher call keeps the true ones, as in the released code.

    Under guidance the same is asked of what a deployed step computes: both branches read their guided slopes, their
    outputs are guided at the same scale and added to these, and the result must be the teacher's guided slope.

    The consistent block (`blocks.refiner_block`) calls the refiner once more, from its own slope d, one
    further step ahead: refiner([x' + dt·d, d]) + d. That call is trained like the first with d in place of the
    teacher's slope; no gradient flows through d, so each call has one target and the first is not bent to please the
    second. The loss is the mean over both.
    """
    how = how or RefinerSteps()
    y_student = y if y_student is None else y_student
    images = len(data)

    def rows(network: Velocity, points: Tensor, t: Tensor, y: Tensor) -> Tensor:  # of points [N, C or 2C, H, W]
        if how.guidance is None:
            return network(points, t, y)
        labels = torch.cat([y, torch.full_like(y, how.null_label)])
        return guided_rows(network(points, torch.cat([t, t]), labels), how.guidance)

    def branches(x: Tensor) -> Tensor:
        return x if how.guidance is None else torch.cat([x, x])

    def call(x: Tensor, t: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """The refined slope, all rows, and its loss [B]."""
        with torch.no_grad():
            target = rows(teacher, branches(x), t, y_student)
        refined = rows(refiner, torch.cat([branches(x), slope], dim=1), t, y_student) + slope
        return refined, per_sample_mse(refined, target).view(-1, images).mean(dim=0)

    with torch.no_grad():
        x_t = path(data, noise, t)
        slope = rows(teacher, branches(x_t), t, y)
        x, t = x_t + _per_image(dt, data) * slope[:images], t + dt
    refined, loss = call(x, t, slope)
    if not how.second_call:
        return loss
    slope, length = refined.detach(), torch.as_tensor(dt, device=t.device).expand_as(t)
    if not how.past_the_end:
        length = torch.minimum(length, (1 - t).clamp(min=0))
    _, second = call(x + _per_image(length, data) * slope[:images], t + length, slope)
    return (loss + second) / 2
