"""Stochastic samplers of the linear path: SiT's diffusion forms, Euler–Maruyama, stochastic Heun and the last step.

The score is affine in the velocity, score = (t·v − x) / (1 − t), so drift and noise need one evaluation where the
reference makes two (SiT, arXiv 2401.08740, eqs. 9 and 10): with D the diffusion,
dx = [v·(1 + D·t/(1 − t)) − x·D/(1 − t)]·dt + √(2·D)·dw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from runtime.sampling.grids import Grid
from runtime.sampling.plan import BASE, NEW, Combination, Evaluation, NoiseDraw, TermKey
from runtime.system.errors import RequestError
from runtime.system.option_fields import option

SBDM_START = 1e-3
"""SBDM's diffusion is infinite at t = 0; SiT starts it here."""


@dataclass(frozen=True)
class DiffusionForm:
    """A diffusion form of SiT.

    Attributes:
        diffusion: D(t, n) for a norm n.
        ratio: D(t) / (1 − t), with its limit at t = 1; infinite where the drift is.
        start: first time at which it can be used.
    """

    diffusion: Callable[[float, float], float]
    ratio: Callable[[float, float], float]
    start: float = 0.0


def _divide_by_time_left(diffusion: Callable[[float, float], float]) -> Callable[[float, float], float]:
    """Return D / (1 − t) of a form, which is 0 or infinite at t = 1."""

    def ratio(t: float, n: float) -> float:
        if t == 1.0:
            return 0.0 if diffusion(t, n) < 1e-12 else math.inf
        return diffusion(t, n) / (1 - t)

    return ratio


def _constant(t: float, n: float) -> float:
    return n


def _decreasing(t: float, n: float) -> float:
    return 0.25 * (n * math.cos(math.pi * t) + 1) ** 2


def _increasing_decreasing(t: float, n: float) -> float:
    return n * math.sin(math.pi * t) ** 2


DIFFUSION_FORMS = {
    "constant": DiffusionForm(_constant, _divide_by_time_left(_constant)),
    "SBDM": DiffusionForm(lambda t, n: n * (1 - t) / t, lambda t, n: n / t, SBDM_START),
    "sigma": DiffusionForm(lambda t, n: n * (1 - t), lambda t, n: n),
    "linear": DiffusionForm(lambda t, n: n * (1 - t), lambda t, n: n),
    "decreasing": DiffusionForm(_decreasing, _divide_by_time_left(_decreasing)),
    "increasing-decreasing": DiffusionForm(_increasing_decreasing, _divide_by_time_left(_increasing_decreasing)),
}
"""SiT's diffusion forms by name; on the linear path σ(t) = 1 − t makes `sigma` and `linear` the same."""

LAST_STEPS = ("mean", "tweedie", "euler", "none")


@dataclass(frozen=True)
class Diffusion:
    """Options of a stochastic sampler.

    Attributes:
        form: name of the diffusion form.
        norm: size n of the diffusion.
        last_step: how the last part is taken without noise: `mean` (x + drift·size), `tweedie` (the posterior
            mean), `euler` (x + v·size), or `none`: noisy steps to the end.
        last_step_size: length of that part, in flow time.
    """

    form: str = option(
        "sigma", "--diffusion", help="Of the sde solvers.", choices=tuple(DIFFUSION_FORMS), advanced=True
    )
    norm: float = option(1.0, "--diffusion-norm", help="Its size.", advanced=True)
    last_step: str = option("mean", help="Of the sde solvers.", choices=LAST_STEPS, advanced=True)
    last_step_size: float = option(0.04, help="Its length.", advanced=True)

    def __post_init__(self) -> None:
        if self.form not in DIFFUSION_FORMS:
            raise RequestError(f"diffusion form {self.form!r}", allowed=", ".join(DIFFUSION_FORMS))
        if self.last_step not in LAST_STEPS:
            raise RequestError(f"last step {self.last_step!r}", allowed=", ".join(LAST_STEPS))
        if not 0.0 <= self.norm <= 100.0:
            raise RequestError(f"diffusion norm {self.norm:g}", allowed="0 to 100; 0 is the deterministic flow")
        if not 0.0 < self.last_step_size < 1.0:
            raise RequestError(f"last step size {self.last_step_size:g}", allowed="between 0 and 1, SiT takes 0.04")

    def build_times(self, grid: Grid) -> tuple[float, ...]:
        """Return the ends of the noisy steps: the grid's points between the form's start and the last step."""
        start = DIFFUSION_FORMS[self.form].start
        end = 1.0 if self.last_step == "none" else 1.0 - self.last_step_size
        noisy = grid
        if self.last_step != "none":  # one step less, for `plan_last_step`; scaled so that the grid still ends at 1
            if len(grid) < 3:
                raise RequestError("1 step of a stochastic solver", allowed="2 to 1000: noisy steps and a last one")
            noisy = tuple(t / grid[-2] for t in grid[:-1])
        return (start, *(start + (end - start) * t for t in noisy[1:-1]), end)

    def compute_drift(self, t: float) -> tuple[float, float]:
        """Return the coefficients of v and of x in the drift at t."""
        ratio = DIFFUSION_FORMS[self.form].ratio(t, self.norm)
        if not math.isfinite(ratio):
            raise RequestError(
                f"the {self.form} form (norm {self.norm:g}) at t = 1, where its drift is infinite",
                remedy="use --last-step mean, tweedie or euler, or the solver sde-euler",
            )
        return 1 + ratio * t, -ratio

    def compute_noise_scale(self, t: float, h: float) -> float:
        """Return the size of the noise of a step."""
        return math.sqrt(2 * DIFFUSION_FORMS[self.form].diffusion(t, self.norm) * h)


