"""Find the setting of a rule of adaptive steps that meets a number of evaluations: C of `norm`, `lte`'s tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calibration.samplers.probe import SamplerMeasurement, SamplerMeter
from runtime.request import RequestOptions
from runtime.sampling.solvers import ADAPTIVE_RULES
from runtime.system.errors import RequestError
from runtime.system.progress import SILENT, Progress

SETTING_BOUNDS = {"constant": (2e-3, 5.0), "tolerance": (1e-6, 10.0)}
"""Between which values a setting is searched."""


@dataclass(frozen=True)
class SettingFit:
    """The setting of a rule, its measurement, and every trial: (setting, evaluations, error)."""

    rule: str
    setting: float
    measurement: SamplerMeasurement
    trials: tuple[tuple[float, float, float], ...]


def make_rule_options(rule: str, setting: float) -> RequestOptions:
    """Return a rule with its setting as keyword arguments of `Pipeline.request`."""
    if ADAPTIVE_RULES[rule].parameter == "constant":
        return {"adaptive": rule, "constant": setting}
    return {"adaptive": rule, "tolerance": setting}


def fit_setting(
    meter: SamplerMeter, rule: str, target_nfe: float, progress: Progress = SILENT, *, tolerance: float = 0.02
) -> SettingFit:
    """Bisect the setting of a rule, on a logarithmic scale, until its mean evaluations meet a target.

    Args:
        target_nfe: evaluations of both networks, mean over images.
        tolerance: relative miss that is accepted; with few images the mean moves in jumps.

    Raises:
        RequestError: no setting within the bounds comes near.
    """
    if rule not in ADAPTIVE_RULES:
        raise RequestError(f"rule {rule!r}", allowed=", ".join(ADAPTIVE_RULES))
    name = ADAPTIVE_RULES[rule].parameter
    low, high = SETTING_BOUNDS[name]  # a larger setting takes fewer evaluations
    trials: list[tuple[float, SamplerMeasurement]] = []
    for _ in range(16):
        setting = math.sqrt(low * high)
        measurement = meter.measure(**make_rule_options(rule, setting))
        nfe = measurement.nfe
        trials.append((setting, measurement))
        progress.write(f"{rule} {name} {setting:.5g}: {nfe:.2f} evaluations, error {measurement.error:.4f}")
        if abs(nfe - target_nfe) <= tolerance * target_nfe or high / low < 1.002:
            break
        low, high = (setting, high) if nfe > target_nfe else (low, setting)
    setting, measurement = min(trials, key=lambda trial: abs(trial[1].nfe - target_nfe))
    if abs(measurement.nfe - target_nfe) > 0.25 * target_nfe:
        raise RequestError(
            f"{target_nfe:g} evaluations with {rule}: the nearest that it takes is {measurement.nfe:.2f}",
            allowed=f"what a {name} between {SETTING_BOUNDS[name][0]:g} and {SETTING_BOUNDS[name][1]:g} can give",
        )
    return SettingFit(rule, setting, measurement, tuple((s, m.nfe, m.error) for s, m in trials))
