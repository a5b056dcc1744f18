"""Search a table for the checkpoints of a model, and store it as a calibrated sampler."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from calibration.model import ModelSpec, resize_networks, select_loading_inputs
from calibration.plot import plot_search
from calibration.samplers.result_files import check_sampler_output, store_sampler
from calibration.samplers.table_search import SearchConfig, search_table
from export.model import load_model
from flowturbo.plotting import check_matplotlib
from runtime.directory.manifest import read_manifest
from runtime.sampling.calibrated import SAMPLER_SCHEMA, CalibratedSampler, check_calibrated_for
from runtime.sampling.grids import build_grid_from_steps
from runtime.system.array_store import hash_json
from runtime.system.errors import RequestError
from runtime.system.json_codec import to_json
from runtime.system.progress import SILENT, Progress
from runtime.system.version import VERSION


def calibrate_table(
    engines: Path | None,
    model_spec: ModelSpec,
    config: SearchConfig,
    name: str | None,
    out: Path | None,
    *,
    restart: bool,
    install: bool,
    command: str,
    progress: Progress = SILENT,
) -> CalibratedSampler:
    """Search a table and store it under `name`.

    Args:
        engines: directory that the table is for; None searches for the checkpoints alone.
        config: of the search; its guidance is replaced by that of `model_spec`.
        out: file of the sampler; NAME.json if None.
        restart: begin anew in place of going on with a search that was stopped.
        install: also put the sampler into the manifest of `engines`.
        command: what the user typed, for the record.

    Raises:
        RequestError: refiner evaluations without a refiner, or engines of another model.
    """
    check_matplotlib("calibrate")
    check_sampler_output(name, out)
    request = model_spec.resolve_request()
    if config.refiner_nfe and request.refiner is None:
        raise RequestError("refiner evaluations without a refiner", remedy="name one: --refiner FILE")
    roles = ("predictor", "refiner") if config.refiner_nfe else ("predictor",)
    sampler_name = name or f"tuned-{config.nfe}" + (f"+{config.refiner_nfe}R" if config.refiner_nfe else "")
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
    guidance = model_spec.guidance.resolve(model.make_defaults())
    config = replace(config, guidance=guidance.scale, channels=guidance.channels, interval=guidance.interval)
    path = out or Path(f"{sampler_name}.json")
    partial = path.with_suffix(".partial.npz")
    networks = resize_networks(model, model_spec.resolution, manifest)
    side = networks.predictor.config.latent_size
    key = hash_json(
        [request.inputs["predictor"], request.inputs.get("refiner"), select_loading_inputs(request), side, VERSION]
    )
    result = search_table(networks, config, partial, progress, model=key, resume=not restart)
    plot_search(path.with_suffix(".png"), result.history, result.before, result.after)
    if result.after >= result.before:
        progress.write(
            f"the table that it began with is the better one on held-out seeds, and is kept ({result.before:.4f})"
        )
    sampler = replace(
        draft,
        grid=build_grid_from_steps(result.better_table.step_sizes),
        rows=result.better_table.coefficients,
        refiner=result.better_table.num_refiner_steps,
        guidance=to_json(guidance),
        measured={
            "held_out": {"error": min(result.after, result.before), "images": config.images},
            "began_with": {"error": result.before, "images": config.images},
            "search": asdict(config) | {"interval": list(config.interval)},
        },
    )
    store_sampler(sampler, path, engines if install else None, progress)
    partial.unlink(missing_ok=True)
    return sampler
