"""What was asked, resolved against what an engine directory can do."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from runtime.classes import resolve_class, resolve_mixture
from runtime.directory.manifest import Defaults, Manifest
from runtime.sampling.blocks import GRAMMAR, is_schedule
from runtime.sampling.calibrated import SavedSampler, check_model, read_saved
from runtime.sampling.guidance import Branches, Interval, check_scale
from runtime.sampling.sampler import FLOWTURBO, Sampler, SamplerChoice, resolve_sampler
from runtime.system.errors import RequestError

if TYPE_CHECKING:
    from runtime.sampling.grids import Grid
    from runtime.sampling.sde import Diffusion

MAX_SEED = 2**63
WAY_BACK = "dopri5"
"""From data to noise by default: a way back is only worth as much as it is exact."""


class RequestOptions(TypedDict, total=False):
    """Keyword arguments of `Pipeline.request` and `Pipeline.generate`.

    Attributes:
        seeds: per image; 0, 1, 2 … by default. A picture depends on its seed alone.
        guidance: scale, one for all or one per image; 1 is none.
        guidance_channels: the first so many latent channels are guided; 3 is the reference's habit.
        guidance_interval: flow times from which and to which guidance acts; outside it an image costs one row.
        negative: a class to move away from, in place of the unconditional branch.
        vae: decoder variant.

    The others name the sampler and are fields of `SamplerChoice`; the directory's default if none is.
    """

    seeds: Sequence[int] | None
    guidance: float | Sequence[float] | None
    guidance_channels: int | None
    guidance_interval: tuple[float, float] | None
    negative: int | str | None
    vae: str | None
    schedule: str | None
    solver: str | None
    steps: int | None
    grid: Grid | str | None
    adaptive: str | None
    tolerance: float | None
    constant: float | None
    max_nfe: int | None
    first_step: float | None
    diffusion: Diffusion | None
    consistent: bool
    backwards: bool
    saved: SavedSampler | None
    force: bool


@dataclass(frozen=True)
class Request:
    """What to make, resolved and checked.

    Attributes:
        labels: per image; of a mixture, its first class.
        branches: per image, what it is conditioned on.
        scales, seeds: per image.
        sampler: the evaluations.
        vae: decoder variant, None for latents only.
        guidance_channels: the first so many latent channels are guided.
    """

    labels: tuple[int, ...]
    branches: tuple[Branches, ...]
    scales: tuple[float, ...]
    seeds: tuple[int, ...]
    sampler: Sampler
    vae: str | None
    guidance_channels: int


def resolve_request(manifest: Manifest, classes: int | str | Sequence[int | str], options: RequestOptions) -> Request:
    """Checks and completes a request; the arguments are those of `Pipeline.request`.

    Raises:
        RequestError: something in it is not possible; the message says what is.
    """
    if unknown := sorted(set(options) - set(RequestOptions.__annotations__)):
        raise RequestError(f"option {unknown[0]!r}", allowed=", ".join(RequestOptions.__annotations__))
    seeds, guidance, negative = options.get("seeds"), options.get("guidance"), options.get("negative")
    names = _listed(classes)
    if not names:
        raise RequestError("no class", remedy="name at least one")
    mixtures = [resolve_mixture(name, manifest.model.classes) for name in names]
    drawn = tuple(range(len(names))) if seeds is None else tuple(_whole("seed", seed) for seed in _listed(seeds))
    guidance = manifest.defaults.guidance if guidance is None else guidance
    scales = _listed(guidance) * (len(names) if np.ndim(guidance) == 0 else 1)
    if len(drawn) != len(names) or len(scales) != len(names):
        raise RequestError(
            f"{len(names)} classes, {len(drawn)} seeds, {len(scales)} guidance scales", allowed="as many of each"
        )
    if impossible := [seed for seed in drawn if not 0 <= seed < MAX_SEED]:
        raise RequestError(f"seed {impossible[0]}", allowed="0 to 2^63 − 1")
    checked = tuple(check_scale(scale) for scale in scales)
    if negative is not None and all(scale == 1.0 for scale in checked):
        raise RequestError(
            f"negative class {negative!r} without guidance",
            remedy="name a guidance scale above 1: nothing moves away at 1",
        )
    other = manifest.model.null_label if negative is None else resolve_class(negative, manifest.model.classes)
    branches = tuple(Branches(mixture, scale, other) for mixture, scale in zip(mixtures, checked, strict=True))
    choice = _with_saved(manifest, _with_default(manifest.defaults, _choice(options)))
    resolved = _sampler(manifest, choice)
    channels = _guided_channels(manifest, options.get("guidance_channels"))
    if choice.saved is not None:
        _warn_of_other_guidance(choice.saved, checked, channels, resolved.interval)
    _check_fits(manifest, branches, resolved)
    return Request(
        labels=tuple(mixture[0][0] for mixture in mixtures),
        branches=branches,
        scales=checked,
        seeds=drawn,
        sampler=resolved,
        vae=variant_of(manifest, options.get("vae")),
        guidance_channels=channels,
    )


def _warn_of_other_guidance(saved: SavedSampler, scales: Sequence[float], channels: int, interval: Interval) -> None:
    """A sampler is as good as it was measured to be under the guidance that it was measured with."""
    was = saved.guidance
    asked = {"channels": channels, "interval": [interval.start, interval.end]}
    differs = [f"{name} {was[name]}" for name, value in asked.items() if was.get(name, value) != value]
    if any(scale != was.get("scale", scale) for scale in scales):
        differs.insert(0, f"scale {was['scale']:g}")
    if differs:
        warnings.warn(f"{saved.name} was calibrated for guidance {', '.join(differs)}", stacklevel=4)


def _choice(options: RequestOptions) -> SamplerChoice:
    named: dict[str, Any] = {name: options[name] for name in SamplerChoice.__dataclass_fields__ if name in options}  # type: ignore[literal-required]
    interval = options.get("guidance_interval")
    if interval is not None:
        if np.ndim(interval) != 1 or len(interval) != 2:
            raise RequestError(f"guidance interval {interval!r}", allowed="two rising flow times from 0 to 1")
        named["interval"] = Interval(*(_number("guidance interval", edge) for edge in interval))
    for name in ("steps", "max_nfe"):
        if named.get(name) is not None:
            named[name] = _whole(name, named[name])
    for name in ("tolerance", "constant", "first_step"):
        if named.get(name) is not None:
            named[name] = _number(name, named[name])
    for name in ("schedule", "solver", "adaptive"):
        if not isinstance(named.get(name), str | None):
            raise RequestError(f"{name} {named[name]!r}", allowed="a name")
    return SamplerChoice(**named)


def _check_fits(manifest: Manifest, branches: Sequence[Branches], sampler: Sampler) -> None:
    """Whether one image at least fits the engines' batch: images up to max-batch, rows up to twice as many."""
    joint = sampler.rule is not None and sampler.rule.joint
    rows = (sum if joint else max)(image.rows(guided=True) for image in branches)
    static = manifest.static_batch and (joint or any(len(image.labels) > 1 for image in branches))
    if static or rows > (manifest.max_batch if joint else 2 * manifest.max_batch):
        what = "both branches of all images, under one norm" if joint else "an image: its classes and guidance"
        raise RequestError(
            f"{rows} rows ({what}) with engines of {'a fixed batch' if static else f'at most {manifest.max_batch}'}",
            allowed="twice the engines' --max-batch for one image; of dopri5-reference, --max-batch for all images "
            "together; no mixtures and no dopri5-reference with --static-batch",
            remedy="build with a larger --max-batch and without --static-batch, or use --guidance 1, or dopri5",
        )


