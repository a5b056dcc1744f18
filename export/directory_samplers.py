"""Calibrated samplers of an engine directory: read from files, and kept when the directory is built again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flowturbo import demo
from runtime.directory.manifest import merge_samplers, read_manifest, write_manifest
from runtime.directory.records import Manifest
from runtime.sampling.blocks import is_schedule, parse_schedule
from runtime.sampling.calibrated import (
    CalibratedSampler,
    check_calibrated_for,
    is_calibrated_for,
    read_calibrated_sampler,
)
from runtime.system.errors import EngineError, RequestError


@dataclass(frozen=True)
class SamplerSet:
    """The samplers and the default of a directory, read and checked before anything is built.

    Attributes:
        existing: samplers of an earlier build, or of the demo; those of another model are left out.
        requested: samplers that were named; those of another model are refused unless `force`.
        default: blocks or a sampler's name; None for the model's default.
        is_default_inherited: whether an earlier build set the default: it is dropped if its sampler does not fit.
    """

    existing: tuple[CalibratedSampler, ...] = ()
    requested: tuple[CalibratedSampler, ...] = ()
    default: str | None = None
    force: bool = False
    is_default_inherited: bool = False

    def check_fits(self, sources: Mapping[str, str]) -> None:
        """Check that samplers and default fit the checkpoints (role → sha256), and one another.

        Raises:
            RequestError: they do not.
        """
        for sampler in self.requested if not self.force else ():
            check_calibrated_for(sampler, sources)
        names = [sampler.name for sampler in (*self._select_fitting(sources), *self.requested)]
        if self.default is None or self.default in names or self.is_default_inherited:
            return
        if not is_schedule(self.default):
            raise RequestError(
                f"default schedule {self.default!r}",
                allowed=f"blocks such as H1P5R3, or a sampler of this directory: {', '.join(names) or 'it has none'}",
                remedy="add it: --sampler FILE",
            )
        parse_schedule(self.default)

    def add_to(self, manifest: Manifest) -> Manifest:
        """Return the manifest with the samplers and the default.

        Raises:
            RequestError: the default needs a refiner that the model lacks.
        """
        fitting = self._select_fitting(manifest.model.sources)
        changed = merge_samplers(manifest, [*fitting, *self.requested])
        if self.default is None or (
            self.is_default_inherited and self.default not in {sampler.name for sampler in changed.samplers}
        ):
            return changed
        needs_refiner = is_schedule(self.default) and parse_schedule(self.default).needs_refiner
        if needs_refiner and manifest.model.refiner is None:
            raise RequestError(f"default schedule {self.default}, without a refiner", allowed="blocks of H and P")
        return replace(changed, defaults=replace(manifest.defaults, schedule=self.default, solver=None, steps=None))

    def _select_fitting(self, sources: Mapping[str, str]) -> list[CalibratedSampler]:
        return [sampler for sampler in self.existing if self.force or is_calibrated_for(sampler, sources)]


def collect_samplers(
    folder: Path, files: Sequence[Path], default: str | None, *, with_demo: bool = False, force: bool = False
) -> SamplerSet:
    """Collect the samplers of a build into `folder`: those and the default of an earlier build, and the named files.

    Raises:
        RequestError: a file is no saved sampler.
    """
    existing: tuple[CalibratedSampler, ...] = ()
    inherited = False
    try:
        manifest = read_manifest(folder)
    except EngineError:
        pass  # no directory yet, or one that is built anew because it is damaged
    else:
        existing = manifest.samplers
        if default is None and manifest.defaults.schedule in {sampler.name for sampler in existing}:
            default, inherited = manifest.defaults.schedule, True
    retained = (*existing, *(read_demo_samplers() if with_demo else ()))
    return SamplerSet(retained, tuple(map(read_calibrated_sampler, files)), default, force, inherited)


def read_demo_samplers() -> tuple[CalibratedSampler, ...]:
    """Return the samplers that ship with the demo model."""
    return tuple(read_calibrated_sampler(path) for path in sorted(demo.SAMPLERS.glob("*.json")))


def add_samplers(folder: Path, sampler_set: SamplerSet) -> Manifest:
    """Add samplers and a default to the manifest of a directory that is not built again.

    Raises:
        RequestError: a sampler is for another model, or the default is not there.
    """
    manifest = read_manifest(folder)
    sampler_set.check_fits(manifest.model.sources)
    changed = sampler_set.add_to(manifest)
    if changed != manifest:
        write_manifest(folder, changed)
    return changed
