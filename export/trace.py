"""Checkpoints to ONNX files: the part of a build that needs torch."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from export.build_request import BuildRequest
from export.graphs.activation_memory import count_activation_bytes
from export.graphs.engine_graphs import (
    ConditioningGraph,
    DecoderGraph,
    EncoderGraph,
    PredictorGraph,
    RefinerGraph,
    make_deployable,
)
from export.graphs.onnx_files import OPSET, OPSET_BF16, count_initializer_bytes, count_ops, export_onnx
from export.graphs.tile_graph import HeadGraph, TileGraph, count_head_channels, count_norm_groups
from export.lowbit.equalise import collect_scales, fold_scales, insert_input_scales
from export.lowbit.guard import check_constants, check_weights
from export.lowbit.islands import restore_float32_layers
from export.lowbit.layers import TRUNKS, list_layers
from export.lowbit.quantise import count_weights_by_kind, quantise_int8, quantise_weights, store_float16
from export.lowbit.recipe import Recipe
from export.lowbit.vae_norms import restore_float32_norms
from export.targets import GraphFormat, parse_graph_format
from flowturbo.checkpoints import DEFAULT_VAE_FACTOR, Network, load_network, resize_network
from flowturbo.models.sit import SiT, TimeDirection
from flowturbo.models.vae import Vae, load_vae
from runtime.directory.contract import build_graph_spec
from runtime.directory.records import Defaults, GraphRecord, ModelRecord
from runtime.sampling.guidance import REFERENCE_CHANNELS
from runtime.system.errors import CheckpointError, RequestError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEFAULT_GUIDANCE = 4.0
DEFAULT_SCHEDULE = "H1P5R3"
DEFAULT_STEPS = 8
_CLASS_TABLE = Path(__file__).parent.parent / "flowturbo" / "imagenet_classes.tsv"

Say = Callable[[str], None]


@dataclass(frozen=True)
class CheckpointModel:
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

    def resize_network(self, role: str, resolution: int) -> SiT:
        """A network at a resolution."""
        network = self.predictor if role == "predictor" else self.refiner
        assert network is not None
        return resize_network(network.model, resolution // self.factor)

    def resolve_resolutions(self, requested: tuple[int, ...]) -> tuple[int, ...]:
        """The asked resolutions, or the one the predictor was trained at.

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
        """Raises RequestError: tiles that no decoder of this model can have, or that are no part of a picture."""
        tile_unit, largest = 8 * self.factor, max(resolutions)
        if tile % tile_unit or not tile_unit <= tile < largest or tile in resolutions:
            raise RequestError(
                f"--tile {tile}",
                allowed=f"multiples of {tile_unit} below {largest}, none of the resolutions "
                f"({_format_numbers(resolutions)})",
            )
        if not self.vaes or not all(vae.has_posterior for vae in self.vaes.values()):
            raise RequestError(
                f"--tile {tile} without an AutoencoderKL",
                allowed="tiles are decoders of AutoencoderKL; an AutoencoderTiny needs little memory as it is",
            )

    def make_record(self, request: BuildRequest) -> ModelRecord:
        config = self.predictor.model.config
        networks = {"predictor": config, **({"refiner": self.refiner.model.config} if self.refiner else {})}
        return ModelRecord(
            channels=config.out_channels,
            factor=self.factor,
            modulations={name: network.modulations for name, network in networks.items()},
            null_label=config.classes,
            classes=read_classes(self.predictor),
            predictor=config.to_json(),
            refiner=networks["refiner"].to_json() if self.refiner else None,
            sources={
                name: value
                for name, value in request.inputs.items()
                if name.startswith(("predictor", "refiner", "vae"))
            },
        )

    def make_defaults(self) -> Defaults:
        """From the checkpoint's own metadata, else the released models' habits."""
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
        _check_compatible(predictor.model, refiner.model)
    vaes = {vae.variant: load_vae(vae.source) for vae in _list_vae_sources(request, predictor)}
    for variant, vae in vaes.items():
        if vae.channels != predictor.model.config.out_channels:
            raise CheckpointError(
                f"VAE {variant} has {vae.channels} latent channels, "
                f"the predictor {predictor.model.config.out_channels}",
                remedy="name the VAE the predictor was trained with",
            )
    factors = {vae.factor for vae in vaes.values()} or {int(predictor.metadata.get("vae_factor", DEFAULT_VAE_FACTOR))}
    if len(factors) > 1:
        raise CheckpointError(f"the VAEs have {sorted(factors)} pixels per latent", allowed="VAEs of one latent space")
    notes = (
        [f"dropped {len(predictor.dropped)} training-only tensors ({predictor.dropped[0]} …)"]
        if predictor.dropped
        else []
    )
    if predictor.model.config.time_direction == "data-to-noise":
        notes.append("the predictor's time runs from data to noise (REPA); it is flipped inside the graphs")
    return CheckpointModel(predictor, refiner, vaes, factors.pop(), tuple(notes))


