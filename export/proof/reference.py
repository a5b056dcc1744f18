"""The proof's data: fixed inputs, and what PyTorch in float32 makes of them. Written once per build as `proof.npz`.

Image 0 of every input is unguided and image 1 guided, so that one set judges both: float32 on all of it, 16 bit on
the unguided rows, since guidance multiplies rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.graphs.engine_graphs import ConditioningGraph, DecoderGraph, EncoderGraph, PredictorGraph, RefinerGraph
from export.graphs.tile_graph import HeadGraph, TileGraph
from export.lowbit.recipe import EMPTY_RECIPE, Recipe
from export.trace import CheckpointModel, make_float32_network
from flowturbo.models.sit import SiT
from flowturbo.torch_sampler import build_guided_velocity
from runtime.directory.contract import build_graph_spec
from runtime.directory.manifest import Defaults, ModelRecord
from runtime.sampling.guidance import BranchBatch, build_class_branches
from runtime.sampling.noise import sample_noise
from runtime.sampling.plan import HISTORY, integrate
from runtime.sampling.sampler import SamplerChoice, resolve_sampler

Array = NDArray[Any]
Say = Callable[[str], None]

_SEED = 20240926
_TIMES = (0.25, 0.6)
_GRAPH_GUIDANCE = 1.5


def compute_proof_arrays(
    model: CheckpointModel,
    record: ModelRecord,
    defaults: Defaults,
    resolution: int,
    encoder: bool,
    images: int,
    say: Say,
    recipe: Recipe = EMPTY_RECIPE,
) -> dict[str, Array]:
    """Inputs and float32 outputs of every graph at one resolution, one trajectory and its pictures.

    Args:
        images: batch of the inputs: 2, or the fixed batch of static engines (the last image is repeated).
        recipe: of an int8 build, whose equalised networks pass other modulations from conditioning to trunk; the
            trajectory is the model's own all the same.
    """
    say(f"reference in PyTorch float32 at {resolution} px")
    labels = _choose_labels(record, images)
    arrays: dict[str, Array] = {}
    with torch.inference_mode():
        for role in ("predictor", "refiner"):
            if role == "predictor" or model.refiner is not None:
                arrays |= _run_network(
                    make_float32_network(model.resize_network(role, resolution), role, recipe), role, record, labels
                )
        arrays |= _run_trajectory(model, record, defaults, resolution, labels)
        latents = torch.from_numpy(arrays["trajectory/latents"])
        for variant, vae in model.vaes.items():
            pictures, finite = DecoderGraph(vae, torch.float32)(latents)
            arrays |= {
                f"decoder-{variant}/in/latents": latents.numpy(),
                f"decoder-{variant}/out/images": pictures.numpy(),
                f"decoder-{variant}/out/finite": finite.numpy(),
                f"trajectory/images-{variant}": pictures.numpy(),
            }
        if encoder and model.vaes:
            arrays |= _run_encoder(model, resolution, images)
    return {f"{resolution}/{name}": array for name, array in arrays.items()}


def compute_tile_arrays(
    model: CheckpointModel, proof: dict[str, Array], resolutions: tuple[int, ...], tile: int
) -> dict[str, Array]:
    """Inputs and float32 outputs of decoders in two parts: heads of the trajectories' latents, a corner as the tile."""
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
            inputs = {"features": corner, "core": core, "moments": sums / core.sum(), "given": torch.ones(1)}
            outputs = zip(("images", "finite", "sums"), graph(**inputs), strict=True)
            arrays |= {f"{tile}/tile-{variant}/in/{name}": tensor.numpy() for name, tensor in inputs.items()}
            arrays |= {f"{tile}/tile-{variant}/out/{name}": tensor.numpy() for name, tensor in outputs}
    return arrays


def _choose_labels(record: ModelRecord, images: int) -> list[int]:
    classes = sorted(record.classes)
    return [classes[i % len(classes)] for i in range(images)]


