"""The model that a build deploys: its checkpoints in float32, and what the manifest says about them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from export.build_request import BuildRequest, VaeSource
from flowturbo.checkpoints import DEFAULT_VAE_FACTOR, Network, load_network, resize_network
from flowturbo.models.sit import SiT, TimeDirection
from flowturbo.models.vae import Vae, load_vae
from runtime.directory.records import Defaults, ModelRecord
from runtime.sampling.guidance import REFERENCE_CHANNELS
from runtime.system.errors import CheckpointError, RequestError

DEFAULT_GUIDANCE = 4.0
DEFAULT_SCHEDULE = "H1P5R3"
DEFAULT_STEPS = 8
_CLASS_TABLE = Path(__file__).parent.parent / "flowturbo" / "imagenet_classes.tsv"


@dataclass(frozen=True)
class CheckpointModel:
    """Everything that a build traces and compares with, in float32.

    Attributes:
        predictor, refiner: at the latent size they were trained at.
        vaes: variant → autoencoder.
        factor: pixels per latent.
        notes: what was dropped or assumed while loading.
    """

    predictor: Network
    refiner: Network | None
    vaes: dict[str, Vae]
    factor: int
    notes: tuple[str, ...]

    @property
    def networks(self) -> dict[str, Network]:
        """The networks by role; the refiner only where there is one."""
        return {"predictor": self.predictor} | ({} if self.refiner is None else {"refiner": self.refiner})

    def resize_network(self, role: str, resolution: int) -> SiT:
        """Return the network of a role at a resolution in pixels."""
        return resize_network(self.networks[role].model, resolution // self.factor)

    def resolve_resolutions(self, requested: tuple[int, ...]) -> tuple[int, ...]:
        """Return the requested resolutions, or the one that the predictor was trained at.

        Raises:
            RequestError: one is not a multiple of pixels per token.
        """
        config = self.predictor.model.config
        pixels_per_token = config.patch * self.factor
        for resolution in requested:
            if resolution % pixels_per_token:
                nearest = max(pixels_per_token, round(resolution / pixels_per_token) * pixels_per_token)
                raise RequestError(
                    f"resolution {resolution}",
                    allowed=f"multiples of {pixels_per_token} (patch {config.patch} × {self.factor} px per "
                    f"latent), such as {nearest}",
                )
        return requested or (config.latent_size * self.factor,)

    def check_tile(self, tile: int, resolutions: tuple[int, ...]) -> None:
        """Check that decoders of this model can have tiles of so many pixels.

        Raises:
            RequestError: the size does not fit the model, or a tile would be no part of a picture.
        """
        tile_unit, largest = 8 * self.factor, max(resolutions)
        if tile % tile_unit or not tile_unit <= tile < largest or tile in resolutions:
            raise RequestError(
                f"--tile {tile}",
                allowed=f"multiples of {tile_unit} below {largest}, none of the resolutions "
                f"({', '.join(map(str, resolutions))})",
            )
        if not self.vaes or not all(vae.has_posterior for vae in self.vaes.values()):
            raise RequestError(
                f"--tile {tile} without an AutoencoderKL",
                allowed="tiles are decoders of AutoencoderKL; an AutoencoderTiny needs little memory as it is",
            )

    def make_record(self, request: BuildRequest) -> ModelRecord:
        """Describe the networks for the manifest."""
        configs = {role: network.model.config for role, network in self.networks.items()}
        config, dropout = configs["predictor"], self.predictor.metadata.get("label_dropout")
        return ModelRecord(
            label_dropout=float(dropout) if isinstance(dropout, (int, float)) else None,
            channels=config.out_channels,
            factor=self.factor,
            modulations={role: network_config.modulations for role, network_config in configs.items()},
            null_label=config.classes,
            classes=read_classes(self.predictor),
            predictor=config.to_json(),
            refiner=configs["refiner"].to_json() if self.refiner else None,
            sources={
                name: value
                for name, value in request.inputs.items()
                if name.startswith(("predictor", "refiner", "vae"))
            },
        )

    def make_defaults(self) -> Defaults:
        """Return the sampler defaults: the checkpoint's own, or those of the released models."""
        metadata = self.predictor.metadata
        vae = next(iter(self.vaes), None)
        guidance = float(metadata.get("guidance", DEFAULT_GUIDANCE))
        config = self.predictor.model.config
        usual_channels = config.out_channels if config.time_direction == "data-to-noise" else REFERENCE_CHANNELS
        channels = min(int(metadata.get("guidance_channels", usual_channels)), config.out_channels)
        if self.refiner is None:
            return Defaults(guidance, channels, solver="searched", steps=DEFAULT_STEPS, vae=vae)
        return Defaults(guidance, channels, schedule=str(metadata.get("schedule", DEFAULT_SCHEDULE)), vae=vae)