def trace_graphs(
    model: CheckpointModel,
    request: BuildRequest,
    resolution: int,
    precision: str,
    folder: Path,
    finished_graphs: set[str],
    say: Say,
) -> Iterator[GraphRecord]:
    """Writes every graph of one resolution and precision below `folder`; yields a record as each is finished.

    At the size of the request's tiles these are decoders of tiles; larger pictures get the part before tiles as well.

    Args:
        finished_graphs: graphs to leave out, because an interrupted build wrote them.
        say: told what is being traced.
    """
    graph_folder, graph_format = folder / str(resolution) / precision, parse_graph_format(precision)
    graph_folder.mkdir(parents=True, exist_ok=True)
    _check_wide_decoders(model, request.recipe, graph_format)
    check_weight_range(model, request, graph_format)
    for graph, make_module in _list_modules(model, request, resolution, graph_format):
        if graph in finished_graphs:
            continue
        say(f"exporting {resolution} px {precision}: {graph}")
        path = graph_folder / f"{graph}.onnx"
        module, modulations = make_module()
        spec = build_graph_spec(
            graph,
            channels=model.predictor.model.config.out_channels,
            side=resolution // model.factor,
            pixels=resolution,
            modulations=modulations,
            **_count_tile_parts(graph, model),
        )
        onnx_model = export_onnx(module, spec, path, opset=OPSET_BF16 if graph_format.base == "bf16" else OPSET)
        if graph_format.quantised is not None:
            onnx_model = _quantise_graph(path, graph, graph_format, request.recipe, model) or onnx_model
        check_constants(onnx_model, path.name)
        data_path = path.with_name(path.name + ".data")
        yield GraphRecord(
            graph=graph,
            resolution=resolution,
            precision=precision,
            path=path.relative_to(folder).as_posix(),
            data=data_path.relative_to(folder).as_posix() if data_path.exists() else None,
            opset=next(o.version for o in onnx_model.opset_import if o.domain in ("", "ai.onnx")),
            ops=count_ops(onnx_model),
            weight_bytes=count_initializer_bytes(onnx_model),
            computes=_find_compute_precision(graph, graph_format, request.recipe),
            activation_bytes=count_activation_bytes(onnx_model),
            weights=count_weights_by_kind(onnx_model) if graph_format.quantised is not None and graph in TRUNKS else {},
            pairs_fit=graph_format.quantised == "int8" and graph in TRUNKS,
        )


def _quantise_graph(path: Path, graph: str, graph_format: GraphFormat, recipe: Recipe, model: CheckpointModel) -> Any:
    """Does to a finished file what a quantised build does to it; None where that is nothing."""
    if graph not in TRUNKS:
        return store_float16(path) if graph_format.base == "fp32" else None
    assert graph_format.quantised is not None
    network = model.predictor if graph == "predictor" else model.refiner
    assert network is not None
    layers = list_layers(graph, network.model.config.depth)
    if graph_format.quantised == "int8":
        assert recipe.ranges is not None
        recipe.ranges.check_layers(layers)
        return quantise_int8(path, graph, recipe.select_clips(graph))
    return quantise_weights(
        path, graph, graph_format.quantised, layers, has_nbits_operators=graph_format.has_nbits_operators
    )


def _find_compute_precision(graph: str, graph_format: GraphFormat, recipe: Recipe) -> str | None:
    """The precision of a graph, where it is not its set's."""
    if graph_format.quantised is not None:
        return None if graph in TRUNKS else "fp16"
    decoder = graph.replace("head-", "decoder-").replace("tile-", "decoder-")
    return "fp32" if graph_format.base != "fp32" and decoder in recipe.wide else None


