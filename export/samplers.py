"""Saved samplers of an engine directory: taken from files, kept when the directory is built again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flowturbo import demo
from runtime.errors import EngineError, RequestError
from runtime.manifest import Defaults, Manifest, read_manifest, with_samplers, write_manifest
from runtime.saved import SavedSampler, check_model, read_saved
from runtime.schedule import is_schedule, parse_schedule


def samplers_there(folder: Path) -> tuple[SavedSampler, ...]:
    """What an earlier build of the directory holds; nothing where there is none, or a damaged one."""
    try:
        return read_manifest(folder).samplers
    except EngineError:
        return ()


def demo_samplers() -> tuple[SavedSampler, ...]:
    """Those that ship with the demo model."""
    return tuple(read_saved(path) for path in sorted(demo.SAMPLERS.glob("*.json")))


def fitting(samplers: Sequence[SavedSampler], manifest: Manifest) -> tuple[SavedSampler, ...]:
    """Those that were calibrated for the directory's model."""
    sources = manifest.model.sources
    return tuple(s for s in samplers if all(sources.get(role) == sha256 for role, sha256 in s.model.items()))


def add_samplers(
    folder: Path, kept: Sequence[SavedSampler], files: Sequence[Path], default: str | None, *, force: bool = False
) -> Manifest:
    """Puts samplers into a directory's manifest, and makes one of them its default.

    Args:
        kept: added where they fit the model.
        files: added, or refused where they do not.
        default: name of a sampler, or blocks such as H2P6.

    Raises:
        RequestError: a file is no sampler or for another model, or the default is not there.
    """
    manifest = read_manifest(folder)
    asked = [read_saved(path) for path in files]
    for saved in asked if not force else ():
        check_model(saved, manifest.model.sources)
    changed = with_samplers(manifest, [*fitting(kept, manifest), *asked])
    if default is not None:
        changed = replace(changed, defaults=_default(changed, default))
    if changed != manifest:
        write_manifest(folder, changed)
    return changed


def _default(manifest: Manifest, name: str) -> Defaults:
    known = [saved.name for saved in manifest.samplers]
    if is_schedule(name):
        if parse_schedule(name).needs_refiner and manifest.model.refiner is None:
            raise RequestError(f"default schedule {name}, without a refiner", allowed="blocks of H and P")
    elif name not in known:
        raise RequestError(
            f"default schedule {name!r}",
            allowed=f"blocks such as H1P5R3, or a sampler of this directory: {', '.join(known) or 'it has none'}",
            remedy="add it first: --sampler FILE",
        )
    return replace(manifest.defaults, schedule=name, solver=None, steps=None)
