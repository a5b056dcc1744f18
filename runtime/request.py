"""Check a request against what an engine directory can do, and complete it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast, get_type_hints

import numpy as np

from runtime.classes import resolve_class, resolve_mixture
from runtime.directory.records import Defaults, Manifest
from runtime.sampling.blocks import SCHEDULE_GRAMMAR, is_schedule
from runtime.sampling.calibrated import CalibratedSampler, check_calibrated_for, read_calibrated_sampler
from runtime.sampling.guidance import GuidanceInterval, ImageCondition, check_guidance_scale
from runtime.sampling.sampler import FLOWTURBO, Sampler, SamplerChoice, expand_sampler_name, resolve_sampler
from runtime.system.errors import RequestError
from runtime.system.option_fields import option, parse_numbers

if TYPE_CHECKING:
    from runtime.sampling.grids import Grid
    from runtime.sampling.sde import Diffusion

MAX_SEED = 2**63
REVERSE_SOLVER = "dopri5"
"""From data to noise by default: a way back is only worth as much as it is exact."""


class RequestOptions(TypedDict, total=False):
    """Keyword arguments of `Pipeline.request` and `Pipeline.generate`.

    Attributes:
        seeds: per image; 0, 1, 2 … by default. A picture depends on its seed alone.
        guidance: scale, one for all or one per image; 1 is none.
        guidance_channels: how many latent channels are guided, from the first on; the reference guides 3.
        guidance_interval: flow times from which and to which guidance acts; outside it an image costs one row.
        negative: a class to move away from, in place of the unconditional branch.
        vae: decoder variant.

        sampler: a name (blocks, a saved sampler, a solver or a rule), or a `SamplerChoice`; the directory's default if
            none is named here or by the other keywords, which are fields of `SamplerChoice`.
    """

    seeds: Sequence[int] | None
    guidance: float | Sequence[float] | None
    guidance_channels: int | None
    guidance_interval: tuple[float, float] | None
    negative: int | str | None
    vae: str | None
    sampler: str | SamplerChoice | None
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
    saved: CalibratedSampler | None
    force: bool


def parse_scales(name: str, text: str) -> float | tuple[float, ...]:
    """Return the one guidance scale, or one per image of "1,2.5"."""
    scales = parse_numbers(name, text)
    return scales[0] if len(scales) == 1 else tuple(scales)


@dataclass(frozen=True)
class GuidanceOptions:
    """How images are guided; see `RequestOptions`."""

    guidance: float | tuple[float, ...] | None = option(
        None,
        help="Guidance scale; 1 is none. One, or one per image separated by commas.",
        default_text="the directory's",
        parse=parse_scales,
    )
    guidance_channels: int | None = option(
        None, help="Latent channels that are guided: 3 as the reference, 4 for all.", advanced=True
    )
    negative: str | None = option(
        None, "--negative-class", help="A class to move away from, in place of the unconditional branch.", advanced=True
    )


def collect_keywords(sampler: SamplerChoice, guidance: GuidanceOptions) -> RequestOptions:
    """Return the keyword arguments of `Pipeline.request` that say what these do."""
    values = {
        field.name: value
        for options in (sampler, guidance)
        for field in fields(options)
        if (value := getattr(options, field.name)) != field.default
    }
    if (interval := values.pop("interval", None)) is not None:
        values["guidance_interval"] = (interval.start, interval.end)
    return cast(RequestOptions, values)


@dataclass(frozen=True)
class Request:
    """A request that is resolved and checked.

    Attributes:
        labels: per image; of a mixture, its first class.
        conditions: per image, what it is conditioned on.
        scales, seeds: per image.
        sampler: the evaluations.
        vae: decoder variant, None for latents only.
        guidance_channels: how many latent channels are guided, from the first on.
    """

    labels: tuple[int, ...]
    conditions: tuple[ImageCondition, ...]
    scales: tuple[float, ...]
    seeds: tuple[int, ...]
    sampler: Sampler
    vae: str | None
    guidance_channels: int


def resolve_request(manifest: Manifest, classes: int | str | Sequence[int | str], options: RequestOptions) -> Request:
    """Check and complete a request; the arguments are those of `Pipeline.request`.

    Raises:
        RequestError: something in it is not possible; the message says what is.
    """
    if unknown := sorted(set(options) - set(RequestOptions.__annotations__)):
        raise RequestError(f"option {unknown[0]!r}", allowed=", ".join(RequestOptions.__annotations__))
    seeds, guidance, negative = options.get("seeds"), options.get("guidance"), options.get("negative")
    names = _convert_to_list(classes)
    if not names:
        raise RequestError("no class", remedy="name at least one")
    mixtures = [resolve_mixture(name, manifest.model.classes) for name in names]
    image_seeds = (
        tuple(range(len(names)))
        if seeds is None
        else tuple(_convert_to_int("seed", seed) for seed in _convert_to_list(seeds))
    )
    guidance = manifest.defaults.guidance if guidance is None else guidance
    scales = _convert_to_list(guidance) * (len(names) if np.ndim(guidance) == 0 else 1)
    if len(image_seeds) != len(names) or len(scales) != len(names):
        raise RequestError(
            f"{len(names)} classes, {len(image_seeds)} seeds, {len(scales)} guidance scales", allowed="as many of each"
        )
    if invalid_seeds := [seed for seed in image_seeds if not 0 <= seed < MAX_SEED]:
        raise RequestError(f"seed {invalid_seeds[0]}", allowed="0 to 2^63 − 1")
    image_scales = tuple(check_guidance_scale(scale) for scale in scales)
    if negative is not None and all(scale == 1.0 for scale in image_scales):
        raise RequestError(
            f"negative class {negative!r} without guidance",
            remedy="name a guidance scale above 1: nothing moves away at 1",
        )
    if negative is None and manifest.model.label_dropout == 0 and any(scale != 1.0 for scale in image_scales):
        warnings.warn(
            f"guidance {max(image_scales):g}: the model was trained without label dropout, so the null label that "
            "guidance moves away from has not been learned; 1 is right for it",
            stacklevel=3,
        )
    if negative is None and not manifest.model.has_null_label and any(scale != 1.0 for scale in image_scales):
        raise RequestError(
            f"guidance {max(image_scales, key=abs):g} for a model without a null label",
            allowed="1: it was trained with classes only, so that there is no unguided prediction to move away from",
            remedy="--guidance 1, or name a class to move away from: --negative-class CLASS",
        )
    negative_label = manifest.model.null_label if negative is None else resolve_class(negative, manifest.model.classes)
    conditions = tuple(
        ImageCondition(mixture, scale, negative_label) for mixture, scale in zip(mixtures, image_scales, strict=True)
    )
    choice = expand_sampler_name(_build_choice(options), [calibrated.name for calibrated in manifest.samplers])
    choice = _apply_calibrated(manifest, _apply_default(manifest.defaults, choice))
    sampler = resolve_sampler(choice).with_refiner(manifest.model.refiner is not None)
    if sampler.needs_refiner and manifest.model.refiner is None:
        raise RequestError(
            f"schedule {sampler.name} needs a refiner, and this directory was built without one",
            allowed="schedules of H and P, or any solver",
            remedy="rebuild with --refiner FILE, or choose for example --solver searched --steps 8",
        )
    guided_channels, channels = options.get("guidance_channels"), manifest.model.channels
    if guided_channels is None:
        guided_channels = manifest.defaults.guidance_channels
    guided_channels = _convert_to_int("guidance channels", guided_channels)
    if not 1 <= guided_channels <= channels:
        raise RequestError(
            f"guidance on {guided_channels} channels", allowed=f"1 to {channels} (all); 3 is the reference's habit"
        )
    if choice.saved is not None:
        _warn_guidance_differs(choice.saved, image_scales, guided_channels, sampler.interval)
    _check_batch_fits(manifest, conditions, sampler)
    return Request(
        labels=tuple(mixture[0][0] for mixture in mixtures),
        conditions=conditions,
        scales=image_scales,
        seeds=image_seeds,
        sampler=sampler,
        vae=resolve_vae(manifest, options.get("vae")),
        guidance_channels=guided_channels,
    )


def _warn_guidance_differs(
    sampler: CalibratedSampler, scales: Sequence[float], channels: int, interval: GuidanceInterval
) -> None:
    """A sampler is as good as it was measured to be under the guidance that it was measured with."""
    calibrated = sampler.guidance
    requested = {"channels": channels, "interval": [interval.start, interval.end]}
    differences = [
        f"{name} {calibrated[name]}" for name, value in requested.items() if calibrated.get(name, value) != value
    ]
    if any(scale != calibrated.get("scale", scale) for scale in scales):
        differences.insert(0, f"scale {calibrated['scale']:g}")
    if differences:
        warnings.warn(f"{sampler.name} was calibrated for guidance {', '.join(differences)}", stacklevel=4)


def _build_choice(options: RequestOptions) -> SamplerChoice:
    sampler = options.get("sampler")
    choice = sampler if isinstance(sampler, SamplerChoice) else SamplerChoice()
    values: dict[str, object] = {}
    for name, convert in _list_choice_converters().items():
        value = options.get(name)
        if value is not None and value is not choice:
            values[name] = convert(name, value)
    interval = options.get("guidance_interval")
    if interval is not None:
        if np.ndim(interval) != 1 or len(interval) != 2:
            raise RequestError(f"guidance interval {interval!r}", allowed="two rising flow times from 0 to 1")
        values["interval"] = GuidanceInterval(*(_convert_to_float("guidance interval", edge) for edge in interval))
    return replace(choice, **values)  # type: ignore[arg-type]  # the converters know the fields


@cache
def _list_choice_converters() -> dict[str, Callable[[str, Any], object]]:
    """What checks the type of every field of `SamplerChoice`, by the field's annotation."""
    converters: dict[Any, Callable[[str, Any], object]] = {
        int | None: _convert_to_int,
        float | None: _convert_to_float,
        str | None: _check_name,
    }
    return {
        name: converters.get(hint, lambda name, value: value) for name, hint in get_type_hints(SamplerChoice).items()
    }