def plan_euler_maruyama(grid: Grid, diffusion: Diffusion) -> list[Evaluation]:
    """Plan Euler–Maruyama: weak and, as the noise does not depend on x, strong order 1; one evaluation a step."""
    plan = []
    for k, (t, t_next) in enumerate(pairwise(diffusion.build_times(grid))):
        h = t_next - t
        velocity_coef, point_coef = diffusion.compute_drift(t)
        update: Combination = {
            BASE: 1 + h * point_coef,
            NEW: h * velocity_coef,
            NoiseDraw(k): diffusion.compute_noise_scale(t, h),
        }
        plan.append(Evaluation("predictor", t, {BASE: 1.0}, update, block="sde"))
    return plan + plan_last_step(diffusion)


def plan_stochastic_heun(grid: Grid, diffusion: Diffusion) -> list[Evaluation]:
    """Plan SiT's stochastic Heun: the noise first, then the mean drift of both ends; two evaluations a step."""
    plan: list[Evaluation] = []
    for k, (t, t_next) in enumerate(pairwise(diffusion.build_times(grid))):
        h, first_index = t_next - t, len(plan)
        noisy: Combination = {BASE: 1.0, NoiseDraw(k): diffusion.compute_noise_scale(t, h)}
        (v_1, x_1), (v_2, x_2) = diffusion.compute_drift(t), diffusion.compute_drift(t_next)
        predicted = _scale(noisy, 1 + h * x_1) | {first_index: h * v_1}
        plan.append(Evaluation("predictor", t, noisy, block="sde"))
        # x' = x̂ + h/2·(K1 + K2), K1 = v_1·d1 + x_1·x̂, K2 = v_2·d2 + x_2·(x̂ + h·K1)
        noisy_coef = 1 + h / 2 * (x_1 + x_2 * (1 + h * x_1))
        update = _scale(noisy, noisy_coef) | {first_index: h / 2 * v_1 * (1 + h * x_2), NEW: h / 2 * v_2}
        plan.append(Evaluation("predictor", t_next, predicted, update, block="sde"))
    return plan + plan_last_step(diffusion)


def plan_last_step(diffusion: Diffusion) -> list[Evaluation]:
    """Plan the noiseless step to t = 1; one evaluation, or none."""
    if diffusion.last_step == "none":
        return []
    size = diffusion.last_step_size
    t = 1.0 - size
    velocity_coef, point_coef = diffusion.compute_drift(t)
    update: dict[str, Combination] = {
        "mean": {BASE: 1 + size * point_coef, NEW: size * velocity_coef},
        # (x + (1 − t)²·score) / t: on the linear path the same as Euler, since 1 − t is the step itself
        "tweedie": {BASE: 1.0, NEW: 1.0 - t},
        "euler": {BASE: 1.0, NEW: size},
    }
    return [Evaluation("predictor", t, {BASE: 1.0}, update[diffusion.last_step], block="last")]


def _scale(combination: Combination, factor: float) -> dict[TermKey, float]:
    return {key: factor * value for key, value in combination.items()}
