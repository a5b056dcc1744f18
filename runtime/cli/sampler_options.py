"""Options of every command that samples: which sampler, which guidance, which backend. Spelt once."""

from __future__ import annotations

from typing import Any

import click

from runtime.backends import BACKENDS
from runtime.backends.onnxruntime import PROVIDERS
from runtime.cli.command_base import F, combine_options
from runtime.request import RequestOptions
from runtime.sampling.grids import GRID_SYNTAX
from runtime.sampling.sampler import SOLVER_NAMES
from runtime.sampling.sde import DIFFUSION_FORMS, LAST_STEPS, Diffusion
from runtime.sampling.solvers import ADAPTIVE_RULES
from runtime.system.errors import RequestError

_DIFFUSION_OPTIONS = ("diffusion", "diffusion_norm", "last_step", "last_step_size")


_SCHEDULE_HELP = (
    "FlowTurbo blocks such as H1P5R3, or a saved sampler: a name of the directory's (flowturbo-export inspect) or a "
    ".json file.  [default: the directory's]"
)
_ADAPTIVE_HELP = (
    "Steps that every image chooses for itself: by the velocity's size, by the local error, or trying the cheapest "
    "block first."
)
_GUIDANCE_HELP = "Guidance scale; 1 is none. One, or one per image separated by commas.  [default: the directory's]"


def sampler_options(function: F) -> F:
    """Which sampler; `parse_request_options` takes them out of the command's arguments."""
    return _build_sampler_options(function, is_repeatable=False)


def repeatable_sampler_options(function: F) -> F:
    """The same for commands that compare: --schedule and --solver may be repeated, and arrive as tuples."""
    return _build_sampler_options(function, is_repeatable=True)


def _build_sampler_options(function: F, is_repeatable: bool) -> F:
    option, repeat_help = click.option, " May be repeated." if is_repeatable else ""
    solvers = click.Choice(SOLVER_NAMES)
    return combine_options(
        option("--schedule", multiple=is_repeatable, help=_SCHEDULE_HELP + repeat_help),
        option("--solver", multiple=is_repeatable, type=solvers, help="A solver in place of a schedule." + repeat_help),
        option("--steps", type=click.IntRange(1, 1000), help="Steps of the solver (never grid points)."),
        option("--grid", help=f"Times of the steps: {GRID_SYNTAX}.  [default: uniform, or the solver's own]"),
        option("--adaptive", type=click.Choice(list(ADAPTIVE_RULES)), help=_ADAPTIVE_HELP),
        option("--tolerance", type=float, help="Of adaptive steps and dopri5.  [default: 0.01; dopri5 0.001]"),
        option("--constant", type=float, help="C of --adaptive norm: steps are C / rms(v).  [default: 0.125]"),
        option("--max-nfe", type=click.IntRange(1), help="Evaluations an image may take.  [default: 1000]"),
        option("--first-step", type=float, help="Length of the first adaptive step tried.  [default: chosen]"),
        option("--diffusion", type=click.Choice(list(DIFFUSION_FORMS)), help="Of the sde solvers.  [default: sigma]"),
        option("--diffusion-norm", type=float, help="Its size.  [default: 1]"),
        option("--last-step", type=click.Choice(LAST_STEPS), help="Of the sde solvers.  [default: mean]"),
        option("--last-step-size", type=float, help="Its length.  [default: 0.04]"),
        option("--consistent", is_flag=True, help="R blocks whose second call reads their first velocity."),
        option("--guidance", help=_GUIDANCE_HELP),
        option("--guidance-channels", type=int, help="Latent channels that are guided: 3 as the reference, 4 for all."),
        option("--guidance-interval", help="Flow times A,B between which guidance acts.  [default: 0,1]"),
        option("--negative-class", help="A class to move away from, in place of the unconditional branch."),
        option("--force", is_flag=True, help="Allow what is known to fail, and samplers saved for another model."),
    )(function)


def backend_options(function: F) -> F:
    """What runs the engines, as `Pipeline.load` takes it."""
    return combine_options(
        click.option("--resolution", type=int, help="Pixels a side; must have been built.  [default: the first built]"),
        runner_options,
    )(function)


def runner_options(function: F) -> F:
    """The same without a resolution."""
    return combine_options(
        click.option("--backend", type=click.Choice(list(BACKENDS)), help="[default: the fastest that can run here]"),
        click.option("--provider", type=click.Choice(list(PROVIDERS)), help="ONNX Runtime execution provider."),
        click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: physical cores]"),
        click.option("--allow-fallback", is_flag=True, help="Accept a slower provider than the one asked for."),
        click.option("--allow-foreign", is_flag=True, help="Try engines that another device or release built."),
    )(function)


def parse_request_options(arguments: dict[str, Any], images: int) -> RequestOptions:
    """The keyword arguments of `Pipeline.request` for `images` images, taken out of a command's `arguments`.

    Raises:
        RequestError: a list that is none, or of another length.
    """
    values: dict[str, Any] = {
        name: arguments.pop(name)
        for name in (
            *("schedule", "solver", "steps", "grid", "adaptive", "tolerance", "constant", "max_nfe", "first_step"),
            *("consistent", "guidance_channels", "force"),
        )
    }
    diffusion = {name: arguments.pop(name) for name in _DIFFUSION_OPTIONS}
    if any(value is not None for value in diffusion.values()):
        fields = ("form", "norm", "last_step", "last_step_size")
        diffusion_fields = dict(zip(fields, diffusion.values(), strict=True))
        values["diffusion"] = Diffusion(
            **{name: value for name, value in diffusion_fields.items() if value is not None}
        )
    values["negative"] = arguments.pop("negative_class")
    interval = arguments.pop("guidance_interval")
    if interval is not None:
        start, end = parse_numbers("--guidance-interval", interval, 2)
        values["guidance_interval"] = (start, end)
    guidance = arguments.pop("guidance")
    if guidance is not None:
        scales = parse_numbers("--guidance", guidance, None)
        if len(scales) not in (1, images):
            raise RequestError(f"{len(scales)} guidance scales", allowed=f"1, or one per image ({images})")
        values["guidance"] = scales[0] if len(scales) == 1 else scales
    options: RequestOptions = {name: value for name, value in values.items() if value is not None}  # type: ignore[assignment]
    return options


def parse_numbers(option: str, text: str, count: int | None) -> list[float]:
    """Numbers separated by commas.

    Raises:
        RequestError: something else, or not `count` of them.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or (count is not None and len(values) != count):
        raise RequestError(f"{option} {text!r}", allowed=f"{count or 'one or more'} numbers, separated by commas")
    return values


class _TileType(click.ParamType):  # type: ignore[type-arg]  # generic in click's newest releases only
    """Pixels, "auto", or "none" (None)."""

    name = "auto|none|px"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "none":
            return None
        if value == "auto" or isinstance(value, int):
            return value
        if not value.isdecimal():
            self.fail(f"{value!r} is not auto, none, or a number of pixels", param, ctx)
        return int(value)


TILE = _TileType()
