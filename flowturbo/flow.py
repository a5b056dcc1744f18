"""The linear path and its losses: SiT's velocity matching and FlowTurbo's refiner distillation.

Conventions: t = 0 is noise and t = 1 data, x_t = (1 − t)·noise + t·data, velocity = data − noise.
Letters: B images, C channels, H = W latent side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowturbo.models.sit import SiT

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


def refiner_loss(
    refiner: SiT,
    teacher: Velocity,
    data: Tensor,
    noise: Tensor,
    t: Tensor,
    dt: Tensor | float,
    y: Tensor,
    y_student: Tensor | None = None,
) -> Tensor:
    """Distillation loss of the velocity refiner (FlowTurbo, algorithm 1) per image: [B].

    The refiner sees the teacher's slope at t and must give the teacher's slope at t + dt, at the point that an
    Euler step reaches. `y_student` holds the labels after dropout; the student and the second teacher call share
    them and the first teacher call keeps the true ones, as in the released code.
    """
    y_student = y if y_student is None else y_student
    with torch.no_grad():
        x_t = path(data, noise, t)
        slope = teacher(x_t, t, y)
        step = dt.view(-1, *[1] * (data.ndim - 1)) if isinstance(dt, Tensor) else dt
        x_next = x_t + slope * step
        target = teacher(x_next, t + dt, y_student)
    return per_sample_mse(refine(refiner, x_next, t + dt, slope, y_student), target)
