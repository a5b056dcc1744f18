"""From checkpoints to a saved table: loads the networks as a build does, searches, keeps the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calibration.plot import plot_search
from calibration.samplers.probe import Guidance
from calibration.samplers.result_files import check_result, keep
from calibration.samplers.table_search import Found, Networks, SearchConfig, search
from export.build_request import BuildRequest, resolve_request
from export.trace import Model, classes_of, load_model
from flowturbo.checkpoints import resized
from flowturbo.evaluation.quality.array_cache import digest
from flowturbo.plotting import check_matplotlib
from runtime.directory.manifest import Manifest, read_manifest
from runtime.sampling.calibrated import SCHEMA, SavedSampler, check_model
from runtime.sampling.grids import from_steps
from runtime.system.errors import RequestError
from runtime.system.version import VERSION


@dataclass(frozen=True)
class Wanted:
    """Which model a table is searched for, and how it will be guided; the demo where no predictor is named."""

    predictor: Path | None
    refiner: Path | None
    heads: int | None
    resolution: int | None
    guidance: Guidance
    time_direction: str | None = None


def find(
    engines: Path | None,
    wanted: Wanted,
    options: Mapping[str, Any],
    name: str | None,
    out: Path | None,
    *,
    restart: bool,
    install: bool,
    command: str,
    say: Callable[[str], None],
) -> SavedSampler:
    """Searches a table with `options` of `SearchConfig` and keeps it under `name`.

    Raises:
        RequestError: refiner evaluations without a refiner, or engines of another model.
    """
    check_matplotlib("calibrate")
    check_result(name, out)
    request = _request(wanted)
    if options["refiner_nfe"] and request.refiner is None:
        raise RequestError("refiner evaluations without a refiner", remedy="name one: --refiner FILE")
    roles = ("predictor", "refiner") if options["refiner_nfe"] else ("predictor",)
    called = name or f"tuned-{options['nfe']}" + (f"+{options['refiner_nfe']}R" if options["refiner_nfe"] else "")
    begun = SavedSampler(
        SCHEMA, called, "table", {role: request.inputs[role] for role in roles}, command=command, flowturbo=VERSION
    )
    manifest = None if engines is None else read_manifest(engines)
    if manifest is not None:
        check_model(begun, manifest.model.sources)
    model = load_model(request)
    config = SearchConfig(**options, **resolved_guidance(wanted.guidance, model))
    path = out or Path(f"{called}.json")
    partial = path.with_suffix(".partial.npz")
    networks = networks_of(model, wanted, manifest)
    side = networks.predictor.config.latent_size
    key = digest([request.inputs["predictor"], request.inputs.get("refiner"), as_loaded(request), side, VERSION])
    found = search(networks, config, partial, say, model=key, resume=not restart)
    plot_search(path.with_suffix(".png"), found.history, found.before, found.after)
    if found.after >= found.before:
        say(f"the table that it began with is the better one on held-out seeds, and is kept ({found.before:.4f})")
    saved = _with_table(begun, found, config)
    keep(saved, path, engines if install else None, say)
    partial.unlink(missing_ok=True)
    return saved


def _request(wanted: Wanted) -> BuildRequest:
    return resolve_request(
        predictor=wanted.predictor,
        refiner=None if wanted.refiner is None else str(wanted.refiner),
        vaes=("none",),  # nothing is decoded
        heads=wanted.heads,
        time_direction=wanted.time_direction,
        targets=("cpu",),
    )


def as_loaded(request: BuildRequest) -> dict[str, str]:
    """What measurements depend on beside the networks' weights: how these are read, and the decoders."""
    inputs = request.inputs
    return {name: inputs[name] for name in inputs if name.startswith(("vae", "heads", "time direction"))}


def resolved_guidance(guidance: Guidance, model: Model) -> dict[str, Any]:
    """As asked, or as the model's own files say."""
    defaults = model.defaults()
    return {
        "guidance": defaults.guidance if guidance.scale is None else guidance.scale,
        "channels": defaults.guidance_channels if guidance.channels is None else guidance.channels,
        "interval": guidance.interval,
    }


def networks_of(model: Model, wanted: Wanted, manifest: Manifest | None) -> Networks:
    """At the resolution asked for, or the directory's first, or the one that the predictor was trained at."""
    factor = model.factor if manifest is None else manifest.model.factor
    pixels = wanted.resolution or (0 if manifest is None else manifest.resolutions[0])
    config = model.predictor.model.config
    side = pixels // factor or config.latent_size
    if pixels % factor or side % config.patch:
        raise RequestError(
            f"resolution {pixels}", allowed=f"multiples of {factor * config.patch} ({factor} pixels per latent)"
        )
    loaded = [network for network in (model.predictor, model.refiner) if network is not None]
    predictor, *refiner = [resized(network.model, side).eval().requires_grad_(False) for network in loaded]
    return Networks(predictor, refiner[0] if refiner else None, sorted(classes_of(model.predictor)))


def _with_table(saved: SavedSampler, found: Found, config: SearchConfig) -> SavedSampler:
    measured = {
        "held_out": {"error": min(found.after, found.before), "images": config.images},
        "began_with": {"error": found.before, "images": config.images},
        "search": asdict(config) | {"interval": list(config.interval)},
    }
    return replace(
        saved,
        grid=from_steps(found.kept.steps),
        rows=found.kept.rows,
        refiner=found.kept.refiner,
        guidance={"scale": config.guidance, "channels": config.channels, "interval": list(config.interval)},
        measured=measured,
    )
