"""From checkpoints to a saved table: loads the networks, searches, keeps the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calibration.plot import check_matplotlib, plot_search
from calibration.probe import Guidance
from calibration.saving import keep
from calibration.solver import Found, Networks, SearchConfig, search
from flowturbo import demo
from flowturbo.checkpoints import load_network, resized
from runtime.errors import RequestError
from runtime.files import sha256_of
from runtime.grids import from_steps
from runtime.manifest import Manifest, read_manifest
from runtime.saved import SCHEMA, SavedSampler, check_model
from runtime.version import VERSION


@dataclass(frozen=True)
class Wanted:
    """Which model a table is searched for, and how it will be guided."""

    predictor: Path | None
    refiner: Path | None
    heads: int | None
    resolution: int | None
    guidance: Guidance


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
    check_matplotlib()
    manifest = None if engines is None else read_manifest(engines)
    files = _files(wanted, with_refiner=options["refiner_nfe"] > 0)
    model = {role: sha256_of(path) for role, path in files.items()}
    guided = _guidance(wanted.guidance, manifest)
    config = SearchConfig(**options, **guided)
    called = name or f"searched-{config.nfe}" + (f"+{config.refiner_nfe}R" if config.refiner_nfe else "")
    path = out or Path(f"{called}.json")
    saved = SavedSampler(SCHEMA, called, "table", model, command=command, flowturbo=VERSION)
    if manifest is not None:
        check_model(saved, manifest.model.sources)
    networks = _networks(files, wanted, manifest)
    partial = path.with_suffix(".partial.npz")
    found = search(networks, config, partial, say, resume=not restart)
    plot_search(path.with_suffix(".png"), found.history, found.before, found.after)
    if found.after >= found.before:
        say(f"the table that it began with is the better one on held-out seeds, and is kept ({found.before:.4f})")
    result = _saved(saved, found, config, guided)
    keep(result, path, engines if install else None, say)
    partial.unlink(missing_ok=True)
    return result


def _saved(saved: SavedSampler, found: Found, config: SearchConfig, guided: Mapping[str, Any]) -> SavedSampler:
    measured = {
        "held_out": {"error": found.after, "images": config.images},
        "began_with": {"error": found.before, "images": config.images},
        "search": asdict(config) | {"interval": list(config.interval)},
    }
    return replace(
        saved,
        grid=from_steps(found.kept.steps),
        rows=found.kept.rows,
        refiner=found.kept.refiner,
        guidance={"scale": guided["guidance"], "channels": guided["channels"], "interval": list(guided["interval"])},
        measured=measured,
    )


def _files(wanted: Wanted, *, with_refiner: bool) -> dict[str, Path]:
    """Checkpoints by role; the demo's if none is named."""
    if wanted.predictor is None and wanted.refiner is not None:
        raise RequestError("a refiner without its predictor", remedy="name both, or none for the demo")
    files = {"predictor": wanted.predictor or demo.PREDICTOR}
    if with_refiner:
        refiner = demo.REFINER if wanted.predictor is None else wanted.refiner
        if refiner is None:
            raise RequestError("refiner evaluations without a refiner", remedy="name one: --refiner FILE")
        files["refiner"] = refiner
    for role, path in files.items():
        if not path.is_file():
            raise RequestError(f"no {role} at {path}", allowed="a checkpoint file")
    return files


def _guidance(guidance: Guidance, manifest: Manifest | None) -> dict[str, Any]:
    """Scale, channels and interval: as asked, as the directory's, or (the demo without a directory) as its own."""
    scale, channels = guidance.scale, guidance.channels
    if manifest is not None:
        scale = manifest.defaults.guidance if scale is None else scale
        channels = manifest.defaults.guidance_channels if channels is None else channels
    if scale is None:
        raise RequestError("no guidance scale", remedy="name ENGINES, whose default is taken, or --guidance W")
    return {"guidance": scale, "channels": 3 if channels is None else channels, "interval": guidance.interval}


def _networks(files: Mapping[str, Path], wanted: Wanted, manifest: Manifest | None) -> Networks:
    loaded = {
        role: load_network(path, "predictor" if role == "predictor" else "refiner", heads=wanted.heads).model
        for role, path in files.items()
    }
    classes = sorted(manifest.model.classes) if manifest else range(loaded["predictor"].config.classes)
    if wanted.resolution is not None or manifest is not None:
        factor = manifest.model.factor if manifest else 8
        pixels = wanted.resolution or (manifest.resolutions[0] if manifest else 0)
        loaded = {role: resized(model, pixels // factor) for role, model in loaded.items()}
    for model in loaded.values():
        model.eval().requires_grad_(False)
    return Networks(loaded["predictor"], loaded.get("refiner"), list(classes))
