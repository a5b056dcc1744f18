"""A sampler as users name it, resolved to what the loops run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from runtime.sampling.blocks import Schedule, flowturbo_plan, parse_schedule
from runtime.sampling.calibrated import SavedSampler
from runtime.sampling.controllers import MAX_NFE, Control, Rule
from runtime.sampling.grids import Grid, backwards, explicit, parse_grid, uniform
from runtime.sampling.guidance import EVERYWHERE, Interval
from runtime.sampling.history import place
from runtime.sampling.plan import Evaluation, draws
from runtime.sampling.sde import Diffusion
from runtime.sampling.solvers import CONTROLLED, RULES, SOLVERS, STOCHASTIC, multistep
from runtime.system.errors import RequestError

FLOWTURBO = "flowturbo"
"""Name of the solver that a schedule string describes."""
SOLVER_NAMES = (FLOWTURBO, *SOLVERS, *CONTROLLED, *STOCHASTIC)


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler as users name it: a schedule, a solver with steps, or a rule of adaptive steps.

    Attributes:
        schedule: FlowTurbo blocks, e.g. "H1P5R3".
        solver, steps: a name of `SOLVER_NAMES` and its steps (never grid points).
        grid: times, or their description ("uniform", "shift:1.8", "warp:1.4", "0,0.3,1").
        adaptive: a name of `RULES`.
        tolerance, constant, max_nfe, first_step: of adaptive steps and dopri5; see `control.Control`.
        diffusion: of the stochastic solvers.
        consistent: the variant of the refiner block whose second call reads the first.
        interval: flow times in which guidance acts.
        backwards: from data to noise.
        saved: a calibrated sampler in place of all this.
        force: allow block orders that are known to fail, and samplers calibrated for another model.
    """

    schedule: str | None = None
    solver: str | None = None
    steps: int | None = None
    grid: Grid | str | None = None
    adaptive: str | None = None
    tolerance: float | None = None
    constant: float | None = None
    max_nfe: int | None = None
    first_step: float | None = None
    diffusion: Diffusion | None = None
    consistent: bool = False
    interval: Interval = EVERYWHERE
    backwards: bool = False
    saved: SavedSampler | None = None
    force: bool = False


@dataclass(frozen=True)
class Sampler:
    """A resolved sampler: fixed evaluations, or a rule that chooses them as it goes.

    Attributes:
        name: what reports and pictures carry.
        plan: the evaluations of a fixed one.
        rule, control: of one that looks.
        interval: where guidance acts.
        settings: everything that was chosen, so that reports tell two samplers of one name apart.
    """

    name: str
    plan: tuple[Evaluation, ...] = ()
    rule: Rule | None = None
    control: Control = field(default_factory=Control)
    interval: Interval = EVERYWHERE
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        place(self.plan)  # asserts that the history holds what it reads

    @property
    def needs_refiner(self) -> bool:
        return any(evaluation.network == "refiner" for evaluation in self.plan)

    @property
    def draws(self) -> int:
        """Normal draws per image after the initial noise."""
        return draws(self.plan)

    def with_refiner(self, there: bool) -> Sampler:
        """Tells a rule that tries one whether there is a refiner."""
        if self.rule is None or not self.rule.tries_refiner:
            return self
        return replace(self, control=replace(self.control, refiner=there and not self.control.backwards))


def resolve_sampler(choice: SamplerChoice) -> Sampler:
    """The sampler that a choice names.

    Raises:
        RequestError: it names none or several, a name is unknown, or what it asks for does not go together.
    """
    return replace(_resolved(choice), settings=chosen(choice))


def chosen(choice: SamplerChoice) -> dict[str, Any]:
    """The fields of a choice that say something, a saved sampler by its name and hash."""
    said = {name: getattr(choice, name) for name in SamplerChoice.__dataclass_fields__}
    if choice.saved is not None:
        said["saved"] = {"name": choice.saved.name, "sha256": choice.saved.sha256}
    return {name: value for name, value in said.items() if value not in (None, False, EVERYWHERE)}


