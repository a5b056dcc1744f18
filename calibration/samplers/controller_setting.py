"""The setting of a rule of adaptive steps that meets a number of evaluations: C of `norm`, the tolerance of `lte`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from calibration.samplers.probe import Measured, Probe
from runtime.sampling.solvers import RULES
from runtime.system.errors import RequestError

BOUNDS = {"constant": (2e-3, 5.0), "tolerance": (1e-6, 10.0)}
"""Where a setting is looked for."""


@dataclass(frozen=True)
class Fitted:
    """A rule's setting, what it does, and every trial: (setting, evaluations, error)."""

    rule: str
    setting: float
    measured: Measured
    trials: tuple[tuple[float, float, float], ...]


def fit_setting(
    probe: Probe, rule: str, target_nfe: float, say: Callable[[str], None], *, within: float = 0.02
) -> Fitted:
    """Bisects a rule's setting, on a logarithmic scale, until its mean evaluations meet a target.

    Args:
        target_nfe: evaluations of both networks, mean over images.
        within: relative miss that is accepted; with few images the mean moves in jumps.

    Raises:
        RequestError: no setting within the bounds comes near.
    """
    if rule not in RULES:
        raise RequestError(f"rule {rule!r}", allowed=", ".join(RULES))
    name = RULES[rule].setting
    low, high = BOUNDS[name]  # a larger setting takes fewer evaluations
    trials: list[tuple[float, Measured]] = []
    for _ in range(16):
        setting = math.sqrt(low * high)
        measured = probe.measure(adaptive=rule, **{name: setting})
        nfe = measured.predictor + measured.refiner
        trials.append((setting, measured))
        say(f"{rule} {name} {setting:.5g}: {nfe:.2f} evaluations, error {measured.error:.4f}")
        if abs(nfe - target_nfe) <= within * target_nfe or high / low < 1.002:
            break
        low, high = (setting, high) if nfe > target_nfe else (low, setting)
    setting, measured = min(trials, key=lambda trial: abs(_nfe(trial[1]) - target_nfe))
    if abs(_nfe(measured) - target_nfe) > 0.25 * target_nfe:
        raise RequestError(
            f"{target_nfe:g} evaluations with {rule}: the nearest that it takes is {_nfe(measured):.2f}",
            allowed=f"what a {name} between {BOUNDS[name][0]:g} and {BOUNDS[name][1]:g} can give",
        )
    return Fitted(rule, setting, measured, tuple((s, _nfe(m), m.error) for s, m in trials))


def _nfe(measured: Measured) -> float:
    return measured.predictor + measured.refiner
