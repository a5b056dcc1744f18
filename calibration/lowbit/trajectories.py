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
from calibration.samplers.search_job import ModelSpec, resize_networks, resolve_guidance
from calibration.samplers.table_search import NetworkSet
from export.build_request import BuildRequest, resolve_request
from export.lowbit.layers import list_layers
from export.model import CheckpointModel, load_model
from flowturbo.models.sit import SiT
from flowturbo.models.vae import Vae
from flowturbo.torch_sampler import build_guided_velocity
from runtime.sampling.guidance import BranchBatch, GuidanceInterval, ImageCondition, build_branches
from runtime.sampling.noise import sample_noise
from runtime.sampling.plan import Evaluation, Plan, integrate
from runtime.sampling.sampler import SamplerChoice, resolve_sampler
from runtime.system.errors import RequestError

LayerHook = Callable[[str, float, Tensor], None]
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

    networks: NetworkSet
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
        return [name for role, net in self.by_role.items() for name in list_layers(role, net.config.depth)]

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

    def list_times(self) -> dict[str, tuple[float, ...]]:
        """Flow times that the sampler evaluates, by network."""
        return {role: tuple(sorted({e.t for e in self.plan if e.network == role})) for role in self.by_role}


def load_deployment(
    model_spec: ModelSpec, sampler: Mapping[str, Any], *, vaes: Sequence[str] = ("none",)
) -> Deployment:
    """Loads the checkpoints and resolves the sampler: the model's own where nothing is named.

    Args:
        sampler: schedule, or solver with steps, and grid.
        vaes: as `build-engines` takes them.

    Raises:
        RequestError: the sampler needs a refiner that is not there, draws noise, or chooses its own steps.
    """
    request = resolve_request(
        predictor=model_spec.predictor,
        refiner=None if model_spec.refiner is None else str(model_spec.refiner),
        vaes=vaes,
        heads=model_spec.heads,
        time_direction=model_spec.time_direction,
        targets=("cpu",),
        precision="fp32",
    )
    model = load_model(request)
    guidance = resolve_guidance(model_spec.guidance, model)
    sampler_plan = _resolve_plan(model, sampler, model_spec.guidance)
    return Deployment(
        resize_networks(model, model_spec, None),
        model.vaes,
        sampler_plan[1],
        sampler_plan[0],
        guidance["guidance"],
        guidance["channels"],
        guidance["interval"],
        model.factor,
        request,
    )


def _resolve_plan(model: CheckpointModel, requested: Mapping[str, Any], guidance: Guidance) -> tuple[str, Plan]:
    options = {name: value for name, value in requested.items() if value is not None}
    if not options:
        defaults = model.make_defaults()
        default_options = {"schedule": defaults.schedule, "solver": defaults.solver, "steps": defaults.steps}
        options = {name: value for name, value in default_options.items() if value is not None}
    resolved = resolve_sampler(SamplerChoice(**options, interval=GuidanceInterval(*guidance.interval)))
    if not resolved.plan:
        raise RequestError(
            f"{resolved.name}, which chooses its own steps",
            allowed="a schedule or a solver with fixed steps",
            remedy="calibrate with the steps that it takes on average: --solver ab2 --steps 12",
        )
    if any(not isinstance(key, str | int) for evaluation in resolved.plan for key in evaluation.list_dependencies()):
        raise RequestError(f"{resolved.name}, which draws noise", allowed="a deterministic sampler")
    if model.refiner is None and any(evaluation.network == "refiner" for evaluation in resolved.plan):
        raise RequestError(
            f"schedule {resolved.name} without a refiner",
            allowed="blocks of H and P",
            remedy="name one: --refiner FILE",
        )
    return resolved.name, resolved.plan


def sample_deployment(
    deployment: Deployment, labels: Sequence[int], seeds: Sequence[int], hook: LayerHook | None = None
) -> Tensor:
    """Latents [B, C, H, W] of one batch.

    Args:
        hook: told of every layer's input.
    """
    noise = torch.from_numpy(sample_noise(list(seeds), deployment.networks.shape))
    branches = {guided: _make_branches(deployment, labels, guided) for guided in (True, False)}
    cursor = _PlanCursor(iter(deployment.plan))
    evaluate = {
        (role, guided): build_guided_velocity(network, branches[guided])
        for role, network in deployment.by_role.items()
        for guided in branches
    }

    def predict(x: Tensor, t: float) -> Tensor:
        return evaluate["predictor", cursor.advance().guided](x, t, None)

    def refine(x: Tensor, t: float, v: Tensor, add: Tensor) -> Tensor:
        return evaluate["refiner", cursor.advance().guided](x, t, v) + add

    with torch.inference_mode(), _hook_layers(deployment, cursor, hook):
        latents: Tensor = integrate(deployment.plan, noise, predict, refine)
    return latents.float()


def _make_branches(deployment: Deployment, labels: Sequence[int], guided: bool) -> BranchBatch:
    config = deployment.networks.predictor.config
    images = [ImageCondition(((label, 1.0),), deployment.scale, config.classes) for label in labels]
    return build_branches(images, config.out_channels, deployment.channels, guided=guided)


class _PlanCursor:
    """Which evaluation of the plan runs."""

    def __init__(self, plan: Iterator[Evaluation]) -> None:
        self._plan, self.t = plan, 0.0

    def advance(self) -> Evaluation:
        evaluation = next(self._plan)
        self.t = evaluation.t
        return evaluation


@contextmanager
def _hook_layers(deployment: Deployment, cursor: _PlanCursor, hook: LayerHook | None) -> Iterator[None]:
    handles = []
    if hook is not None:
        for name in deployment.layers:
            role, _, path = name.partition("/")
            layer = deployment.by_role[role].get_submodule(path)
            handles.append(layer.register_forward_pre_hook(_make_hook(hook, name, cursor)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _make_hook(hook: LayerHook, name: str, cursor: _PlanCursor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def call_hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hook(name, cursor.t, inputs[0])

    return call_hook