def _check_name(option: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{option} {value!r}", allowed="a name")
    return value


def _check_batch_fits(manifest: Manifest, conditions: Sequence[ImageCondition], sampler: Sampler) -> None:
    """Check that one image at least fits the engines' batch: images up to max-batch, rows up to twice as many."""
    is_joint = sampler.adaptive_solver is not None and sampler.adaptive_solver.is_joint
    rows = (sum if is_joint else max)(image.count_branches(guided=True) for image in conditions)
    is_static_conflict = manifest.static_batch and (
        is_joint or any(len(image.weighted_labels) > 1 for image in conditions)
    )
    if is_static_conflict or rows > (manifest.max_batch if is_joint else 2 * manifest.max_batch):
        row_owner = "both branches of all images, under one norm" if is_joint else "an image: its classes and guidance"
        raise RequestError(
            f"{rows} rows ({row_owner}) with engines of "
            f"{'a fixed batch' if is_static_conflict else f'at most {manifest.max_batch}'}",
            allowed="twice the engines' --max-batch for one image; of dopri5-reference, --max-batch for all images "
            "together; no mixtures and no dopri5-reference with --static-batch",
            remedy="build with a larger --max-batch and without --static-batch, or use --guidance 1, or dopri5",
        )


def resolve_vae(manifest: Manifest, vae: str | None) -> str | None:
    """Return the decoder variant that was asked for, or the default one; None where there is no decoder."""
    if vae is None:
        return manifest.defaults.vae
    if vae not in manifest.vaes:
        raise RequestError(
            f"VAE {vae!r}", allowed=", ".join(manifest.vaes) or "none: built with --vae none (latents only)"
        )
    return vae


def _apply_default(defaults: Defaults, choice: SamplerChoice) -> SamplerChoice:
    """The directory's own sampler where the user named neither a schedule nor another solver nor a rule."""
    if choice.schedule is not None or choice.solver not in (None, FLOWTURBO) or choice.adaptive is not None:
        return choice
    if choice.backwards and choice.solver is None:
        return replace(choice, solver=REVERSE_SOLVER)
    if choice.solver == FLOWTURBO and defaults.schedule is None:
        raise RequestError("solver flowturbo without a schedule", remedy="name one, for example --schedule H2P6")
    if choice.steps is not None and defaults.schedule is not None:
        raise RequestError(
            f"{choice.steps} steps without a solver: a schedule's steps are its blocks",
            remedy=f"name a solver (--solver heun --steps {choice.steps}) or a schedule with {choice.steps} blocks",
        )
    steps = defaults.steps if choice.steps is None else choice.steps
    return replace(choice, schedule=defaults.schedule, solver=defaults.solver, steps=steps)


def _apply_calibrated(manifest: Manifest, choice: SamplerChoice) -> SamplerChoice:
    """A schedule that is none of H, P and R names a calibrated sampler: of the directory, or a file."""
    name = choice.schedule
    if name is None or is_schedule(name):
        return choice
    samplers_by_name = {sampler.name: sampler for sampler in manifest.samplers}
    if name not in samplers_by_name and not name.endswith(".json"):
        raise RequestError(
            f"schedule {name!r}",
            allowed=f"{SCHEDULE_GRAMMAR}; a saved sampler of this directory "
            f"({', '.join(samplers_by_name) or 'it has none'}); "
            "or a .json file of flowturbo-calibrate",
        )
    sampler = samplers_by_name.get(name) or read_calibrated_sampler(Path(name))
    if not choice.force:
        check_calibrated_for(sampler, manifest.model.sources)
    return replace(choice, schedule=None, saved=sampler)


def _convert_to_list(value: Any) -> list[Any]:
    """One thing, or several in any sequence or array, as a list."""
    return [value] if isinstance(value, str) or np.ndim(value) == 0 else list(value)


def _convert_to_float(option: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise RequestError(f"{option} {value!r}", allowed="a number")
    return float(value)


def _convert_to_int(option: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise RequestError(f"{option} {value!r}", allowed="a whole number") from error