def _resolved(choice: SamplerChoice) -> Sampler:
    if choice.saved is not None:
        return _from_saved(choice.saved, choice)
    named = [
        what
        for what, given in (
            (f"schedule {choice.schedule!r}", choice.schedule),
            (f"solver {choice.solver!r}", choice.solver if choice.solver != FLOWTURBO else None),
            (f"adaptive {choice.adaptive!r}", choice.adaptive),
        )
        if given is not None
    ]
    if len(named) != 1:
        raise RequestError(
            " and ".join(named) or "no sampler",
            allowed="a schedule (for flowturbo), a solver with --steps or a rule of adaptive steps, not both",
        )
    if choice.schedule is not None:
        return _scheduled(choice)
    if choice.adaptive is not None:
        return _adaptive(choice)
    return _solver(choice)


def _scheduled(choice: SamplerChoice) -> Sampler:
    assert choice.schedule is not None
    parsed = parse_schedule(choice.schedule, force=choice.force, consistent=choice.consistent)
    _only(choice, f"schedule {parsed}", "grid", "steps", "consistent")
    if choice.steps is not None and choice.steps != parsed.steps:
        raise RequestError(
            f"schedule {parsed} has {parsed.steps} steps, --steps is {choice.steps}", remedy="leave --steps out"
        )
    grid = _grid(choice, parsed.steps)
    _refuse_backwards(choice, parsed)
    name = f"{parsed}{'-consistent' if choice.consistent else ''}{_grid_name(choice)}"
    return Sampler(name, tuple(flowturbo_plan(parsed, grid, choice.interval)), interval=choice.interval)


def _refuse_backwards(choice: SamplerChoice, schedule: Schedule) -> None:
    if choice.backwards and schedule.needs_refiner:
        raise RequestError(
            f"schedule {schedule} backwards: refiners are trained towards data",
            remedy="use H and P blocks, or a solver such as heun or dopri5",
        )


def _solver(choice: SamplerChoice) -> Sampler:
    name = choice.solver
    assert name is not None
    if name not in SOLVER_NAMES:
        raise RequestError(f"solver {name!r}", allowed=", ".join(SOLVER_NAMES))
    if name in CONTROLLED:
        return _controlled(choice, name, CONTROLLED[name])
    if name in STOCHASTIC:
        return _stochastic(choice, name)
    _only(choice, f"solver {name}", "grid", "steps")
    method = SOLVERS[name]
    if method.own_grid and (choice.grid is not None or choice.backwards):
        raise RequestError(
            f"{'a time grid' if choice.grid is not None else 'backwards'} for {name}, which has its own times",
            remedy="leave it out, or use another solver",
        )
    grid = _grid(choice, method.default_steps, method.grid)
    plan = [replace(step, guided=choice.interval.acts(step.t)) for step in method.plan(grid)]
    return Sampler(f"{name}-{len(grid) - 1}{_grid_name(choice)}", tuple(plan), interval=choice.interval)


def _stochastic(choice: SamplerChoice, name: str) -> Sampler:
    _only(choice, f"solver {name}", "grid", "steps", "diffusion")
    if choice.backwards:
        raise RequestError(f"{name} backwards: noise cannot be taken back", remedy="use heun, ab2 or dopri5")
    method, diffusion = STOCHASTIC[name], choice.diffusion or Diffusion()
    grid = _grid(choice, method.default_steps)
    plan = [replace(step, guided=choice.interval.acts(step.t)) for step in method.plan(grid, diffusion)]
    full = f"{name}-{len(grid) - 1}-{diffusion.form}-{diffusion.last_step}{_grid_name(choice)}"
    return Sampler(full, tuple(plan), interval=choice.interval)


