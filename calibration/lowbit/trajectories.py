"""Whole guided trajectories in PyTorch, as they will be deployed, with somebody looking at every layer's input.

Letters: B images, N rows, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibration.samplers.probe import Guidance
from calibration.samplers.search_job import Wanted, networks_of, resolved_guidance
from calibration.samplers.table_search import Networks
from export.build_request import BuildRequest, resolve_request
from export.lowbit.layers import layer_names
from export.trace import Model, load_model
from flowturbo.models.sit import SiT
from flowturbo.models.vae import Vae
from flowturbo.torch_sampler import rows_velocity
from runtime.sampling.guidance import Branches as Image
from runtime.sampling.guidance import Interval, Rows, rows_of
from runtime.sampling.noise import noise_of_seeds
from runtime.sampling.plan import Evaluation, Plan, integrate
from runtime.sampling.sampler import SamplerChoice, resolve_sampler
from runtime.system.errors import RequestError

Look = Callable[[str, float, Tensor], None]
"""Told of a layer, the flow time, and its input [N, T, C]."""


@dataclass(frozen=True)
class Deployment:
    """A model and how it will be sampled.

    Attributes:
        networks: at the resolution in question.
        vaes: decoders by variant; empty where none is needed.
        plan: of the sampler, whose name is `sampler`.
        scale, channels, interval: guidance.
        request: where it all comes from.
    """

    networks: Networks
    vaes: Mapping[str, Vae]
    plan: Plan
    sampler: str
    scale: float
    channels: int
    interval: tuple[float, float]
    factor: int
    request: BuildRequest

    @property
    def by_role(self) -> dict[str, SiT]:
        """predictor and, if there is one, refiner."""
        refiner = self.networks.refiner
        return {"predictor": self.networks.predictor, **({} if refiner is None else {"refiner": refiner})}

    @property
    def model(self) -> dict[str, str]:
        """sha256 of the checkpoints by role."""
        return {role: self.request.inputs[role] for role in self.by_role}

    @property
    def layers(self) -> list[str]:
        """Every quantisable layer."""
        return [name for role, net in self.by_role.items() for name in layer_names(role, net.config.depth)]

    @property
    def settings(self) -> dict[str, Any]:
        """For the record."""
        return {
            "sampler": self.sampler,
            "guidance": self.scale,
            "guidance_channels": self.channels,
            "guidance_interval": list(self.interval),
            "resolution": self.networks.predictor.config.latent_size * self.factor,
        }

    def times(self) -> dict[str, tuple[float, ...]]:
        """Flow times that the sampler evaluates, by network."""
        return {role: tuple(sorted({e.t for e in self.plan if e.network == role})) for role in self.by_role}


def load_deployment(wanted: Wanted, sampler: Mapping[str, Any], *, vaes: Sequence[str] = ("none",)) -> Deployment:
    """Loads the checkpoints and resolves the sampler: the model's own where nothing is named.

    Args:
        sampler: schedule, or solver with steps, and grid.
        vaes: as `build-engines` takes them.

    Raises:
        RequestError: the sampler needs a refiner that is not there, draws noise, or chooses its own steps.
    """
    request = resolve_request(
        predictor=wanted.predictor,
        refiner=None if wanted.refiner is None else str(wanted.refiner),
        vaes=vaes,
        heads=wanted.heads,
        time_direction=wanted.time_direction,
        targets=("cpu",),
        precision="fp32",
    )
    model = load_model(request)
    guided = resolved_guidance(wanted.guidance, model)
    chosen = _sampler(model, sampler, wanted.guidance)
    return Deployment(
        networks_of(model, wanted, None),
        model.vaes,
        chosen[1],
        chosen[0],
        guided["guidance"],
        guided["channels"],
        guided["interval"],
        model.factor,
        request,
    )


def _sampler(model: Model, named: Mapping[str, Any], guidance: Guidance) -> tuple[str, Plan]:
    given = {name: value for name, value in named.items() if value is not None}
    if not given:
        defaults = model.defaults()
        own = {"schedule": defaults.schedule, "solver": defaults.solver, "steps": defaults.steps}
        given = {name: value for name, value in own.items() if value is not None}
    resolved = resolve_sampler(SamplerChoice(**given, interval=Interval(*guidance.interval)))
    if not resolved.plan:
        raise RequestError(
            f"{resolved.name}, which chooses its own steps",
            allowed="a schedule or a solver with fixed steps",
            remedy="calibrate with the steps that it takes on average: --solver ab2 --steps 12",
        )
    if any(not isinstance(key, str | int) for e in resolved.plan for key in e.reads()):
        raise RequestError(f"{resolved.name}, which draws noise", allowed="a deterministic sampler")
    if model.refiner is None and any(e.network == "refiner" for e in resolved.plan):
        raise RequestError(
            f"schedule {resolved.name} without a refiner",
            allowed="blocks of H and P",
            remedy="name one: --refiner FILE",
        )
    return resolved.name, resolved.plan


def sample(deployment: Deployment, labels: Sequence[int], seeds: Sequence[int], look: Look | None = None) -> Tensor:
    """Latents [B, C, H, W] of one batch.

    Args:
        look: told of every layer's input.
    """
    noise = torch.from_numpy(noise_of_seeds(list(seeds), deployment.networks.shape))
    rows = {guided: _rows(deployment, labels, guided) for guided in (True, False)}
    clock = _Clock(iter(deployment.plan))
    evaluate = {
        (role, guided): rows_velocity(network, rows[guided])
        for role, network in deployment.by_role.items()
        for guided in rows
    }

    def predict(x: Tensor, t: float) -> Tensor:
        return evaluate["predictor", clock.next().guided](x, t, None)

    def refine(x: Tensor, t: float, v: Tensor, add: Tensor) -> Tensor:
        return evaluate["refiner", clock.next().guided](x, t, v) + add

    with torch.inference_mode(), _watched(deployment, clock, look):
        latents: Tensor = integrate(deployment.plan, noise, predict, refine)
    return latents.float()


def _rows(deployment: Deployment, labels: Sequence[int], guided: bool) -> Rows:
    config = deployment.networks.predictor.config
    images = [Image(((label, 1.0),), deployment.scale, config.classes) for label in labels]
    return rows_of(images, config.out_channels, deployment.channels, guided=guided)


class _Clock:
    """Which evaluation of the plan runs."""

    def __init__(self, plan: Iterator[Evaluation]) -> None:
        self._plan, self.t = plan, 0.0

    def next(self) -> Evaluation:
        evaluation = next(self._plan)
        self.t = evaluation.t
        return evaluation


@contextmanager
def _watched(deployment: Deployment, clock: _Clock, look: Look | None) -> Iterator[None]:
    handles = []
    if look is not None:
        for name in deployment.layers:
            role, _, path = name.partition("/")
            layer = deployment.by_role[role].get_submodule(path)
            handles.append(layer.register_forward_pre_hook(_telling(look, name, clock)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _telling(look: Look, name: str, clock: _Clock) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def tell(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        look(name, clock.t, inputs[0])

    return tell