def variant_of(manifest: Manifest, vae: str | None) -> str | None:
    """The asked decoder variant, or the default one; None where there is no decoder."""
    if vae is None:
        return manifest.defaults.vae
    if vae not in manifest.vaes:
        raise RequestError(
            f"VAE {vae!r}", allowed=", ".join(manifest.vaes) or "none: built with --vae none (latents only)"
        )
    return vae


def _sampler(manifest: Manifest, choice: SamplerChoice) -> Sampler:
    sampler = resolve_sampler(choice).with_refiner(manifest.model.refiner is not None)
    if sampler.needs_refiner and manifest.model.refiner is None:
        raise RequestError(
            f"schedule {sampler.name} needs a refiner, and this directory was built without one",
            allowed="schedules of H and P, or any solver",
            remedy="rebuild with --refiner FILE, or choose for example --solver searched --steps 8",
        )
    return sampler


def _with_default(defaults: Defaults, choice: SamplerChoice) -> SamplerChoice:
    """The directory's own sampler where the user named neither a schedule nor another solver nor a rule."""
    if choice.schedule is not None or choice.solver not in (None, FLOWTURBO) or choice.adaptive is not None:
        return choice
    if choice.backwards and choice.solver is None:
        return replace(choice, solver=WAY_BACK)
    if choice.solver == FLOWTURBO and defaults.schedule is None:
        raise RequestError("solver flowturbo without a schedule", remedy="name one, for example --schedule H2P6")
    if choice.steps is not None and defaults.schedule is not None:
        raise RequestError(
            f"{choice.steps} steps without a solver: a schedule's steps are its blocks",
            remedy=f"name a solver (--solver heun --steps {choice.steps}) or a schedule with {choice.steps} blocks",
        )
    steps = defaults.steps if choice.steps is None else choice.steps
    return replace(choice, schedule=defaults.schedule, solver=defaults.solver, steps=steps)


def _with_saved(manifest: Manifest, choice: SamplerChoice) -> SamplerChoice:
    """A schedule that is none of H, P and R names a calibrated sampler: of the directory, or a file."""
    name = choice.schedule
    if name is None or is_schedule(name):
        return choice
    known = {saved.name: saved for saved in manifest.samplers}
    if name not in known and not name.endswith(".json"):
        raise RequestError(
            f"schedule {name!r}",
            allowed=f"{GRAMMAR}; a saved sampler of this directory ({', '.join(known) or 'it has none'}); "
            "or a .json file of flowturbo-calibrate",
        )
    saved = known.get(name) or read_saved(Path(name))
    if not choice.force:
        check_model(saved, manifest.model.sources)
    return replace(choice, schedule=None, saved=saved)


def _guided_channels(manifest: Manifest, channels: int | None) -> int:
    channels = manifest.defaults.guidance_channels if channels is None else _whole("guidance channels", channels)
    if not 1 <= channels <= manifest.model.channels:
        raise RequestError(
            f"guidance on {channels} channels",
            allowed=f"1 to {manifest.model.channels} (all); 3 is the reference's habit",
        )
    return channels


def _listed(value: Any) -> list[Any]:
    """One thing, or several in any sequence or array, as a list."""
    return [value] if isinstance(value, str) or np.ndim(value) == 0 else list(value)


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise RequestError(f"{what} {value!r}", allowed="a number")
    return float(value)


def _whole(what: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise RequestError(f"{what} {value!r}", allowed="a whole number") from error
