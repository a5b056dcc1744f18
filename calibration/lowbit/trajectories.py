"""Run whole guided trajectories in PyTorch, as they will be deployed, and show a hook the input of every layer.

Letters: B images, N branches, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from calibration.guidance_choice import ResolvedGuidance
from calibration.model import ModelSpec, NetworkSet, find_linear, resize_networks
from export.build_request import BuildRequest
from export.lowbit.layers import list_layers
from export.model import load_model
from flowturbo.models.vae import Vae
from flowturbo.torch_sampler import make_conditions, sample
from runtime.sampling.guidance import GuidanceInterval
from runtime.sampling.noise import sample_noise
from runtime.sampling.plan import Evaluation, Plan
from runtime.sampling.sampler import SamplerChoice, resolve_sampler
from runtime.system.errors import RequestError

LayerHook = Callable[[str, float, Tensor], None]
"""Called with the name of a layer, the flow time, and its input [N, T, C]."""


@dataclass(frozen=True)
class Deployment:
    """A model and how it will be sampled.

    Attributes:
        networks: at the resolution in question.
        vaes: decoders by variant; empty where none is needed.
        plan: evaluations of the sampler.
        sampler: name of the sampler.
        guidance: of both networks.
        factor: pixels per latent.
        request: names the checkpoints and how they are read.
    """

    networks: NetworkSet
    vaes: Mapping[str, Vae]
    plan: Plan
    sampler: str
    guidance: ResolvedGuidance
    factor: int
    request: BuildRequest

    @property
    def model(self) -> dict[str, str]:
        """sha256 of the checkpoints by role."""
        return {role: self.request.inputs[role] for role in self.networks.by_role}

    @property
    def layers(self) -> list[str]:
        """Names of all layers that can be quantised."""
        return [name for role, net in self.networks.by_role.items() for name in list_layers(role, net.config.depth)]

    @property
    def settings(self) -> dict[str, str | float | list[float]]:
        """How it is sampled, for the record."""
        return {
            "sampler": self.sampler,
            "guidance": self.guidance.scale,
            "guidance_channels": self.guidance.channels,
            "guidance_interval": list(self.guidance.interval),
            "resolution": self.networks.predictor.config.latent_size * self.factor,
        }

    def list_times(self) -> dict[str, tuple[float, ...]]:
        """Return the flow times that the sampler evaluates, by network."""
        return {role: tuple(sorted({e.t for e in self.plan if e.network == role})) for role in self.networks.by_role}


def load_deployment(
    model_spec: ModelSpec, choice: SamplerChoice | None = None, *, vaes: Sequence[str] = ("none",)
) -> Deployment:
    """Load the checkpoints and resolve the sampler.

    Args:
        choice: the sampler; its guidance interval is that of `model_spec`. None takes the default of the model.
        vaes: as `build-engines` takes them.

    Raises:
        RequestError: the sampler needs a refiner that is missing, draws noise, or chooses its own steps.
    """
    request = model_spec.resolve_request(vaes)
    model = load_model(request)
    defaults = model.make_defaults()
    choice = choice or SamplerChoice(schedule=defaults.schedule, solver=defaults.solver, steps=defaults.steps)
    sampler = resolve_sampler(replace(choice, interval=GuidanceInterval(*model_spec.guidance.interval)))
    if not sampler.plan:
        raise RequestError(
            f"{sampler.name}, which chooses its own steps",
            allowed="a schedule or a solver with fixed steps",
            remedy="calibrate with the steps that it takes on average: --solver ab2 --steps 12",
        )
    if sampler.num_draws:
        raise RequestError(f"{sampler.name}, which draws noise", allowed="a deterministic sampler")
    if model.refiner is None and sampler.needs_refiner:
        raise RequestError(
            f"schedule {sampler.name} without a refiner",
            allowed="blocks of H and P",
            remedy="name one: --refiner FILE",
        )
    return Deployment(
        resize_networks(model, model_spec.resolution),
        model.vaes,
        sampler.plan,
        sampler.name,
        model_spec.guidance.resolve(defaults),
        model.factor,
        request,
    )


def sample_deployment(
    deployment: Deployment, labels: Sequence[int], seeds: Sequence[int], hook: LayerHook | None = None
) -> Tensor:
    """Return the latents [B, C, H, W] of one batch.

    Args:
        hook: called with the input of every layer.
    """
    networks = deployment.networks.by_role
    layers = [] if hook is None else [(name, find_linear(networks, name)) for name in deployment.layers]

    @contextmanager
    def watch_layers(evaluation: Evaluation) -> Iterator[None]:
        def call_hook(module: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
            if hook is not None:
                hook(name, evaluation.t, inputs[0])

        handles = [layer.register_forward_pre_hook(partial(call_hook, name=name)) for name, layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    guidance = deployment.guidance
    with torch.inference_mode():
        return sample(
            networks,
            deployment.plan,
            make_conditions(
                labels,
                [guidance.scale] * len(labels),
                deployment.networks.predictor.config.find_null_label(guidance.scale),
            ),
            torch.from_numpy(sample_noise(list(seeds), deployment.networks.shape)),
            guided_channels=guidance.channels,
            hook=watch_layers,
        )
