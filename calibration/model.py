"""Load the checkpoints that a calibration in PyTorch looks at: as a build does, at the resolution of the deployment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from calibration.guidance_choice import Guidance
from export.build_request import BuildRequest, resolve_request
from export.model import CheckpointModel, read_classes
from flowturbo.checkpoints import resize_network
from flowturbo.models.sit import SiT
from runtime.directory.records import Manifest
from runtime.system.errors import RequestError


@dataclass(frozen=True)
class ModelSpec:
    """Which model is looked at, and how it will be guided; the demo where no predictor is named."""

    predictor: Path | None
    refiner: Path | None
    heads: int | None
    resolution: int | None
    guidance: Guidance
    time_direction: str | None = None

    def resolve_request(self, vaes: Sequence[str] = ("none",)) -> BuildRequest:
        """Return the request of a build of this model: it names and hashes the files.

        Raises:
            RequestError: a refiner without its predictor.
            CheckpointError: a file is missing.
        """
        return resolve_request(
            predictor=self.predictor,
            refiner=None if self.refiner is None else str(self.refiner),
            vaes=vaes,
            heads=self.heads,
            time_direction=self.time_direction,
            targets=("cpu",),
            precision="fp32",
        )


@dataclass(frozen=True)
class NetworkSet:
    """The predictor, its refiner if there is one, and the classes that they were trained on."""

    predictor: SiT
    refiner: SiT | None
    classes: Sequence[int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of a latent."""
        config = self.predictor.config
        return config.out_channels, config.latent_size, config.latent_size

    @property
    def by_role(self) -> dict[str, SiT]:
        """Networks by "predictor" and, if there is one, "refiner"."""
        return {"predictor": self.predictor} | ({} if self.refiner is None else {"refiner": self.refiner})


def resize_networks(model: CheckpointModel, resolution: int | None, manifest: Manifest | None = None) -> NetworkSet:
    """Return frozen networks at `resolution`, or the directory's first, or the one that the predictor was trained at.

    Raises:
        RequestError: the resolution is no multiple of what a patch covers.
    """
    factor = model.factor if manifest is None else manifest.model.factor
    resolution = resolution or (0 if manifest is None else manifest.resolutions[0])
    config = model.predictor.model.config
    side = resolution // factor or config.latent_size
    if resolution % factor or side % config.patch:
        raise RequestError(
            f"resolution {resolution}", allowed=f"multiples of {factor * config.patch} ({factor} pixels per latent)"
        )
    loaded = [network for network in (model.predictor, model.refiner) if network is not None]
    predictor, *refiner = [resize_network(network.model, side).eval().requires_grad_(False) for network in loaded]
    return NetworkSet(predictor, refiner[0] if refiner else None, sorted(read_classes(model.predictor)))


def select_loading_inputs(request: BuildRequest) -> dict[str, str]:
    """Return what measurements depend on beside the networks' weights: how these are read, and the decoders."""
    inputs = request.inputs
    names = ("vae", "heads", "time direction", "weights", "num classes")
    return {name: inputs[name] for name in inputs if name.startswith(names)}


def find_linear(networks: Mapping[str, SiT], name: str) -> nn.Linear:
    """Return a linear layer by its name, such as "predictor/blocks.0.mlp.fc1"."""
    role, _, path = name.partition("/")
    layer = networks[role].get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer
