"""Trace checkpoints to ONNX files: the part of a build that needs torch."""

from __future__ import annotations

from collections.abc import Callable

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
from export.lowbit.casting import DTYPES, cast_network, cast_vae, equalise_network, restore_float32_layers
from export.lowbit.guard import check_constants, check_weight_range
from export.lowbit.layers import TRUNKS, list_layers
from export.lowbit.quantise import count_weights_by_kind, quantise_int8, quantise_weights, store_float16
from export.lowbit.recipe import Recipe
from export.model import CheckpointModel
from export.stage import BuildStage
from export.targets import GraphFormat, parse_graph_format
from runtime.directory.contract import build_graph_spec
from runtime.directory.records import GraphRecord
from runtime.system.errors import RequestError
from runtime.system.progress import SILENT, Progress

_GRAPH_CLASSES: dict[str, Callable[..., nn.Module]] = {
    "conditioning": ConditioningGraph,
    "predictor": PredictorGraph,
    "refiner_conditioning": ConditioningGraph,
    "refiner": RefinerGraph,
    "decoder": DecoderGraph,
    "head": HeadGraph,
    "tile": TileGraph,
    "encoder": EncoderGraph,
}
"""By the part of a graph's name before the variant of its autoencoder."""


def trace_graphs(
    model: CheckpointModel,
    request: BuildRequest,
    resolution: int,
    precision: str,
    stage: BuildStage,
    progress: Progress = SILENT,
) -> None:
    """Write every graph of one resolution and precision into a stage, but for those that it has already.

    At the size of the request's tiles these are decoders of tiles; larger pictures get the part before tiles as well.

    Raises:
        CheckpointError: the precision cannot hold some weights.
        RequestError: a choice keeps a part wide that is not built.
    """
    graph_format, recipe = parse_graph_format(precision), request.recipe
    graph_folder = stage.folder / str(resolution) / precision
    graph_folder.mkdir(parents=True, exist_ok=True)
    decoders = [f"decoder-{variant}" for variant in model.vaes]
    unknown = [part for part in recipe.wide if part.startswith("decoder") and part not in decoders]
    if unknown and decoders:
        raise RequestError(f"the choice keeps {', '.join(unknown)}", allowed=", ".join(decoders))
    check_weight_range(model, request, graph_format)
    finished_graphs = stage.list_finished_graphs(resolution, precision)
    for graph in _list_graphs(model, request, resolution):
        if graph in finished_graphs:
            continue
        progress.stage(f"exporting {resolution} px {precision}: {graph}")
        path = graph_folder / f"{graph}.onnx"
        kind, _, variant = graph.partition("-")
        module, modulations = _make_module(model, recipe, resolution, graph, graph_format)
        sizes = {}
        if kind in ("head", "tile"):
            vae = model.vaes[variant]
            sizes = {"moments": count_norm_groups(vae), "features": count_head_channels(vae)}
        spec = build_graph_spec(
            graph,
            channels=model.predictor.model.config.out_channels,
            side=resolution // model.factor,
            pixels=resolution,
            modulations=modulations,
            **sizes,
        )
        onnx_model = export_onnx(module, spec, path, opset=OPSET_BF16 if graph_format.base == "bf16" else OPSET)
        quantised = graph_format.quantised if graph in TRUNKS else None
        computes = None
        if quantised is not None:
            layers = list_layers(graph, model.networks[graph].model.config.depth)
            if quantised == "int8":
                onnx_model = quantise_int8(path, graph, recipe.select_clips(graph, layers))
            else:
                has_nbits_operators = graph_format.has_nbits_operators
                onnx_model = quantise_weights(path, graph, quantised, layers, has_nbits_operators=has_nbits_operators)
        elif graph_format.quantised is not None:
            computes = "fp16"
            onnx_model = store_float16(path) if graph_format.base == "fp32" else onnx_model
        elif graph_format.base != "fp32" and f"decoder-{variant}" in recipe.wide:
            computes = "fp32"
        check_constants(onnx_model, path.name)
        data_path = path.with_name(path.name + ".data")
        stage.add_graph(
            GraphRecord(
                graph=graph,
                resolution=resolution,
                precision=precision,
                path=path.relative_to(stage.folder).as_posix(),
                data=data_path.relative_to(stage.folder).as_posix() if data_path.exists() else None,
                opset=next(o.version for o in onnx_model.opset_import if o.domain in ("", "ai.onnx")),
                ops=count_ops(onnx_model),
                weight_bytes=count_initializer_bytes(onnx_model),
                computes=computes,
                activation_bytes=count_activation_bytes(onnx_model),
                weights={} if quantised is None else count_weights_by_kind(onnx_model),
                pairs_fit=quantised == "int8",
            )
        )


def _list_graphs(model: CheckpointModel, request: BuildRequest, resolution: int) -> list[str]:
    """The graphs of a resolution, or of the request's tiles, in the order in which they are built."""
    if resolution == request.tile:
        return [f"tile-{variant}" for variant in model.vaes]
    graphs = ["conditioning", "predictor"]
    if model.refiner is not None:
        graphs += ["refiner_conditioning", "refiner"]
    for variant in model.vaes:
        graphs.append(f"decoder-{variant}")
        if request.tile is not None and resolution > request.tile:
            graphs.append(f"head-{variant}")
    return [*graphs, "encoder"] if request.encoder and model.vaes else graphs


def _make_module(
    model: CheckpointModel, recipe: Recipe, resolution: int, graph: str, graph_format: GraphFormat
) -> tuple[nn.Module, int]:
    """The module of a graph, cast to its format, and the width of its modulations (0 for autoencoders)."""
    kind, _, variant = graph.partition("-")
    graph_class, dtype = _GRAPH_CLASSES[kind], DTYPES[graph_format.base]
    if kind in ("decoder", "head", "tile", "encoder"):
        vae = model.vaes[variant or next(iter(model.vaes))]
        if f"decoder-{variant}" in recipe.wide:
            dtype = torch.float32
        return graph_class(vae, dtype) if kind == "tile" else cast_vae(vae, graph_class, dtype), 0
    role = kind.removesuffix("conditioning").removesuffix("_") or "predictor"
    network = model.resize_network(role, resolution)
    if graph_format.quantised == "int8":
        cast_copy = equalise_network(network, role, recipe, dtype)
    else:
        cast_copy = cast_network(network, dtype)
    if graph_format.quantised is None and dtype != torch.float32:
        restore_float32_layers(cast_copy, make_deployable(network), recipe.list_wide_parts(role))
    return graph_class(cast_copy), network.config.modulations
