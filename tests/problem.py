"""A differential equation with a closed form, on which solvers are judged, and images that differ on it."""

from __future__ import annotations

from typing import Any

import numpy as np

START = np.array([[[[0.1, 0.3, 0.45, 0.7]]]])  # [B, C, H, W] float64


def slope(x: Any, t: float) -> Any:
    """dx/dt = x·(1 − x)·g(t), with x = 1 / (1 + exp(−(c + G(t)))): nonlinear, depends on t, closed form."""
    return x * (1 - x) * (3.0 * np.cos(3.0 * t) + 2.0)


def solve_forwards(start: Any, t: float) -> Any:
    odds = start / (1 - start) * np.exp(np.sin(3.0 * t) + 2.0 * t)
    return odds / (1 + odds)


def solve_backwards(end: Any) -> Any:
    """The start at t = 0 from which `end` is reached at t = 1."""
    odds = end / (1 - end) / np.exp(np.sin(3.0) + 2.0)
    return odds / (1 + odds)


def refine_exactly(x: Any, t: float, v: Any, add: Any) -> Any:
    """A perfect refiner: the very slope at (x, t)."""
    return (slope(x, t) - v) + v + 0 * add