def check_weight_range(model: CheckpointModel, request: BuildRequest, graph_format: GraphFormat) -> None:
    """Refuses weights that a form's type cannot hold, before anything is written: as they are when they are cast.

    That is equalised for int8; without what stays in float32, which only a form that is not quantised has (a layer that
    a choice keeps out of int8 is in the form's own type); and without halves of autoencoders that are not built.

    Raises:
        CheckpointError: listing them all.
    """
    recipe, dtype = request.recipe, DTYPES[graph_format.base]
    if dtype == torch.float32:
        return
    networks: dict[str, nn.Module] = {
        role: make_float32_network(network.model, role, recipe)
        if graph_format.quantised == "int8"
        else make_deployable(network.model)
        for role, network in (("predictor", model.predictor), ("refiner", model.refiner))
        if network is not None
    }
    networks |= {f"decoder-{variant}": vae.module for variant, vae in model.vaes.items()}
    if request.encoder and model.vaes:
        networks["encoder"] = next(iter(model.vaes.values())).module
    islands = () if graph_format.quantised is not None else recipe.wide

    def is_excluded(name: str) -> bool:
        return _is_unused_half(name) or any(_is_inside(name, part) for part in islands)

    check_weights(
        networks, dtype, is_excluded, remedy=_REMEDY_16BIT if graph_format.quantised is None else _REMEDY_QUANTISED
    )


_REMEDY_16BIT = (
    "build with --precision bf16 or fp32, or keep them wide: flowturbo-calibrate sensitivity --precision fp16, then "
    "--choice"
)
_REMEDY_QUANTISED = (
    "build with --precision bf16 or fp32, or for --target cpu, whose quantised files stand on float32 (what a --choice "
    "keeps wide is in float16 here)"
)


def _is_unused_half(name: str) -> bool:
    """Whether a tensor belongs to the half of an autoencoder that its graph leaves out."""
    role, _, tensor = name.partition("/")
    if role == "encoder":
        return tensor.startswith(("decoder.", "post_quant_conv."))
    return role.startswith("decoder-") and tensor.startswith(("encoder.", "quant_conv."))


def _is_inside(name: str, part: str) -> bool:
    """Whether a tensor belongs to a part: a layer of a network, or a decoder."""
    return name.startswith((f"{part}.", f"{part}/"))


def _check_wide_decoders(model: CheckpointModel, recipe: Recipe, graph_format: GraphFormat) -> None:
    """Raises RequestError where a choice names a decoder that is not built; layers are checked when they are traced."""
    decoders = [f"decoder-{variant}" for variant in model.vaes]
    unknown = [part for part in recipe.wide if part.startswith("decoder") and part not in decoders]
    if unknown and decoders:
        raise RequestError(f"the choice keeps {', '.join(unknown)}", allowed=", ".join(decoders))


SizedModule = tuple[nn.Module, int]


def _list_modules(
    model: CheckpointModel, request: BuildRequest, resolution: int, graph_format: GraphFormat
) -> Iterator[tuple[str, Callable[[], SizedModule]]]:
    """The graphs of a build by name, each with what makes its module and its modulations; made one at a time."""
    dtype, recipe = DTYPES[graph_format.base], request.recipe
    decoder_dtypes = {name: torch.float32 if f"decoder-{name}" in recipe.wide else dtype for name in model.vaes}
    if resolution == request.tile:
        for variant, vae in model.vaes.items():
            yield f"tile-{variant}", partial(_make_vae_graph, vae, TileGraph, decoder_dtypes[variant])
        return
    roles: list[tuple[str, str, Any]] = [("predictor", "conditioning", PredictorGraph)]
    if model.refiner is not None:
        roles.append(("refiner", "refiner_conditioning", RefinerGraph))
    for role, conditioning, trunk in roles:
        for graph, graph_class in ((conditioning, ConditioningGraph), (role, trunk)):
            yield graph, partial(_make_network_graph, model, role, resolution, graph_class, graph_format, recipe)
    for variant, vae in model.vaes.items():
        decoder_dtype = decoder_dtypes[variant]
        yield f"decoder-{variant}", partial(_make_vae_graph, vae, DecoderGraph, decoder_dtype)
        if request.tile is not None and resolution > request.tile:
            yield f"head-{variant}", partial(_make_vae_graph, vae, HeadGraph, decoder_dtype)
    if request.encoder and model.vaes:
        vae = next(iter(model.vaes.values()))
        yield "encoder", partial(_make_vae_graph, vae, EncoderGraph, dtype)


