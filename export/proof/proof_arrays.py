"""Compute the proof's data: fixed inputs, and the outputs of PyTorch in float32. A build writes them as `proof.npz`.

Image 0 of every input is unguided and image 1 guided, so that one set serves both: float32 is compared on all of it, 16
bit on the unguided rows, since guidance multiplies rounding.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.build_request import BuildRequest
from export.graphs.engine_graphs import ConditioningGraph, DecoderGraph, EncoderGraph, PredictorGraph, RefinerGraph
from export.graphs.tile_graph import HeadGraph, TileGraph
from export.lowbit.casting import equalise_network
from export.model import CheckpointModel
from flowturbo.models.sit import SiT
from flowturbo.torch_sampler import make_conditions, sample
from runtime.directory.contract import build_graph_spec
from runtime.directory.records import Manifest, ModelRecord
from runtime.sampling.guidance import build_class_branches
from runtime.sampling.noise import sample_noise
from runtime.sampling.plan import HISTORY
from runtime.sampling.sampler import SamplerChoice, resolve_sampler

Array = NDArray[Any]

_SEED = 20240926
_TIMES = (0.25, 0.6)
_GRAPH_GUIDANCE = 1.5


def compute_proof_arrays(
    model: CheckpointModel, manifest: Manifest, request: BuildRequest, resolution: int
) -> dict[str, Array]:
    """Compute inputs and float32 outputs of every graph at one resolution, one trajectory and its pictures.

    The batch has 2 images, or as many as static engines take (the last is repeated). An int8 build has equalised
    networks, which pass other modulations from conditioning to trunk; the trajectory is the plain model's all the same.

    Args:
        manifest: of the build, for the model's facts and the default sampler.
    """
    num_images = request.max_batch if request.static_batch else min(2, request.max_batch)
    classes = sorted(manifest.model.classes)
    labels = [classes[i % len(classes)] for i in range(num_images)]
    arrays: dict[str, Array] = {}
    with torch.inference_mode():
        for role in model.networks:
            network = equalise_network(model.resize_network(role, resolution), role, request.recipe)
            arrays |= _run_network(network, role, manifest.model, labels)
        arrays |= _run_trajectory(model, manifest, resolution, labels)
        latents = torch.from_numpy(arrays["trajectory/latents"])
        for variant, vae in model.vaes.items():
            pictures, finite = DecoderGraph(vae, torch.float32)(latents)
            arrays |= {
                f"decoder-{variant}/in/latents": latents.numpy(),
                f"decoder-{variant}/out/images": pictures.numpy(),
                f"decoder-{variant}/out/finite": finite.numpy(),
                f"trajectory/images-{variant}": pictures.numpy(),
            }
        if request.encoder and model.vaes:
            random = np.random.Generator(np.random.Philox(_SEED + 1))
            images = random.random((num_images, 3, resolution, resolution), dtype=np.float32)
            mean, std = EncoderGraph(next(iter(model.vaes.values())), torch.float32)(torch.from_numpy(images))
            arrays |= {"encoder/in/images": images, "encoder/out/mean": mean.numpy(), "encoder/out/std": std.numpy()}
    return {f"{resolution}/{name}": array for name, array in arrays.items()}


def compute_tile_arrays(
    model: CheckpointModel, proof: dict[str, Array], resolutions: tuple[int, ...], tile: int
) -> dict[str, Array]:
    """Compute inputs and float32 outputs of decoders in two parts.

    The heads get the latents of the trajectories in `proof`, and the tile is a corner of their features.
    """
    side = tile // model.factor
    core = torch.zeros(side, side)
    core[1:-1, 1:-1] = 1.0
    arrays: dict[str, Array] = {}
    with torch.inference_mode():
        for variant, vae in model.vaes.items():
            for resolution in (r for r in resolutions if r > tile):
                latents = proof[f"{resolution}/trajectory/latents"]
                features = HeadGraph(vae, torch.float32)(torch.from_numpy(latents))
                arrays |= {
                    f"{resolution}/head-{variant}/in/latents": latents,
                    f"{resolution}/head-{variant}/out/features": features.numpy(),
                }
            graph = TileGraph(vae, torch.float32)
            corner = features[:, :, :side, :side].contiguous()
            _, _, sums = graph(corner, core, torch.zeros(2, len(corner), graph.moments), torch.zeros(1))
            inputs = {"features": corner, "core": core, "moments": sums / core.sum(), "has_moments": torch.ones(1)}
            outputs = zip(("images", "finite", "sums"), graph(**inputs), strict=True)
            arrays |= {f"{tile}/tile-{variant}/in/{name}": tensor.numpy() for name, tensor in inputs.items()}
            arrays |= {f"{tile}/tile-{variant}/out/{name}": tensor.numpy() for name, tensor in outputs}
    return arrays


def _run_network(network: SiT, role: str, record: ModelRecord, labels: list[int]) -> dict[str, Array]:
    """Inputs that use every part of the contract, and the outputs of conditioning and trunk."""
    conditioning = "conditioning" if role == "predictor" else "refiner_conditioning"
    spec = build_graph_spec(role, channels=record.channels, side=network.config.latent_size, pixels=0, modulations=0)
    scales, num_images = _make_scales(len(labels), _GRAPH_GUIDANCE), len(labels)
    branches = build_class_branches(labels, scales, record.null_label, record.channels)
    sizes = {"B": num_images, "N": len(branches.labels)}
    inputs = {name: np.zeros(tensor.resolve_shape(sizes), tensor.numpy_dtype) for name, tensor in spec.inputs.items()}
    random = np.random.Generator(np.random.Philox(_SEED))

    def draw_normal(*shape: int) -> Array:
        return random.standard_normal(shape, dtype=np.float32)

    inputs["base"] = draw_normal(*inputs["base"].shape)
    inputs["slopes"][[0, 3, HISTORY - 1]] = draw_normal(3, *inputs["base"].shape)
    for name, base_coefficient in (("point_coef", 1.0), ("update_coef", 1.0), ("error_coef", 0.0)):
        inputs[name][[1, 4]] = 0.1 * draw_normal(2, num_images)
        inputs[name][-1] = 0.1
        inputs[name][0] += base_coefficient
    inputs["atol"] += 0.01
    inputs["rtol"] += 0.01
    inputs["row_image"], inputs["mix"] = branches.row_image, branches.mix
    for name in ("velocity", "residual"):
        if name in inputs:
            inputs[name] = draw_normal(*inputs[name].shape)
    times = np.resize(np.asarray(_TIMES, np.float32), num_images)[branches.row_image]
    conditioning_inputs = {"t": times, "y": branches.labels}
    mods = ConditioningGraph(network)(*map(torch.from_numpy, conditioning_inputs.values()))
    inputs["mods"] = mods.numpy()
    trunk = PredictorGraph(network) if role == "predictor" else RefinerGraph(network)
    outputs = trunk(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return {
        **{f"{conditioning}/in/{name}": array for name, array in conditioning_inputs.items()},
        f"{conditioning}/out/mods": mods.numpy(),
        **{f"{role}/in/{name}": array for name, array in inputs.items()},
        **{f"{role}/out/{name}": tensor.numpy() for name, tensor in zip(spec.outputs, outputs, strict=True)},
    }


def _make_scales(images: int, guidance: float) -> list[float]:
    return [1.0, *[guidance] * (images - 1)]


def _run_trajectory(model: CheckpointModel, manifest: Manifest, resolution: int, labels: list[int]) -> dict[str, Array]:
    """Run the default sampler from fixed noise."""
    record, defaults = manifest.model, manifest.defaults
    sampler = resolve_sampler(SamplerChoice(schedule=defaults.schedule, solver=defaults.solver, steps=defaults.steps))
    scales = _make_scales(len(labels), defaults.guidance)
    side = resolution // model.factor
    noise = sample_noise([_SEED + i for i in range(len(labels))], (record.channels, side, side))
    latents = sample(
        {role: model.resize_network(role, resolution) for role in model.networks},
        sampler.plan,
        make_conditions(labels, scales, record.null_label),
        torch.from_numpy(noise),
        guided_channels=defaults.guidance_channels,
    )
    settings = {
        "labels": labels,
        "scales": scales,
        "guidance_channels": defaults.guidance_channels,
        "sampler": {"schedule": defaults.schedule, "solver": defaults.solver, "steps": defaults.steps},
    }
    return {
        "trajectory/noise": noise,
        "trajectory/latents": latents.numpy(),
        "trajectory/settings": np.asarray(json.dumps(settings)),
    }
