"""The engine contract: names, shapes and types of every graph's inputs and outputs (docs/contract.md).

The exporter and the loop both read it here. Letters: B images, N rows (B ≤ N ≤ 2B), K history
slots, C latent channels, H = W latent side, M modulations a row, P pixels a side. All floats at the boundary are
float32, whatever the network computes in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from runtime.sampling.plan import HISTORY

Dim = int | str
GraphName = Literal[
    "conditioning", "predictor", "refiner_conditioning", "refiner", "decoder", "head", "tile", "encoder"
]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output; dimensions that vary at run time are the letters "B" and "N"."""

    dtype: Literal["float32", "int32", "bool"]
    shape: tuple[Dim, ...]

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        dtype: DTypeLike = self.dtype
        return np.dtype(dtype)

    def resolve_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with B and N filled in."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)


TensorSpecs = dict[str, TensorSpec]


@dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs of one graph, in order."""

    inputs: TensorSpecs
    outputs: TensorSpecs


FORMER_NAMES = {
    "point_coef": "a",
    "update_coef": "b",
    "error_coef": "e",
    "row_image": "pair",
    "velocity": "v",
    "residual": "add",
    "velocities": "rows",
    "slope_rms": "v_rms",
    "has_moments": "given",
}
"""What tensors were called in files of directories before manifest schema 6; such files run as they are."""


def match_names(spec: GraphSpec, tensors: Iterable[str]) -> dict[str, str] | None:
    """Return the name in a file of each tensor of the contract, or None if the file does not keep the contract.

    Args:
        tensors: names of the file's inputs and outputs, in any order.
    """
    contract_names, file_names = [*spec.inputs, *spec.outputs], set(tensors)
    for names in ({n: n for n in contract_names}, {n: FORMER_NAMES.get(n, n) for n in contract_names}):
        if file_names == set(names.values()):
            return names
    return None


def rename_former(name: str) -> str:
    """Return today's name of a tensor that may have its former one."""
    return _CURRENT_NAMES.get(name, name)


_CURRENT_NAMES = {former: current for current, former in FORMER_NAMES.items()}


def build_conditioning_spec(modulations: int) -> GraphSpec:
    """Build the contract (t, y) → modulations, one row per (time, label) pair."""
    return GraphSpec(
        {"t": TensorSpec("float32", ("N",)), "y": TensorSpec("int32", ("N",))},
        {"mods": TensorSpec("float32", ("N", modulations))},
    )


def build_trunk_spec(channels: int, side: int, modulations: int, *, refiner: bool) -> GraphSpec:
    """Build the contract of an evaluation: point, network, guidance, combination and error, in one call."""
    latent_shape, row_shape = ("B", channels, side, side), ("N", channels, side, side)
    inputs = {
        "base": TensorSpec("float32", latent_shape),
        "slopes": TensorSpec("float32", (HISTORY, *latent_shape)),
        "point_coef": TensorSpec("float32", (HISTORY + 1, "B")),
        "update_coef": TensorSpec("float32", (HISTORY + 2, "B")),
        "error_coef": TensorSpec("float32", (HISTORY + 1, "B")),
        "atol": TensorSpec("float32", ("B",)),
        "rtol": TensorSpec("float32", ("B",)),
        "mods": TensorSpec("float32", ("N", modulations)),
        "row_image": TensorSpec("int32", ("N",)),
        "mix": TensorSpec("float32", (channels, "N", "N")),
    }
    if refiner:
        inputs |= {"velocity": TensorSpec("float32", row_shape), "residual": TensorSpec("float32", row_shape)}
    outputs = {
        "slope": TensorSpec("float32", latent_shape),
        "velocities": TensorSpec("float32", row_shape),
        "x_next": TensorSpec("float32", latent_shape),
        "err": TensorSpec("float32", ("B",)),
        "slope_rms": TensorSpec("float32", ("B",)),
    }
    return GraphSpec(inputs, outputs)


