"""Choose the optimisation profile of an engine for given shapes, or say what the engine was built for."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from runtime.backends.base import EngineFile
from runtime.system.errors import RequestError

Shapes = tuple[tuple[int, ...], ...]
"""Shapes of an engine's inputs, in the contract's order."""
ProfileBounds = tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]
"""Smallest, tuned-for and largest shape of every input of one profile."""


def read_profiles(engine: Any, inputs: Sequence[str]) -> list[ProfileBounds]:
    """Return the profiles of a deserialised engine with these inputs."""
    return [
        tuple(
            (tuple(smallest), tuple(best), tuple(largest))
            for name in inputs
            for smallest, best, largest in [engine.get_tensor_profile_shape(name, index)]
        )
        for index in range(engine.num_optimization_profiles)
    ]


def choose_profile(profiles: list[ProfileBounds], shapes: Shapes, file: EngineFile) -> int:
    """Return the index of the profile that takes these input shapes and was tuned for the nearest.

    Raises:
        RequestError: none takes them; lists the built sizes.
    """
    candidates = [
        index
        for index, profile in enumerate(profiles)
        if all(
            len(shape) == len(smallest)
            and all(map(operator.le, smallest, shape))
            and all(map(operator.le, shape, largest))
            for shape, (smallest, _, largest) in zip(shapes, profile, strict=True)
        )
    ]
    if candidates:
        sizes = [size for shape in shapes for size in shape]

        def measure_distance(index: int) -> int:
            tuned = [size for _, shape, _ in profiles[index] for size in shape]
            return sum(abs(size - best) for size, best in zip(sizes, tuned, strict=True))

        return min(candidates, key=measure_distance)
    raise RequestError(
        f"{file.path.name} was not built for {format_sizes(shapes, file)}",
        allowed=" or ".join(_format_range(profile, file) for profile in profiles),
        remedy="flowturbo-export build-engines with another --max-batch, or without --static-batch",
    )


def _find_sizes(shapes: Shapes, file: EngineFile) -> dict[str, int]:
    """Return B and N of a set of input shapes."""
    return {
        dim: size
        for shape, spec in zip(shapes, file.spec.inputs.values(), strict=True)
        for size, dim in zip(shape, spec.shape, strict=False)
        if isinstance(dim, str)
    }


_SIZE_WORDS = {"B": "images", "N": "rows"}


def format_sizes(shapes: Shapes, file: EngineFile) -> str:
    """Format images and rows of a set of input shapes."""
    return ", ".join(f"{size} {_SIZE_WORDS[dim]}" for dim, size in _find_sizes(shapes, file).items())


def _format_range(profile: ProfileBounds, file: EngineFile) -> str:
    low = _find_sizes(tuple(bounds[0] for bounds in profile), file)
    high = _find_sizes(tuple(bounds[2] for bounds in profile), file)
    ranges = {dim: str(low[dim]) if low[dim] == high[dim] else f"{low[dim]}–{high[dim]}" for dim in low}
    return ", ".join(f"{text} {_SIZE_WORDS[dim]}" for dim, text in ranges.items())
