"""Checkpoints to ONNX files: the part of a build that needs torch."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from export.build_request import BuildRequest
from export.graphs.activation_memory import activation_bytes
from export.graphs.engine_graphs import (
    ConditioningGraph,
    DecoderGraph,
    EncoderGraph,
    PredictorGraph,
    RefinerGraph,
    deployable,
)
from export.graphs.onnx_files import OPSET, OPSET_BF16, export_onnx, op_counts, weight_bytes
from export.graphs.tile_graph import HeadGraph, TileGraph, features_of, moments_of
from export.lowbit.equalise import equalised, scales_of, with_scaled_inputs
from export.lowbit.guard import check_constants, check_weights
from export.lowbit.islands import with_islands
from export.lowbit.layers import TRUNKS, layer_names
from export.lowbit.quantise import quantise_int8, quantise_weights, store_16bit, weights_by_kind
from export.lowbit.recipe import Recipe
from export.lowbit.vae_norms import float32_norms
from export.targets import Form, form_of
from flowturbo.checkpoints import VAE_FACTOR, Network, load_network, resized
from flowturbo.models.sit import SiT, TimeDirection
from flowturbo.models.vae import Vae, load_vae
from runtime.directory.contract import graph_spec
from runtime.directory.manifest import Defaults, GraphRecord, ModelRecord
from runtime.sampling.guidance import REFERENCE_CHANNELS
from runtime.system.errors import CheckpointError, RequestError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEFAULT_GUIDANCE = 4.0
DEFAULT_SCHEDULE = "H1P5R3"
DEFAULT_STEPS = 8
_CLASS_TABLE = Path(__file__).parent.parent / "flowturbo" / "imagenet_classes.tsv"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """Everything a build traces and compares with, in float32.

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

    def at(self, role: str, resolution: int) -> SiT:
        """A network at a resolution."""
        network = self.predictor if role == "predictor" else self.refiner
        assert network is not None
        return resized(network.model, resolution // self.factor)

    def resolutions(self, asked: tuple[int, ...]) -> tuple[int, ...]:
        """The asked resolutions, or the one the predictor was trained at.

        Raises:
            RequestError: one is not a multiple of pixels per token.
        """
        config = self.predictor.model.config
        unit = config.patch * self.factor
        for resolution in asked:
            if resolution % unit:
                near = max(unit, round(resolution / unit) * unit)
                raise RequestError(
                    f"resolution {resolution}",
                    allowed=f"multiples of {unit} (patch {config.patch} × {self.factor} px per latent), such as {near}",
                )
        return asked or (config.latent_size * self.factor,)

    def check_tile(self, tile: int, resolutions: tuple[int, ...]) -> None:
        """Raises RequestError: tiles that no decoder of this model can have, or that are no part of a picture."""
        unit, largest = 8 * self.factor, max(resolutions)
        if tile % unit or not unit <= tile < largest or tile in resolutions:
            raise RequestError(
                f"--tile {tile}",
                allowed=f"multiples of {unit} below {largest}, none of the resolutions ({_listed(resolutions)})",
            )
        if not self.vaes or not all(vae.has_posterior for vae in self.vaes.values()):
            raise RequestError(
                f"--tile {tile} without an AutoencoderKL",
                allowed="tiles are decoders of AutoencoderKL; an AutoencoderTiny needs little memory as it is",
            )

    def record(self, request: BuildRequest) -> ModelRecord:
        config = self.predictor.model.config
        networks = {"predictor": config, **({"refiner": self.refiner.model.config} if self.refiner else {})}
        return ModelRecord(
            channels=config.out_channels,
            factor=self.factor,
            modulations={name: network.modulations for name, network in networks.items()},
            null_label=config.classes,
            classes=classes_of(self.predictor),
            predictor=config.to_json(),
            refiner=networks["refiner"].to_json() if self.refiner else None,
            sources={
                name: value
                for name, value in request.inputs.items()
                if name.startswith(("predictor", "refiner", "vae"))
            },
        )

    def defaults(self) -> Defaults:
        """From the checkpoint's own metadata, else the released models' habits."""
        metadata = self.predictor.metadata
        vae = next(iter(self.vaes), None)
        guidance = float(metadata.get("guidance", DEFAULT_GUIDANCE))
        config = self.predictor.model.config
        habit = config.out_channels if config.time_direction == "data-to-noise" else REFERENCE_CHANNELS
        channels = min(int(metadata.get("guidance_channels", habit)), config.out_channels)
        if self.refiner is None:
            return Defaults(guidance, channels, solver="searched", steps=DEFAULT_STEPS, vae=vae)
        return Defaults(guidance, channels, schedule=str(metadata.get("schedule", DEFAULT_SCHEDULE)), vae=vae)


def load_model(request: BuildRequest) -> Model:
    """Loads and checks every checkpoint of a request.

    Raises:
        CheckpointError: one cannot be used, or they do not belong together.
    """
    direction = cast(TimeDirection | None, request.time_direction)
    predictor = load_network(request.predictor, "predictor", heads=request.heads, time_direction=direction)
    refiner = None
    if request.refiner is not None:
        refiner = load_network(
            request.refiner, "refiner", heads=request.heads, likely_heads=predictor.model.config.heads
        )
        _check_pair(predictor.model, refiner.model)
    vaes = {vae.variant: load_vae(vae.source) for vae in _vaes(request, predictor)}
    for variant, vae in vaes.items():
        if vae.channels != predictor.model.config.out_channels:
            raise CheckpointError(
                f"VAE {variant} has {vae.channels} latent channels, "
                f"the predictor {predictor.model.config.out_channels}",
                remedy="name the VAE the predictor was trained with",
            )
    factors = {vae.factor for vae in vaes.values()} or {int(predictor.metadata.get("vae_factor", VAE_FACTOR))}
    if len(factors) > 1:
        raise CheckpointError(f"the VAEs have {sorted(factors)} pixels per latent", allowed="VAEs of one latent space")
    notes = (
        [f"dropped {len(predictor.dropped)} training-only tensors ({predictor.dropped[0]} …)"]
        if predictor.dropped
        else []
    )
    if predictor.model.config.time_direction == "data-to-noise":
        notes.append("the predictor's time runs from data to noise (REPA); it is flipped inside the graphs")
    return Model(predictor, refiner, vaes, factors.pop(), tuple(notes))


def trace(
    model: Model, request: BuildRequest, resolution: int, precision: str, folder: Path, finished: set[str], say: Say
) -> Iterator[GraphRecord]:
    """Writes every graph of one resolution and precision below `folder`; yields a record as each is finished.

    At the size of the request's tiles these are decoders of tiles; larger pictures get the part before tiles as well.

    Args:
        finished: graphs to leave out, because an interrupted build wrote them.
        say: told what is being traced.
    """
    where, form = folder / str(resolution) / precision, form_of(precision)
    where.mkdir(parents=True, exist_ok=True)
    _check_wide(model, request.recipe, form)
    check_range(model, request, form)
    for graph, make in _modules(model, request, resolution, form):
        if graph in finished:
            continue
        say(f"exporting {resolution} px {precision}: {graph}")
        path = where / f"{graph}.onnx"
        module, modulations = make()
        spec = graph_spec(
            graph,
            channels=model.predictor.model.config.out_channels,
            side=resolution // model.factor,
            pixels=resolution,
            modulations=modulations,
            **_parts_of(graph, model),
        )
        exported = export_onnx(module, spec, path, opset=OPSET_BF16 if form.base == "bf16" else OPSET)
        if form.quantised is not None:
            exported = _quantised(path, graph, form, request.recipe, model) or exported
        check_constants(exported, path.name)
        data = path.with_name(path.name + ".data")
        yield GraphRecord(
            graph=graph,
            resolution=resolution,
            precision=precision,
            path=path.relative_to(folder).as_posix(),
            data=data.relative_to(folder).as_posix() if data.exists() else None,
            opset=next(o.version for o in exported.opset_import if o.domain in ("", "ai.onnx")),
            ops=op_counts(exported),
            weight_bytes=weight_bytes(exported),
            computes=_computes(graph, form, request.recipe),
            activation_bytes=activation_bytes(exported),
            weights=weights_by_kind(exported) if form.quantised is not None and graph in TRUNKS else {},
            pairs_fit=form.quantised == "int8" and graph in TRUNKS,
        )


def _quantised(path: Path, graph: str, form: Form, recipe: Recipe, model: Model) -> Any:
    """Does to a finished file what a quantised build does to it; None where that is nothing."""
    if graph not in TRUNKS:
        return store_16bit(path) if form.base == "fp32" else None
    assert form.quantised is not None
    network = model.predictor if graph == "predictor" else model.refiner
    assert network is not None
    layers = layer_names(graph, network.model.config.depth)
    if form.quantised == "int8":
        assert recipe.ranges is not None
        recipe.ranges.check_layers(layers)
        return quantise_int8(path, graph, recipe.clips(graph))
    return quantise_weights(path, graph, form.quantised, layers, operators=form.operators)


def _computes(graph: str, form: Form, recipe: Recipe) -> str | None:
    """The precision of a graph, where it is not its set's."""
    if form.quantised is not None:
        return None if graph in TRUNKS else "fp16"
    decoder = graph.replace("head-", "decoder-").replace("tile-", "decoder-")
    return "fp32" if form.base != "fp32" and decoder in recipe.wide else None


def check_range(model: Model, request: BuildRequest, form: Form) -> None:
    """Refuses weights that a form's type cannot hold, before anything is written: as they are when they are cast.

    That is equalised for int8; without what stays in float32, which only a form that is not quantised has (a layer that
    a choice keeps out of int8 is in the form's own type); and without halves of autoencoders that are not built.

    Raises:
        CheckpointError: listing them all.
    """
    recipe, dtype = request.recipe, DTYPES[form.base]
    if dtype == torch.float32:
        return
    networks: dict[str, nn.Module] = {
        role: float32_network(network.model, role, recipe) if form.quantised == "int8" else deployable(network.model)
        for role, network in (("predictor", model.predictor), ("refiner", model.refiner))
        if network is not None
    }
    networks |= {f"decoder-{variant}": vae.module for variant, vae in model.vaes.items()}
    if request.encoder and model.vaes:
        networks["encoder"] = next(iter(model.vaes.values())).module
    islands = () if form.quantised is not None else recipe.wide

    def left_out(name: str) -> bool:
        return _other_half(name) or any(_inside(name, part) for part in islands)

    check_weights(networks, dtype, left_out, remedy=_NOT_16BIT if form.quantised is None else _NOT_ON_16BIT)


_NOT_16BIT = (
    "build with --precision bf16 or fp32, or keep them wide: flowturbo-calibrate sensitivity --precision fp16, then "
    "--choice"
)
_NOT_ON_16BIT = (
    "build with --precision bf16 or fp32, or for --target cpu, whose quantised files stand on float32 (what a --choice "
    "keeps wide is in float16 here)"
)


def _other_half(name: str) -> bool:
    """Whether a tensor belongs to the half of an autoencoder that its graph leaves out."""
    role, _, tensor = name.partition("/")
    if role == "encoder":
        return tensor.startswith(("decoder.", "post_quant_conv."))
    return role.startswith("decoder-") and tensor.startswith(("encoder.", "quant_conv."))


def _inside(name: str, part: str) -> bool:
    """Whether a tensor belongs to a part: a layer of a network, or a decoder."""
    return name.startswith((f"{part}.", f"{part}/"))


def _check_wide(model: Model, recipe: Recipe, form: Form) -> None:
    """Raises RequestError where a choice names a decoder that is not built; layers are checked when they are traced."""
    decoders = [f"decoder-{variant}" for variant in model.vaes]
    unknown = [part for part in recipe.wide if part.startswith("decoder") and part not in decoders]
    if unknown and decoders:
        raise RequestError(f"the choice keeps {', '.join(unknown)}", allowed=", ".join(decoders))


Module = tuple[nn.Module, int]


def _modules(
    model: Model, request: BuildRequest, resolution: int, form: Form
) -> Iterator[tuple[str, Callable[[], Module]]]:
    """The graphs of a build by name, each with what makes its module and its modulations; made one at a time."""
    dtype, recipe = DTYPES[form.base], request.recipe
    decoding = {name: torch.float32 if f"decoder-{name}" in recipe.wide else dtype for name in model.vaes}
    if resolution == request.tile:
        for variant, vae in model.vaes.items():
            yield f"tile-{variant}", lambda vae=vae, own=decoding[variant]: (TileGraph(vae, own), 0)  # type: ignore[misc]
        return
    roles: list[tuple[str, str, Any]] = [("predictor", "conditioning", PredictorGraph)]
    if model.refiner is not None:
        roles.append(("refiner", "refiner_conditioning", RefinerGraph))
    for role, conditioning, trunk in roles:
        for graph, kind in ((conditioning, ConditioningGraph), (role, trunk)):
            yield (
                graph,
                lambda role=role, kind=kind: (  # type: ignore[misc]
                    _network(model.at(role, resolution), kind, form, recipe, role)
                ),
            )
    for variant, vae in model.vaes.items():
        own = decoding[variant]
        yield f"decoder-{variant}", lambda vae=vae, own=own: (cast_vae(vae, DecoderGraph, own), 0)  # type: ignore[misc]
        if request.tile is not None and resolution > request.tile:
            yield f"head-{variant}", lambda vae=vae, own=own: (cast_vae(vae, HeadGraph, own), 0)  # type: ignore[misc]
    if request.encoder and model.vaes:
        vae = next(iter(model.vaes.values()))
        yield "encoder", lambda: (cast_vae(vae, EncoderGraph, dtype), 0)


def _parts_of(graph: str, model: Model) -> dict[str, int]:
    """What the contract of a decoder in two parts depends on."""
    kind, _, variant = graph.partition("-")
    if kind not in ("head", "tile"):
        return {}
    return {"moments": moments_of(model.vaes[variant]), "features": features_of(model.vaes[variant])}


def _network(network: SiT, kind: Any, form: Form, recipe: Recipe, role: str) -> Module:
    dtype, modulations = DTYPES[form.base], network.config.modulations
    if form.quantised == "int8":
        return kind(_equalised(network, role, recipe, dtype)), modulations
    cast = cast_network(network, dtype)
    if form.quantised is None and dtype != torch.float32:
        cast = with_islands(cast, deployable(network), recipe.wide_of(role))
    return kind(cast), modulations


def float32_network(network: SiT, role: str, recipe: Recipe) -> SiT:
    """A deployable network in float32, equalised if the recipe says so: it computes the same either way."""
    return _equalised(network, role, recipe, torch.float32)


def _equalised(network: SiT, role: str, recipe: Recipe, dtype: torch.dtype) -> SiT:
    if not recipe.equalised or recipe.ranges is None:
        return cast_network(network, dtype)
    scales = scales_of(recipe.ranges, role, recipe.wide)
    return with_scaled_inputs(cast_network(equalised(network, scales), dtype), scales)


def cast_network(network: SiT, dtype: torch.dtype) -> SiT:
    """A deployable copy in `dtype`; `guard.check_weights` has seen to it that its weights fit."""
    network = deployable(network)
    if dtype == torch.float32:
        return network
    with torch.device("meta"):
        copy_ = deployable(SiT(network.config))
    copy_.load_state_dict({name: t.to(dtype) for name, t in network.state_dict().items()}, assign=True)
    return copy_.requires_grad_(False)


def cast_vae(vae: Vae, kind: Any, dtype: torch.dtype) -> nn.Module:
    """A graph of an autoencoder in `dtype`, its normalisations in float32."""
    if dtype == torch.float32:
        return cast(nn.Module, kind(vae, dtype))
    module = float32_norms(copy.deepcopy(vae.module).to(dtype))
    return cast(nn.Module, kind(Vae(module, vae.factor, vae.channels, vae.scaling, vae.shift), dtype))


def _vaes(request: BuildRequest, predictor: Network) -> tuple[Any, ...]:
    if request.vaes is not None:
        return request.vaes
    from export.build_request import VaeSource

    return (VaeSource("ema", str(predictor.metadata.get("vae", "ema"))),)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _check_pair(predictor: SiT, refiner: SiT) -> None:
    a, b = predictor.config, refiner.config
    for what, given, needed in (
        ("classes", b.classes, a.classes),
        ("latent channels", b.out_channels, a.out_channels),
        ("patch", b.patch, a.patch),
    ):
        if given != needed:
            raise CheckpointError(
                f"the refiner has {what} {given}, the predictor {needed}",
                remedy="name the refiner trained for this predictor",
            )


def classes_of(predictor: Network) -> dict[int, str]:
    """Labels and names: the checkpoint's own, ImageNet's for 1000 classes, else numbered."""
    if "classes" in predictor.metadata:
        return {int(label): str(name) for label, name in predictor.metadata["classes"].items()}
    count = predictor.model.config.classes
    if count == 1000:
        with open(_CLASS_TABLE, encoding="utf-8") as file:
            return {int(row[0]): row[2] for row in csv.reader(file, delimiter="\t") if row[0].isdigit()}
    return {label: f"class {label}" for label in range(count)}