def build_decoder_spec(channels: int, side: int, pixels: int) -> GraphSpec:
    """Build the contract sampler's latents → pictures in [0, 1], and whether every pixel is finite."""
    return GraphSpec(
        {"latents": TensorSpec("float32", ("B", channels, side, side))},
        {"images": TensorSpec("float32", ("B", 3, pixels, pixels)), "finite": TensorSpec("float32", ("B",))},
    )


def build_head_spec(channels: int, side: int, features: int) -> GraphSpec:
    """Build the contract sampler's latents of a whole picture → features that its tiles are decoded from."""
    return GraphSpec(
        {"latents": TensorSpec("float32", ("B", channels, side, side))},
        {"features": TensorSpec("float32", ("B", features, side, side))},
    )


def build_tile_spec(features: int, side: int, pixels: int, moments: int) -> GraphSpec:
    """Build the contract tile of features, and moments of the norms in the whole picture → tile of it (`tiling.py`)."""
    moments_spec = TensorSpec("float32", (2, "B", moments))
    return GraphSpec(
        {
            "features": TensorSpec("float32", ("B", features, side, side)),
            "core": TensorSpec("float32", (side, side)),
            "moments": moments_spec,
            "has_moments": TensorSpec("float32", (1,)),
        },
        {
            "images": TensorSpec("float32", ("B", 3, pixels, pixels)),
            "finite": TensorSpec("float32", ("B",)),
            "sums": moments_spec,
        },
    )


def build_encoder_spec(channels: int, side: int, pixels: int) -> GraphSpec:
    """Build the contract pictures in [0, 1] → mean and standard deviation of their scaled latents."""
    latent_shape = ("B", channels, side, side)
    return GraphSpec(
        {"images": TensorSpec("float32", ("B", 3, pixels, pixels))},
        {"mean": TensorSpec("float32", latent_shape), "std": TensorSpec("float32", latent_shape)},
    )


def build_graph_spec(
    graph: str, *, channels: int, side: int, pixels: int, modulations: int, moments: int = 0, features: int = 0
) -> GraphSpec:
    """Build the contract of a graph by its name.

    Args:
        modulations: of the predictor or the refiner.
        moments, features: of a decoder in two parts.
    """
    if graph.endswith("conditioning"):
        return build_conditioning_spec(modulations)
    if graph in ("predictor", "refiner"):
        return build_trunk_spec(channels, side, modulations, refiner=graph == "refiner")
    if graph.startswith("decoder"):
        return build_decoder_spec(channels, side, pixels)
    if graph.startswith("head"):
        return build_head_spec(channels, side, features)
    if graph.startswith("tile"):
        return build_tile_spec(features, side, pixels, moments)
    return build_encoder_spec(channels, side, pixels)


@dataclass(frozen=True)
class Profile:
    """Sizes an engine is built for: images and rows, each from the smallest to the largest, `best` tuned for."""

    images: tuple[int, int, int]
    rows: tuple[int, int, int]

    def resolve_bounds(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the smallest, tuned-for and largest shape of a tensor."""
        smallest, best, largest = (
            spec.resolve_shape({"B": b, "N": n}) for b, n in zip(self.images, self.rows, strict=True)
        )
        return smallest, best, largest


def build_profiles(max_batch: int, static: bool) -> tuple[Profile, ...]:
    """Build one profile over 1 … max-batch images and up to twice as many rows; static ones: unguided and guided."""
    b, n = max_batch, 2 * max_batch
    if static:
        return Profile((b, b, b), (b, b, b)), Profile((b, b, b), (n, n, n))
    return (Profile((1, 1, b), (1, 2, n)),)


CONDITIONING_ROWS = 128
"""Most rows of a conditioning engine: a whole schedule in one call."""

CONDITIONING_PROFILE = (Profile((1, 1, 1), (1, 32, CONDITIONING_ROWS)),)
