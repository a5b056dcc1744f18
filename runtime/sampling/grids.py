"""Time grids: n steps are n + 1 increasing points from exactly 0 (noise) to exactly 1 (data), built whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from runtime.system.errors import RequestError

Grid = tuple[float, ...]
GRID_SYNTAX = "uniform, shift:S (S > 1: more steps near the noise), warp:P (t^P), or a list of times such as 0,0.25,1"
"""How users write a grid."""


def build_uniform_grid(steps: int) -> Grid:
    """Return a grid of equal steps."""
    if not 1 <= steps <= 1000:
        raise RequestError(f"{steps} steps", allowed="1 to 1000 steps")
    return tuple(i / steps for i in range(steps + 1))


def build_shifted_grid(steps: int, shift: float) -> Grid:
    """Move steps towards the noise for shift > 1: t' = t / (t + shift·(1 − t)) (Esser et al. 2024, eq. 23)."""
    if not 0 < shift < float("inf"):
        raise RequestError(f"grid shift {shift}", allowed="a positive number; 1 is the uniform grid")
    return tuple(t / (t + shift * (1 - t)) for t in build_uniform_grid(steps))


def build_warped_grid(steps: int, power: float) -> Grid:
    """Return the grid t' = t^power: power > 1 takes small steps near the noise."""
    if not 0 < power < float("inf"):
        raise RequestError(f"grid power {power}", allowed="a positive number; 1 is the uniform grid")
    return tuple(t**power for t in build_uniform_grid(steps))


def build_explicit_grid(points: Sequence[float]) -> Grid:
    """Return a grid from its points.

    Raises:
        RequestError: it does not rise from exactly 0 to exactly 1.
    """
    grid = tuple(float(point) for point in points)
    is_increasing = all(a < b for a, b in pairwise(grid))
    if len(grid) < 2 or grid[0] != 0.0 or grid[-1] != 1.0 or not is_increasing:
        raise RequestError(
            f"time grid {', '.join(f'{point:g}' for point in grid)}",
            allowed="strictly increasing points, the first 0 and the last 1",
        )
    return grid


def reverse_grid(grid: Grid) -> Grid:
    """Return the same points from data to noise."""
    return tuple(reversed(grid))


def parse_grid(text: str, steps: int) -> Grid:
    """Parse a grid as users write it: "uniform", "shift:1.8", "warp:1.4" or points such as "0,0.3,1".

    Raises:
        RequestError: not one of these, or a list of points for another number of steps.
    """
    name, _, value = text.strip().lower().partition(":")
    try:
        if name == "uniform" and not value:
            return build_uniform_grid(steps)
        if name in ("shift", "warp"):
            return (build_shifted_grid if name == "shift" else build_warped_grid)(steps, float(value))
        grid = build_explicit_grid([float(point) for point in text.split(",")])
    except ValueError as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"time grid {text!r}", allowed=GRID_SYNTAX) from error
    if len(grid) != steps + 1:
        raise RequestError(f"{len(grid)} time points for {steps} steps", allowed=f"{steps + 1} points")
    return grid


def build_grid_from_steps(step_sizes: Sequence[float]) -> Grid:
    """Return a grid from step lengths, renormalised: published tables are rounded and do not sum to exactly 1."""
    total, elapsed, points = sum(step_sizes), 0.0, [0.0]
    for step in step_sizes[:-1]:
        elapsed += step
        points.append(elapsed / total)
    return (*points, 1.0)
