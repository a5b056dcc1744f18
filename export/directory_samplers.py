"""Saved samplers of an engine directory: taken from files, kept when the directory is built again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flowturbo import demo
from runtime.directory.manifest import Manifest, read_manifest, with_samplers, write_manifest
from runtime.sampling.blocks import is_schedule, parse_schedule
from runtime.sampling.calibrated import SavedSampler, check_model, fits, read_saved
from runtime.system.errors import EngineError, RequestError


@dataclass(frozen=True)
class Keeping:
    """What a directory shall hold beside its engines, read and checked before anything is built.

    Attributes:
        kept: samplers that are there already, or ship with the demo; those of another model are left out.
        asked: samplers that were named; those of another model are refused unless `force`.
        default: what runs when nobody says otherwise: blocks or a sampler's name; None leaves the model's own.
        inherited: whether the default is an earlier build's: it goes where its sampler does not fit.
    """

    kept: tuple[SavedSampler, ...] = ()
    asked: tuple[SavedSampler, ...] = ()
    default: str | None = None
    force: bool = False
    inherited: bool = False

    def check(self, sources: Mapping[str, str]) -> None:
        """Raises RequestError where something does not fit the checkpoints (role → sha256), or together."""
        for saved in self.asked if not self.force else ():
            check_model(saved, sources)
        names = [saved.name for saved in (*self._fitting(sources), *self.asked)]
        if self.default is None or self.default in names or self.inherited:
            return
        if not is_schedule(self.default):
            raise RequestError(
                f"default schedule {self.default!r}",
                allowed=f"blocks such as H1P5R3, or a sampler of this directory: {', '.join(names) or 'it has none'}",
                remedy="add it: --sampler FILE",
            )
        parse_schedule(self.default)

    def into(self, manifest: Manifest) -> Manifest:
        """The manifest with the samplers and the default."""
        kept = self._fitting(manifest.model.sources)
        changed = with_samplers(manifest, [*kept, *self.asked])
        if self.default is None or (self.inherited and self.default not in {saved.name for saved in changed.samplers}):
            return changed
        needs_refiner = is_schedule(self.default) and parse_schedule(self.default).needs_refiner
        if needs_refiner and manifest.model.refiner is None:
            raise RequestError(f"default schedule {self.default}, without a refiner", allowed="blocks of H and P")
        return replace(changed, defaults=replace(manifest.defaults, schedule=self.default, solver=None, steps=None))

    def _fitting(self, sources: Mapping[str, str]) -> list[SavedSampler]:
        return [saved for saved in self.kept if self.force or fits(saved, sources)]


def keeping_of(
    folder: Path, files: Sequence[Path], default: str | None, *, with_demo: bool = False, force: bool = False
) -> Keeping:
    """What a build into `folder` keeps: the samplers and the named default of an earlier one, and what is asked for.

    Raises:
        RequestError: a file is no saved sampler.
    """
    there: tuple[SavedSampler, ...] = ()
    inherited = False
    try:
        manifest = read_manifest(folder)
    except EngineError:
        pass  # no directory yet, or one that is built anew because it is damaged
    else:
        there = manifest.samplers
        if default is None and manifest.defaults.schedule in {saved.name for saved in there}:
            default, inherited = manifest.defaults.schedule, True
    kept = (*there, *(demo_samplers() if with_demo else ()))
    return Keeping(kept, tuple(map(read_saved, files)), default, force, inherited)


def demo_samplers() -> tuple[SavedSampler, ...]:
    """Those that ship with the demo model."""
    return tuple(read_saved(path) for path in sorted(demo.SAMPLERS.glob("*.json")))


def add_samplers(folder: Path, keeping: Keeping) -> Manifest:
    """Puts samplers and a default into the manifest of a directory that stays as it is.

    Raises:
        RequestError: a sampler is for another model, or the default is not there.
    """
    manifest = read_manifest(folder)
    keeping.check(manifest.model.sources)
    changed = keeping.into(manifest)
    if changed != manifest:
        write_manifest(folder, changed)
    return changed
