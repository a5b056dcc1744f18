"""A sampler as users name it, resolved to what the loops run."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

from runtime.sampling.adaptive import AdaptiveSolver
from runtime.sampling.blocks import SCHEDULE_GRAMMAR, is_schedule, parse_schedule, plan_flowturbo
from runtime.sampling.calibrated import CalibratedSampler
from runtime.sampling.controllers import MAX_NFE, StepControl
from runtime.sampling.grids import GRID_SYNTAX, Grid, build_explicit_grid, build_uniform_grid, parse_grid, reverse_grid
from runtime.sampling.guidance import FULL_INTERVAL, GuidanceInterval
from runtime.sampling.history import assign_slots
from runtime.sampling.plan import Evaluation, count_draws
from runtime.sampling.sde import Diffusion
from runtime.sampling.solvers import ADAPTIVE_RULES, ADAPTIVE_SOLVERS, SOLVERS, STOCHASTIC_SOLVERS, plan_multistep
from runtime.system.errors import RequestError
from runtime.system.json_codec import JsonObject
from runtime.system.option_fields import option, parse_numbers

FLOWTURBO = "flowturbo"
"""Name of the solver that a schedule string describes."""
NAME_FIELDS = ("sampler", "steps", "schedule", "solver")
"""Fields of `SamplerChoice` that name a sampler, for commands that take no more."""
SOLVER_NAMES = (FLOWTURBO, *SOLVERS, *ADAPTIVE_SOLVERS, *STOCHASTIC_SOLVERS)


def parse_interval(name: str, text: str) -> GuidanceInterval:
    """Return the interval of "0.3,1"."""
    start, end = parse_numbers(name, text, 2)
    return GuidanceInterval(start, end)


@dataclass(frozen=True, kw_only=True)
class SamplerChoice:
    """A sampler as users name it: a schedule, a solver with steps, or a rule of adaptive steps.

    Attributes:
        sampler: a name of any of these: blocks, a calibrated sampler, a solver or a rule.
        schedule: FlowTurbo blocks, e.g. "H1P5R3", or a calibrated sampler.
        solver, steps: a name of `SOLVER_NAMES` and its steps (never grid points).
        grid: times, or their description ("uniform", "shift:1.8", "warp:1.4", "0,0.3,1").
        adaptive: a name of `ADAPTIVE_RULES`.
        tolerance, constant, max_nfe, first_step: of adaptive steps and dopri5; see `StepControl`.
        diffusion: of the stochastic solvers.
        consistent: the variant of the refiner block whose second call reads the first.
        interval: flow times in which guidance acts.
        force: allow block orders that are known to fail, and samplers calibrated for another model.
        backwards: from data to noise.
        saved: a calibrated sampler in place of all this.
    """

    sampler: str | None = option(
        None,
        help="FlowTurbo blocks such as H1P5R3, a saved sampler (a name that flowturbo-export inspect shows, or a .json "
        f"file), or a solver: {', '.join(list(SOLVERS)[:3])}, dopri5 and others.",
        default_text="the directory's",
    )
    steps: int | None = option(None, help="Steps of the solver (never grid points).", minimum=1, maximum=1000)
    schedule: str | None = option(None, help="Blocks or a saved sampler, as --sampler takes them.", advanced=True)
    solver: str | None = option(None, help="A solver, as --sampler takes it.", choices=SOLVER_NAMES, advanced=True)
    grid: Grid | str | None = option(
        None, help=f"Times of the steps: {GRID_SYNTAX}.", default_text="uniform, or the solver's own", advanced=True
    )
    adaptive: str | None = option(
        None,
        help="Steps that every image chooses for itself: by the velocity's size, by the local error, or trying the "
        "cheapest block first.",
        choices=tuple(ADAPTIVE_RULES),
        advanced=True,
    )
    tolerance: float | None = option(
        None, help="Of adaptive steps and dopri5.", default_text="0.01; dopri5 0.001", advanced=True
    )
    constant: float | None = option(
        None, help="C of --adaptive norm: steps are C / rms(v).", default_text="0.125", advanced=True
    )
    max_nfe: int | None = option(
        None, help="Evaluations an image may take.", minimum=1, default_text="1000", advanced=True
    )
    first_step: float | None = option(
        None, help="Length of the first adaptive step tried.", default_text="chosen", advanced=True
    )
    diffusion: Diffusion | None = option(None, help="Of the stochastic solvers.", advanced=True)
    consistent: bool = option(False, help="R blocks whose second call reads their first velocity.", advanced=True)
    interval: GuidanceInterval = option(
        FULL_INTERVAL,
        "--guidance-interval",
        help="Flow times A,B between which guidance acts.",
        default_text="0,1",
        parse=parse_interval,
        advanced=True,
    )
    force: bool = option(
        False, help="Allow what is known to fail, and samplers saved for another model.", advanced=True
    )
    backwards: bool = False
    saved: CalibratedSampler | None = None


@dataclass(frozen=True)
class Sampler:
    """A resolved sampler: fixed evaluations, or a rule that chooses them as it goes.

    Attributes:
        name: the name in reports and pictures.
        plan: the evaluations of a fixed sampler, empty for an adaptive one.
        adaptive_solver, control: of an adaptive sampler; None and unused for a fixed one.
        interval: flow times in which guidance acts.
        settings: all options that were chosen, so that reports tell two samplers of one name apart.
    """

    name: str
    plan: tuple[Evaluation, ...] = ()
    adaptive_solver: AdaptiveSolver | None = None
    control: StepControl = field(default_factory=StepControl)
    interval: GuidanceInterval = FULL_INTERVAL
    settings: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        assign_slots(self.plan)  # raises where the history cannot hold what the plan reads

    @property
    def needs_refiner(self) -> bool:
        return any(evaluation.network == "refiner" for evaluation in self.plan)

    @property
    def num_draws(self) -> int:
        """Normal draws per image after the initial noise."""
        return count_draws(self.plan)

    def with_refiner(self, has_refiner: bool) -> Sampler:
        """Return the sampler for a model with or without a refiner."""
        if self.adaptive_solver is None or not self.adaptive_solver.tries_refiner:
            return self
        return replace(self, control=replace(self.control, refiner=has_refiner and not self.control.backwards))


def resolve_sampler(choice: SamplerChoice) -> Sampler:
    """Return the sampler that a choice names.

    Raises:
        RequestError: it names none or several, a name is unknown, or what it asks for does not go together.
    """
    choice = expand_sampler_name(choice)
    solver = choice.solver if choice.solver != FLOWTURBO else None
    named = {"schedule": choice.schedule, "solver": solver, "adaptive": choice.adaptive}
    names = [f"{kind} {name!r}" for kind, name in named.items() if name is not None]
    if choice.saved is None and len(names) != 1:
        raise RequestError(
            " and ".join(names) or "no sampler",
            allowed="a schedule (for flowturbo), a solver with --steps or a rule of adaptive steps, not both",
        )
    if choice.saved is not None:
        sampler = _resolve_calibrated(choice.saved, choice)
    elif choice.schedule is not None:
        sampler = _resolve_schedule(choice.schedule, choice)
    elif choice.adaptive is not None:
        if choice.adaptive not in ADAPTIVE_RULES:
            raise RequestError(f"adaptive {choice.adaptive!r}", allowed=", ".join(ADAPTIVE_RULES))
        sampler = _build_adaptive(choice, choice.adaptive, ADAPTIVE_RULES[choice.adaptive])
    else:
        sampler = _resolve_solver(str(solver), choice)
    return replace(sampler, settings=collect_settings(choice))


def expand_sampler_name(choice: SamplerChoice, saved_names: Collection[str] = ()) -> SamplerChoice:
    """Return the choice with its `sampler` as the schedule, solver or rule that it names.

    Args:
        saved_names: calibrated samplers of the directory.

    Raises:
        RequestError: nothing has this name, or another sampler is named beside it.
    """
    name = choice.sampler
    if name is None:
        return choice
    for field_name in ("schedule", "solver", "adaptive"):
        if (other := getattr(choice, field_name)) is not None:
            raise RequestError(f"sampler {name!r} and {field_name} {other!r}", allowed="one of them")
    if is_schedule(name) or name in saved_names or name.endswith(".json"):
        return replace(choice, sampler=None, schedule=name)
    if name in SOLVER_NAMES:
        return replace(choice, sampler=None, solver=name)
    if name in ADAPTIVE_RULES:
        return replace(choice, sampler=None, adaptive=name)
    raise RequestError(
        f"sampler {name!r}",
        allowed=f"{SCHEDULE_GRAMMAR}; a saved sampler of this directory ({', '.join(saved_names) or 'it has none'}) "
        f"or a .json file of flowturbo-calibrate; a solver: {', '.join((*SOLVER_NAMES, *ADAPTIVE_RULES))}",
    )


def collect_settings(choice: SamplerChoice) -> dict[str, Any]:
    """Return the fields of a choice that are set, a saved sampler by its name and hash."""
    settings = {name: getattr(choice, name) for name in SamplerChoice.__dataclass_fields__}
    if choice.saved is not None:
        settings["saved"] = {"name": choice.saved.name, "sha256": choice.saved.sha256}
    return {name: value for name, value in settings.items() if value not in (None, False, FULL_INTERVAL)}


def _resolve_schedule(text: str, choice: SamplerChoice) -> Sampler:
    schedule = parse_schedule(text, force=choice.force, consistent=choice.consistent)
    _check_options(choice, f"schedule {schedule}", "grid", "steps", "consistent")
    if choice.steps is not None and choice.steps != schedule.steps:
        raise RequestError(
            f"schedule {schedule} has {schedule.steps} steps, --steps is {choice.steps}", remedy="leave --steps out"
        )
    grid = _build_grid(choice, schedule.steps)
    if choice.backwards and schedule.needs_refiner:
        raise RequestError(
            f"schedule {schedule} backwards: refiners are trained towards data",
            remedy="use H and P blocks, or a solver such as heun or dopri5",
        )
    name = f"{schedule}{'-consistent' if choice.consistent else ''}{_format_grid(choice)}"
    return Sampler(name, tuple(plan_flowturbo(schedule, grid, choice.interval)), interval=choice.interval)


def _resolve_solver(name: str, choice: SamplerChoice) -> Sampler:
    if name not in SOLVER_NAMES:
        raise RequestError(f"solver {name!r}", allowed=", ".join(SOLVER_NAMES))
    if name in ADAPTIVE_SOLVERS:
        return _build_adaptive(choice, name, ADAPTIVE_SOLVERS[name])
    if name in STOCHASTIC_SOLVERS:
        _check_options(choice, f"solver {name}", "grid", "steps", "diffusion")
        if choice.backwards:
            raise RequestError(f"{name} backwards: noise cannot be taken back", remedy="use heun, ab2 or dopri5")
        stochastic, diffusion = STOCHASTIC_SOLVERS[name], choice.diffusion or Diffusion()
        grid = _build_grid(choice, stochastic.default_steps)
        plan = stochastic.plan(grid, diffusion)
        details = f"-{diffusion.form}-{diffusion.last_step}"
    else:
        _check_options(choice, f"solver {name}", "grid", "steps")
        solver, details = SOLVERS[name], ""
        if solver.has_own_grid and (choice.grid is not None or choice.backwards):
            raise RequestError(
                f"{'a time grid' if choice.grid is not None else 'backwards'} for {name}, which has its own times",
                remedy="leave it out, or use another solver",
            )
        grid = _build_grid(choice, solver.default_steps, solver.grid)
        plan = solver.plan(grid)
    guided_plan = tuple(replace(step, guided=choice.interval.is_active(step.t)) for step in plan)
    full_name = f"{name}-{len(grid) - 1}{details}{_format_grid(choice)}"
    return Sampler(full_name, guided_plan, interval=choice.interval)


def _build_adaptive(choice: SamplerChoice, name: str, solver: AdaptiveSolver) -> Sampler:
    allowed_options = (solver.parameter, *(() if solver.is_joint else ("max_nfe",)), "first_step")
    _check_options(choice, name, *allowed_options)
    if solver.is_joint and (choice.interval != FULL_INTERVAL or choice.backwards):
        raise RequestError(
            f"{name} with a guidance interval or backwards: it does what the reference's sampler does",
            remedy="use dopri5",
        )
    setting = getattr(choice, solver.parameter)
    setting = solver.default if setting is None else setting
    control = StepControl(
        max_nfe=MAX_NFE if choice.max_nfe is None else choice.max_nfe,
        first_step=choice.first_step,
        interval=choice.interval,
        backwards=choice.backwards,
    )
    is_tolerance = solver.parameter == "tolerance"
    control = replace(control, tolerance=setting) if is_tolerance else replace(control, constant=setting)
    solver.check_budget(control)
    return Sampler(f"{name}-{setting:g}", (), solver, control, choice.interval)


def _resolve_calibrated(calibrated: CalibratedSampler, choice: SamplerChoice) -> Sampler:
    allowed_options = {"adaptive": ("max_nfe", "first_step"), "schedule": ("consistent",), "table": ()}
    _check_options(choice, f"the saved sampler {calibrated.name}", *allowed_options[calibrated.kind])
    match calibrated.kind:
        case "adaptive":
            rule = calibrated.rule or ""
            if rule not in ADAPTIVE_RULES:
                raise RequestError(
                    f"the saved sampler {calibrated.name} has the rule {calibrated.rule!r}",
                    allowed=", ".join(ADAPTIVE_RULES),
                )
            is_tolerance = ADAPTIVE_RULES[rule].parameter == "tolerance"
            equivalent_choice = replace(
                choice,
                saved=None,
                adaptive=rule,
                tolerance=calibrated.setting if is_tolerance else None,
                constant=None if is_tolerance else calibrated.setting,
            )
        case "schedule":
            equivalent_choice = replace(choice, saved=None, schedule=calibrated.schedule, grid=calibrated.grid)
        case _:
            if choice.backwards:
                raise RequestError(
                    f"{calibrated.name} backwards: its table goes towards data", remedy="use heun, ab2 or dopri5"
                )
            plan = plan_multistep(calibrated.table, choice.interval)
            return Sampler(calibrated.name, tuple(plan), interval=choice.interval)
    return replace(resolve_sampler(equivalent_choice), name=calibrated.name)


_SOLVER_OPTIONS = ("grid", "steps", "tolerance", "constant", "max_nfe", "first_step", "diffusion", "consistent")


def _check_options(choice: SamplerChoice, sampler_name: str, *allowed: str) -> None:
    """Refuse options that the sampler does not read."""
    for name in _SOLVER_OPTIONS:
        if name not in allowed and getattr(choice, name) not in (None, False):
            option = "--" + name.replace("_", "-")
            allowed_text = (
                ", ".join("--" + option_name.replace("_", "-") for option_name in allowed) or "none of its own"
            )
            raise RequestError(f"{option} with {sampler_name}, which has no use for it", allowed=allowed_text)


def _build_grid(choice: SamplerChoice, default_steps: int, build: Callable[[int], Grid] = build_uniform_grid) -> Grid:
    """Return the times of a fixed sampler, from data to noise if backwards."""
    if choice.grid is None:
        grid = build(default_steps if choice.steps is None else choice.steps)
    elif isinstance(choice.grid, str):
        is_point_list = re.fullmatch(r"[-+0-9.eE,\s]+", choice.grid) is not None and "," in choice.grid
        steps = choice.grid.count(",") if is_point_list and choice.steps is None else choice.steps or default_steps
        grid = parse_grid(choice.grid, steps)
    else:
        grid = build_explicit_grid(choice.grid)
    return reverse_grid(grid) if choice.backwards else grid


def _format_grid(choice: SamplerChoice) -> str:
    if choice.grid is None:
        return "-backwards" if choice.backwards else ""
    grid_text = choice.grid if isinstance(choice.grid, str) and "," not in choice.grid else "own grid"
    return f" ({grid_text}{', backwards' if choice.backwards else ''})"