def _run_network(network: SiT, role: str, record: ModelRecord, labels: list[int]) -> dict[str, Array]:
    """Inputs that use every part of the contract, and the outputs of conditioning and trunk."""
    conditioning = "conditioning" if role == "predictor" else "refiner_conditioning"
    branches = build_class_branches(
        labels, _make_scales(len(labels), _GRAPH_GUIDANCE), record.null_label, record.channels
    )
    times = np.resize(np.asarray(_TIMES, np.float32), len(labels))[branches.row_image]
    inputs = _make_trunk_inputs(network, role, record, branches)
    conditioning_inputs = {"t": times, "y": branches.labels}
    mods = ConditioningGraph(network)(*map(torch.from_numpy, conditioning_inputs.values()))
    inputs["mods"] = mods.numpy()
    trunk = PredictorGraph(network) if role == "predictor" else RefinerGraph(network)
    outputs = trunk(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    spec = build_graph_spec(role, channels=record.channels, side=network.config.latent_size, pixels=0, modulations=0)
    return {
        **{f"{conditioning}/in/{name}": array for name, array in conditioning_inputs.items()},
        f"{conditioning}/out/mods": mods.numpy(),
        **{f"{role}/in/{name}": array for name, array in inputs.items()},
        **{f"{role}/out/{name}": tensor.numpy() for name, tensor in zip(spec.outputs, outputs, strict=True)},
    }


def _make_trunk_inputs(network: SiT, role: str, record: ModelRecord, branches: BranchBatch) -> dict[str, Array]:
    random = np.random.Generator(np.random.Philox(_SEED))
    images, num_branches, side = int(branches.row_image.max()) + 1, len(branches.labels), network.config.latent_size

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape, dtype=np.float32)

    spec = build_graph_spec(role, channels=record.channels, side=side, pixels=0, modulations=0)
    sizes = {"B": images, "N": num_branches}
    inputs = {name: np.zeros(tensor.resolve_shape(sizes), tensor.numpy_dtype) for name, tensor in spec.inputs.items()}
    inputs["base"] = normal(*inputs["base"].shape)
    inputs["slopes"][[0, 3, HISTORY - 1]] = normal(3, *inputs["base"].shape)
    for name, base_coefficient in (("a", 1.0), ("b", 1.0), ("e", 0.0)):
        inputs[name][[1, 4]] = 0.1 * normal(2, images)
        inputs[name][-1] = 0.1
        inputs[name][0] += base_coefficient
    inputs["atol"] += 0.01
    inputs["rtol"] += 0.01
    inputs["pair"], inputs["mix"] = branches.row_image, branches.mix
    for name in ("v", "add"):
        if name in inputs:
            inputs[name] = normal(*inputs[name].shape)
    return inputs


def _make_scales(images: int, guidance: float) -> list[float]:
    return [1.0, *[guidance] * (images - 1)]


def _run_trajectory(
    model: CheckpointModel, record: ModelRecord, defaults: Defaults, resolution: int, labels: list[int]
) -> dict[str, Array]:
    """The default sampler from fixed noise, by the same plan in PyTorch arithmetic."""
    sampler = resolve_sampler(SamplerChoice(schedule=defaults.schedule, solver=defaults.solver, steps=defaults.steps))
    scales = _make_scales(len(labels), defaults.guidance)
    branches = build_class_branches(labels, scales, record.null_label, record.channels, defaults.guidance_channels)
    side = resolution // model.factor
    noise = sample_noise([_SEED + i for i in range(len(labels))], (record.channels, side, side))
    predict = build_guided_velocity(model.resize_network("predictor", resolution), branches)
    refine = (
        build_guided_velocity(model.resize_network("refiner", resolution), branches)
        if model.refiner is not None
        else None
    )
    latents = integrate(
        sampler.plan,
        torch.from_numpy(noise),
        lambda x, t: predict(x, t, None),
        (lambda x, t, v, add: refine(x, t, v) + add) if refine is not None else None,
    )
    sampler_settings = {"schedule": defaults.schedule, "solver": defaults.solver, "steps": defaults.steps}
    settings = json.dumps(
        {
            "labels": labels,
            "scales": scales,
            "guidance_channels": defaults.guidance_channels,
            "sampler": sampler_settings,
        }
    )
    return {
        "trajectory/noise": noise,
        "trajectory/latents": latents.float().numpy(),
        "trajectory/settings": np.asarray(settings),
    }


def _run_encoder(model: CheckpointModel, resolution: int, images: int) -> dict[str, Array]:
    vae = next(iter(model.vaes.values()))
    random = np.random.Generator(np.random.Philox(_SEED + 1))
    pictures = random.random((images, 3, resolution, resolution), dtype=np.float32)
    mean, std = EncoderGraph(vae, torch.float32)(torch.from_numpy(pictures))
    return {"encoder/in/images": pictures, "encoder/out/mean": mean.numpy(), "encoder/out/std": std.numpy()}
