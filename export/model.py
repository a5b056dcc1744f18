"""The model that a build deploys: its checkpoints in float32, and what the manifest says about them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from export.build_request import BuildRequest, VaeSource
from flowturbo.checkpoint_search import WeightSet
from flowturbo.checkpoints import DEFAULT_VAE_FACTOR, Network, has_sincos_positions, load_network, resize_network
from flowturbo.models.sit import SiT, TimeDirection
from flowturbo.models.vae import Vae, load_vae
from flowturbo.probe import check_prediction
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

    @property
    def has_null_label(self) -> bool:
        """Whether all networks know the unconditional branch that guidance needs."""
        return all(network.model.config.has_null_label for network in self.networks.values())

    def resize_network(self, role: str, resolution: int) -> SiT:
        """Return the network of a role at a resolution in pixels."""
        return resize_network(self.networks[role].model, resolution // self.factor)

    def resolve_resolutions(self, requested: tuple[int, ...]) -> tuple[int, ...]:
        """Return the requested resolutions, or the one that the predictor was trained at.

        Raises:
            RequestError: one is not a multiple of pixels per token, or not that of a network's own positions.
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
        resolutions = requested or (config.latent_size * self.factor,)
        for role, network in self.networks.items():
            trained = network.model.config.latent_size * self.factor
            if not has_sincos_positions(network.model) and (others := [r for r in resolutions if r != trained]):
                raise RequestError(
                    f"resolution {others[0]} for a {role} with positions of its own, learned at {trained}",
                    allowed=f"{trained}; only sin-cos positions can be computed for other resolutions",
                    remedy="leave --resolution out, or take a network of that resolution",
                )
        return resolutions

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
            null_label=config.classes if self.has_null_label else config.classes - 1,
            classes=read_classes(self.predictor),
            predictor=config.to_json(),
            refiner=configs["refiner"].to_json() if self.refiner else None,
            sources={
                name: value
                for name, value in request.inputs.items()
                if name.startswith(("predictor", "refiner", "vae"))
            },
            weights={role: network.weights for role, network in self.networks.items()},
            has_null_label=self.has_null_label,
        )

    def make_defaults(self) -> Defaults:
        """Return the sampler defaults: the checkpoint's own, or those of the released models."""
        metadata = self.predictor.metadata
        vae = next(iter(self.vaes), None)
        guidance = float(metadata.get("guidance", DEFAULT_GUIDANCE)) if self.has_null_label else 1.0
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
    weights = cast(WeightSet | None, request.weights)
    predictor = load_network(
        request.predictor,
        "predictor",
        weights=weights,
        heads=request.heads,
        time_direction=direction,
        num_classes=request.num_classes,
    )
    config = predictor.model.config
    check_prediction(request.predictor, predictor.model)
    refiner = None
    if request.refiner is not None:
        refiner = load_network(
            request.refiner,
            "refiner",
            weights=weights,
            heads=request.heads,
            likely_heads=config.heads,
            num_classes=request.num_classes,
        )
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
    factor = factors.pop()
    notes = []
    for role, network in (("predictor", predictor), ("refiner", refiner)):
        if network is None:
            continue
        heads = (
            "" if any("attention heads" in note for note in network.notes) else f", {network.model.config.heads} heads"
        )
        notes.append(f"{role}: {network.weights} were taken{heads}")
        notes += [f"{role}: {note}" for note in network.notes]
    if not predictor.has_positions and not request.resolutions:
        resolution = config.latent_size * factor
        notes.append(
            f"predictor: no positions in the file: {resolution} px are assumed, latents of {config.latent_size} × "
            f"{config.latent_size} (--resolution PIXELS if not)"
        )
    if not all(network.model.config.has_null_label for network in (predictor, refiner) if network is not None):
        notes.append("no null label: pictures are made without guidance (scale 1), or away from a --negative-class")
    if predictor.dropped:
        notes.append(f"dropped {len(predictor.dropped)} training-only tensors ({predictor.dropped[0]} …)")
    if predictor.metadata.get("label_dropout") == 0:
        notes.append(
            "the predictor was trained with --label-dropout 0, so it has not learned its null label: "
            "guidance is 1 unless asked for"
        )
    if config.time_direction == "data-to-noise":
        notes.append("the predictor's time runs from data to noise (REPA); it is flipped inside the graphs")
    return CheckpointModel(predictor, refiner, vaes, factor, tuple(notes))


def read_classes(predictor: Network) -> dict[int, str]:
    """Return the name of every label: the checkpoint's own, ImageNet's for 1000 classes, else numbers."""
    if "classes" in predictor.metadata:
        return {int(label): str(name) for label, name in predictor.metadata["classes"].items()}
    count = predictor.model.config.classes
    if count == 1000:
        with open(_CLASS_TABLE, encoding="utf-8") as file:
            return {int(row[0]): row[2] for row in csv.reader(file, delimiter="\t") if row[0].isdigit()}
    return {label: f"class {label}" for label in range(count)}
