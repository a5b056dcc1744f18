"""What was asked, resolved against what an engine directory can do."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.classes import resolve_class
from runtime.errors import RequestError
from runtime.guidance import check_scale
from runtime.manifest import Defaults, Manifest
from runtime.solvers import FLOWTURBO, Sampler, resolve_sampler

MAX_SEED = 2**63


@dataclass(frozen=True)
class Request:
    """What to make, resolved and checked.

    Attributes:
        labels, scales, seeds: per image.
        sampler: the evaluations.
        vae: decoder variant, None for latents only.
        guidance_channels: the first so many latent channels are guided.
    """

    labels: tuple[int, ...]
    scales: tuple[float, ...]
    seeds: tuple[int, ...]
    sampler: Sampler
    vae: str | None
    guidance_channels: int


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler as users name it: a schedule, or a solver with steps, or nothing for the directory's default.

    `force` allows block orders that are known to fail.
    """

    schedule: str | None = None
    solver: str | None = None
    steps: int | None = None
    force: bool = False


def resolve_request(
    manifest: Manifest,
    classes: int | str | Sequence[int | str],
    *,
    seeds: Sequence[int] | None = None,
    guidance: float | Sequence[float] | None = None,
    guidance_channels: int | None = None,
    sampler: SamplerChoice,
    vae: str | None = None,
) -> Request:
    """Checks and completes a request; the arguments are those of `Pipeline.generate`.

    Raises:
        RequestError: something in it is not possible; the message says what is.
    """
    names = _listed(classes)
    if not names:
        raise RequestError("no class", remedy="name at least one")
    labels = tuple(resolve_class(name, manifest.model.classes) for name in names)
    drawn = tuple(range(len(labels))) if seeds is None else tuple(_whole("seed", seed) for seed in _listed(seeds))
    guidance = manifest.defaults.guidance if guidance is None else guidance
    scales = _listed(guidance) * (len(labels) if np.ndim(guidance) == 0 else 1)
    if len(drawn) != len(labels) or len(scales) != len(labels):
        raise RequestError(
            f"{len(labels)} classes, {len(drawn)} seeds, {len(scales)} guidance scales", allowed="as many of each"
        )
    if impossible := [seed for seed in drawn if not 0 <= seed < MAX_SEED]:
        raise RequestError(f"seed {impossible[0]}", allowed="0 to 2^63 − 1")
    return Request(
        labels=labels,
        scales=tuple(check_scale(scale) for scale in scales),
        seeds=drawn,
        sampler=_sampler(manifest, sampler),
        vae=variant_of(manifest, vae),
        guidance_channels=_guided_channels(manifest, guidance_channels),
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
    steps = None if choice.steps is None else _whole("steps", choice.steps)
    schedule, solver = choice.schedule, choice.solver
    if schedule is None and solver in (None, FLOWTURBO):
        schedule, solver, steps = _default_sampler(manifest.defaults, solver, steps)
    sampler = resolve_sampler(schedule, solver, steps, force=choice.force)
    if sampler.needs_refiner and manifest.model.refiner is None:
        raise RequestError(
            f"schedule {sampler.name} needs a refiner, and this directory was built without one",
            allowed="schedules of H and P, or any solver",
            remedy="rebuild with --refiner FILE, or choose for example --solver searched --steps 8",
        )
    return sampler


def _default_sampler(
    defaults: Defaults, solver: str | None, steps: int | None
) -> tuple[str | None, str | None, int | None]:
    """Schedule, solver and steps where the user named neither a schedule nor another solver."""
    if solver == FLOWTURBO and defaults.schedule is None:
        raise RequestError("solver flowturbo without a schedule", remedy="name one, for example --schedule H2P6")
    if steps is not None and defaults.schedule is not None:
        raise RequestError(
            f"{steps} steps without a solver: a schedule's steps are its blocks",
            remedy=f"name a solver (--solver heun --steps {steps}) or a schedule with {steps} blocks",
        )
    return defaults.schedule, defaults.solver, defaults.steps if steps is None else steps


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


def _whole(what: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise RequestError(f"{what} {value!r}", allowed="a whole number") from error