def _count_tile_parts(graph: str, model: CheckpointModel) -> dict[str, int]:
    """What the contract of a decoder in two parts depends on."""
    kind, _, variant = graph.partition("-")
    if kind not in ("head", "tile"):
        return {}
    return {"moments": count_norm_groups(model.vaes[variant]), "features": count_head_channels(model.vaes[variant])}


def _make_vae_graph(vae: Vae, graph_class: Any, dtype: torch.dtype) -> SizedModule:
    return (graph_class(vae, dtype) if graph_class is TileGraph else cast_vae(vae, graph_class, dtype)), 0


def _make_network_graph(
    model: CheckpointModel, role: str, resolution: int, graph_class: Any, graph_format: GraphFormat, recipe: Recipe
) -> SizedModule:
    network = model.resize_network(role, resolution)
    dtype, modulations = DTYPES[graph_format.base], network.config.modulations
    if graph_format.quantised == "int8":
        return graph_class(_equalise_network(network, role, recipe, dtype)), modulations
    cast_copy = cast_network(network, dtype)
    if graph_format.quantised is None and dtype != torch.float32:
        cast_copy = restore_float32_layers(cast_copy, make_deployable(network), recipe.list_wide_parts(role))
    return graph_class(cast_copy), modulations


def make_float32_network(network: SiT, role: str, recipe: Recipe) -> SiT:
    """A deployable network in float32, equalised if the recipe says so: it computes the same either way."""
    return _equalise_network(network, role, recipe, torch.float32)


def _equalise_network(network: SiT, role: str, recipe: Recipe, dtype: torch.dtype) -> SiT:
    if not recipe.is_equalised or recipe.ranges is None:
        return cast_network(network, dtype)
    scales = collect_scales(recipe.ranges, role, recipe.wide)
    return insert_input_scales(cast_network(fold_scales(network, scales), dtype), scales)


def cast_network(network: SiT, dtype: torch.dtype) -> SiT:
    """A deployable copy in `dtype`; `guard.check_weights` has seen to it that its weights fit."""
    network = make_deployable(network)
    if dtype == torch.float32:
        return network
    with torch.device("meta"):
        cast_copy = make_deployable(SiT(network.config))
    cast_copy.load_state_dict({name: t.to(dtype) for name, t in network.state_dict().items()}, assign=True)
    return cast_copy.requires_grad_(False)


def cast_vae(vae: Vae, graph_class: Any, dtype: torch.dtype) -> nn.Module:
    """A graph of an autoencoder in `dtype`, its normalisations in float32."""
    if dtype == torch.float32:
        return cast(nn.Module, graph_class(vae, dtype))
    module = restore_float32_norms(copy.deepcopy(vae.module).to(dtype))
    return cast(nn.Module, graph_class(Vae(module, vae.factor, vae.channels, vae.scaling, vae.shift), dtype))


def _list_vae_sources(request: BuildRequest, predictor: Network) -> tuple[Any, ...]:
    if request.vaes is not None:
        return request.vaes
    from export.build_request import VaeSource

    return (VaeSource("ema", str(predictor.metadata.get("vae", "ema"))),)


def _format_numbers(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _check_compatible(predictor: SiT, refiner: SiT) -> None:
    predictor_config, refiner_config = predictor.config, refiner.config
    for field, refiner_value, predictor_value in (
        ("classes", refiner_config.classes, predictor_config.classes),
        ("latent channels", refiner_config.out_channels, predictor_config.out_channels),
        ("patch", refiner_config.patch, predictor_config.patch),
    ):
        if refiner_value != predictor_value:
            raise CheckpointError(
                f"the refiner has {field} {refiner_value}, the predictor {predictor_value}",
                remedy="name the refiner trained for this predictor",
            )


def read_classes(predictor: Network) -> dict[int, str]:
    """Labels and names: the checkpoint's own, ImageNet's for 1000 classes, else numbered."""
    if "classes" in predictor.metadata:
        return {int(label): str(name) for label, name in predictor.metadata["classes"].items()}
    count = predictor.model.config.classes
    if count == 1000:
        with open(_CLASS_TABLE, encoding="utf-8") as file:
            return {int(row[0]): row[2] for row in csv.reader(file, delimiter="\t") if row[0].isdigit()}
    return {label: f"class {label}" for label in range(count)}
