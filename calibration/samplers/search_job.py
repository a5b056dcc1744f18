"""From checkpoints to a saved table: loads the networks as a build does, searches, keeps the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calibration.plot import plot_search
from calibration.samplers.probe import Guidance
from calibration.samplers.result_files import check_sampler_output, store_sampler
from calibration.samplers.table_search import NetworkSet, SearchConfig, TableSearchResult, search_table
from export.build_request import BuildRequest, resolve_request
from export.model import CheckpointModel, load_model, read_classes
from flowturbo.checkpoints import resize_network
from flowturbo.evaluation.quality.array_cache import hash_json
from flowturbo.plotting import check_matplotlib
from runtime.directory.manifest import read_manifest
from runtime.directory.records import Manifest
from runtime.sampling.calibrated import SAMPLER_SCHEMA, CalibratedSampler, check_calibrated_for
from runtime.sampling.grids import build_grid_from_steps
from runtime.system.errors import RequestError
from runtime.system.version import VERSION


@dataclass(frozen=True)
class ModelSpec:
    """Which model a table is searched for, and how it will be guided; the demo where no predictor is named."""

    predictor: Path | None
    refiner: Path | None
    heads: int | None
    resolution: int | None
    guidance: Guidance
    time_direction: str | None = None


def calibrate_table(
    engines: Path | None,
    model_spec: ModelSpec,
    options: Mapping[str, Any],
    name: str | None,
    out: Path | None,
    *,
    restart: bool,
    install: bool,
    command: str,
    say: Callable[[str], None],
) -> CalibratedSampler:
    """Searches a table with `options` of `SearchConfig` and keeps it under `name`.

    Raises:
        RequestError: refiner evaluations without a refiner, or engines of another model.
    """
    check_matplotlib("calibrate")
    check_sampler_output(name, out)
    request = _resolve_build(model_spec)
    if options["refiner_nfe"] and request.refiner is None:
        raise RequestError("refiner evaluations without a refiner", remedy="name one: --refiner FILE")
    roles = ("predictor", "refiner") if options["refiner_nfe"] else ("predictor",)
    sampler_name = name or f"tuned-{options['nfe']}" + (f"+{options['refiner_nfe']}R" if options["refiner_nfe"] else "")
    draft = CalibratedSampler(
        SAMPLER_SCHEMA,
        sampler_name,
        "table",
        {role: request.inputs[role] for role in roles},
        command=command,
        flowturbo=VERSION,
    )
    manifest = None if engines is None else read_manifest(engines)
    if manifest is not None:
        check_calibrated_for(draft, manifest.model.sources)
    model = load_model(request)
    config = SearchConfig(**options, **resolve_guidance(model_spec.guidance, model))
    path = out or Path(f"{sampler_name}.json")
    partial = path.with_suffix(".partial.npz")
    networks = resize_networks(model, model_spec, manifest)
    side = networks.predictor.config.latent_size
    key = hash_json(
        [request.inputs["predictor"], request.inputs.get("refiner"), select_loading_inputs(request), side, VERSION]
    )
    result = search_table(networks, config, partial, say, model=key, resume=not restart)
    plot_search(path.with_suffix(".png"), result.history, result.before, result.after)
    if result.after >= result.before:
        say(f"the table that it began with is the better one on held-out seeds, and is kept ({result.before:.4f})")
    sampler = _add_table(draft, result, config)
    store_sampler(sampler, path, engines if install else None, say)
    partial.unlink(missing_ok=True)
    return sampler


def _resolve_build(model_spec: ModelSpec) -> BuildRequest:
    return resolve_request(
        predictor=model_spec.predictor,
        refiner=None if model_spec.refiner is None else str(model_spec.refiner),
        vaes=("none",),  # nothing is decoded
        heads=model_spec.heads,
        time_direction=model_spec.time_direction,
        targets=("cpu",),
    )


def select_loading_inputs(request: BuildRequest) -> dict[str, str]:
    """What measurements depend on beside the networks' weights: how these are read, and the decoders."""
    inputs = request.inputs
    return {name: inputs[name] for name in inputs if name.startswith(("vae", "heads", "time direction"))}


def resolve_guidance(guidance: Guidance, model: CheckpointModel) -> dict[str, Any]:
    """As asked, or as the model's own files say."""
    defaults = model.make_defaults()
    return {
        "guidance": defaults.guidance if guidance.scale is None else guidance.scale,
        "channels": defaults.guidance_channels if guidance.channels is None else guidance.channels,
        "interval": guidance.interval,
    }


def resize_networks(model: CheckpointModel, model_spec: ModelSpec, manifest: Manifest | None) -> NetworkSet:
    """At the resolution asked for, or the directory's first, or the one that the predictor was trained at."""
    factor = model.factor if manifest is None else manifest.model.factor
    resolution = model_spec.resolution or (0 if manifest is None else manifest.resolutions[0])
    config = model.predictor.model.config
    side = resolution // factor or config.latent_size
    if resolution % factor or side % config.patch:
        raise RequestError(
            f"resolution {resolution}", allowed=f"multiples of {factor * config.patch} ({factor} pixels per latent)"
        )
    loaded = [network for network in (model.predictor, model.refiner) if network is not None]
    predictor, *refiner = [resize_network(network.model, side).eval().requires_grad_(False) for network in loaded]
    return NetworkSet(predictor, refiner[0] if refiner else None, sorted(read_classes(model.predictor)))


def _add_table(sampler: CalibratedSampler, result: TableSearchResult, config: SearchConfig) -> CalibratedSampler:
    measured = {
        "held_out": {"error": min(result.after, result.before), "images": config.images},
        "began_with": {"error": result.before, "images": config.images},
        "search": asdict(config) | {"interval": list(config.interval)},
    }
    return replace(
        sampler,
        grid=build_grid_from_steps(result.better_table.step_sizes),
        rows=result.better_table.coefficients,
        refiner=result.better_table.num_refiner_steps,
        guidance={"scale": config.guidance, "channels": config.channels, "interval": list(config.interval)},
        measured=measured,
    )
