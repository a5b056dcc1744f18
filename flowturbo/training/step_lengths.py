"""Which steps (t, Δt) a refiner is trained for: uniform ones, or those that a sampler was seen to take."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.sampling.grids import build_explicit_grid
from runtime.system.errors import DataError

StepArray = NDArray[np.float64]
"""[number of steps, 2]: t and Δt of each."""

_ALLOWED_FILES = (
    'a saved sampler with "grid" (times from 0 to 1), or a run.json of flowturbo-run whose images have a "path"'
)


def read_steps(path: Path) -> StepArray:
    """The steps in a saved sampler's grid, or the accepted ones of every image in flowturbo-run's run.json.

    A step that many images took is there as many times, so that drawing rows draws from what was taken.

    Raises:
        DataError: unreadable, of neither form, or with a step outside of 0 … 1.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--steps-from {path} cannot be read: {error}", allowed=_ALLOWED_FILES) from error
    if not isinstance(content, dict):
        raise DataError(f"--steps-from {path} holds no JSON object", allowed=_ALLOWED_FILES)
    try:
        grid = content.get("grid")  # null in a saved sampler that chooses its steps
        steps = _list_path_steps(content.get("images", [])) if grid is None else _list_grid_steps(grid)
        step_array = np.asarray(steps, dtype=np.float64).reshape(-1, 2)
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(
            f"--steps-from {path} is damaged: {str(error).splitlines()[0]}", allowed=_ALLOWED_FILES
        ) from error
    t, dt = step_array.T
    if len(step_array) == 0 or not bool(np.all((t >= 0) & (t < 1) & (dt > 0))):
        raise DataError(
            f"--steps-from {path} holds {'no accepted step' if len(step_array) == 0 else 'a step outside of 0 … 1'}",
            allowed=_ALLOWED_FILES,
            remedy="write one: flowturbo-run --engine DIR with an adaptive sampler leaves OUT/run.json",
        )
    step_array[:, 1] = np.minimum(dt, 1 - t)  # dopri5's reference mode steps beyond the end
    return step_array


def _list_grid_steps(grid: Any) -> list[tuple[float, float]]:
    return [(a, b - a) for a, b in pairwise(build_explicit_grid(grid))]


def _list_path_steps(images: Any) -> list[tuple[float, float]]:
    path_steps = (step for image in images for step in image.get("path") or ())
    return [(float(step["t"]), float(step["dt"])) for step in path_steps if step["accepted"]]