def load_model(request: BuildRequest) -> CheckpointModel:
    """Load and check every checkpoint of a request.

    Raises:
        CheckpointError: one cannot be used, or they do not belong together.
    """
    direction = cast(TimeDirection | None, request.time_direction)
    predictor = load_network(request.predictor, "predictor", heads=request.heads, time_direction=direction)
    config = predictor.model.config
    refiner = None
    if request.refiner is not None:
        refiner = load_network(request.refiner, "refiner", heads=request.heads, likely_heads=config.heads)
        refiner_config = refiner.model.config
        for field, refiner_value, predictor_value in (
            ("classes", refiner_config.classes, config.classes),
            ("latent channels", refiner_config.out_channels, config.out_channels),
            ("patch", refiner_config.patch, config.patch),
        ):
            if refiner_value != predictor_value:
                raise CheckpointError(
                    f"the refiner has {field} {refiner_value}, the predictor {predictor_value}",
                    remedy="name the refiner trained for this predictor",
                )
    sources = request.vaes
    if sources is None:
        sources = (VaeSource("ema", str(predictor.metadata.get("vae", "ema"))),)
    vaes = {source.variant: load_vae(source.source) for source in sources}
    for variant, vae in vaes.items():
        if vae.channels != config.out_channels:
            raise CheckpointError(
                f"VAE {variant} has {vae.channels} latent channels, the predictor {config.out_channels}",
                remedy="name the VAE the predictor was trained with",
            )
    factors = {vae.factor for vae in vaes.values()} or {int(predictor.metadata.get("vae_factor", DEFAULT_VAE_FACTOR))}
    if len(factors) > 1:
        raise CheckpointError(f"the VAEs have {sorted(factors)} pixels per latent", allowed="VAEs of one latent space")
    notes = []
    if predictor.dropped:
        notes.append(f"dropped {len(predictor.dropped)} training-only tensors ({predictor.dropped[0]} …)")
    if predictor.metadata.get("label_dropout") == 0:
        notes.append(
            "the predictor was trained with --label-dropout 0, so it has not learned its null label: "
            "guidance is 1 unless asked for"
        )
    if config.time_direction == "data-to-noise":
        notes.append("the predictor's time runs from data to noise (REPA); it is flipped inside the graphs")
    return CheckpointModel(predictor, refiner, vaes, factors.pop(), tuple(notes))


def read_classes(predictor: Network) -> dict[int, str]:
    """Return the name of every label: the checkpoint's own, ImageNet's for 1000 classes, else numbers."""
    if "classes" in predictor.metadata:
        return {int(label): str(name) for label, name in predictor.metadata["classes"].items()}
    count = predictor.model.config.classes
    if count == 1000:
        with open(_CLASS_TABLE, encoding="utf-8") as file:
            return {int(row[0]): row[2] for row in csv.reader(file, delimiter="\t") if row[0].isdigit()}
    return {label: f"class {label}" for label in range(count)}