def _adaptive(choice: SamplerChoice) -> Sampler:
    assert choice.adaptive is not None
    if choice.adaptive not in RULES:
        raise RequestError(f"adaptive {choice.adaptive!r}", allowed=", ".join(RULES))
    return _controlled(choice, choice.adaptive, RULES[choice.adaptive])


def _controlled(choice: SamplerChoice, name: str, rule: Rule) -> Sampler:
    allowed = (rule.setting, *(() if rule.joint else ("max_nfe",)), "first_step")
    _only(choice, name, *allowed)
    if rule.joint and (choice.interval != EVERYWHERE or choice.backwards):
        raise RequestError(
            f"{name} with a guidance interval or backwards: it does what the reference's sampler does",
            remedy="use dopri5",
        )
    setting = getattr(choice, rule.setting)
    setting = rule.default if setting is None else setting
    tuned: dict[str, Any] = {rule.setting: setting}
    control = Control(
        **tuned,
        max_nfe=MAX_NFE if choice.max_nfe is None else choice.max_nfe,
        first_step=choice.first_step,
        interval=choice.interval,
        backwards=choice.backwards,
    )
    rule.check_budget(control)
    return Sampler(f"{name}-{setting:g}", (), rule, control, choice.interval)


def _from_saved(saved: SavedSampler, choice: SamplerChoice) -> Sampler:
    fitting = {"adaptive": ("max_nfe", "first_step"), "schedule": ("consistent",), "table": ()}
    _only(choice, f"the saved sampler {saved.name}", *fitting[saved.kind])
    if saved.kind == "adaptive":
        assert saved.rule is not None
        if saved.rule not in RULES:
            raise RequestError(f"the saved sampler {saved.name} has the rule {saved.rule!r}", allowed=", ".join(RULES))
        tuned: dict[str, Any] = {RULES[saved.rule].setting: saved.setting}
        own = replace(choice, saved=None, adaptive=saved.rule, **tuned)
        return replace(resolve_sampler(own), name=saved.name)
    if saved.kind == "schedule":
        own = replace(choice, saved=None, schedule=saved.schedule, grid=saved.grid)
        return replace(resolve_sampler(own), name=saved.name)
    if choice.backwards:
        raise RequestError(f"{saved.name} backwards: its table goes towards data", remedy="use heun, ab2 or dopri5")
    return Sampler(saved.name, tuple(multistep(saved.table, choice.interval)), interval=choice.interval)


_OPTIONS = ("grid", "steps", "tolerance", "constant", "max_nfe", "first_step", "diffusion", "consistent")


def _only(choice: SamplerChoice, what: str, *allowed: str) -> None:
    """Refuses options that the chosen sampler would not look at."""
    for name in _OPTIONS:
        if name not in allowed and getattr(choice, name) not in (None, False):
            option = "--" + name.replace("_", "-")
            fitting = ", ".join("--" + other.replace("_", "-") for other in allowed) or "none of its own"
            raise RequestError(f"{option} with {what}, which has no use for it", allowed=fitting)


def _grid(choice: SamplerChoice, default_steps: int, build: Callable[[int], Grid] = uniform) -> Grid:
    """The times of a fixed sampler, backwards if asked."""
    if choice.grid is None:
        grid = build(default_steps if choice.steps is None else choice.steps)
    elif isinstance(choice.grid, str):
        listed = re.fullmatch(r"[-+0-9.eE,\s]+", choice.grid) is not None and "," in choice.grid
        steps = choice.grid.count(",") if listed and choice.steps is None else choice.steps or default_steps
        grid = parse_grid(choice.grid, steps)
    else:
        grid = explicit(choice.grid)
    return backwards(grid) if choice.backwards else grid


def _grid_name(choice: SamplerChoice) -> str:
    if choice.grid is None:
        return "-backwards" if choice.backwards else ""
    shown = choice.grid if isinstance(choice.grid, str) and "," not in choice.grid else "own grid"
    return f" ({shown}{', backwards' if choice.backwards else ''})"
