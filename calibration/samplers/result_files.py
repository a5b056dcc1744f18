"""Store the sampler that a calibration made: in a file, and in the manifest of the engine directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from calibration.guidance_choice import Guidance
from runtime.directory.manifest import merge_samplers, read_manifest, write_manifest
from runtime.directory.records import Manifest
from runtime.sampling.calibrated import (
    SAMPLER_SCHEMA,
    CalibratedSampler,
    check_calibrated_sampler,
    is_sampler_name,
    write_calibrated_sampler,
)
from runtime.sampling.grids import Grid
from runtime.system.errors import RequestError
from runtime.system.files import make_folder
from runtime.system.json_codec import to_json
from runtime.system.progress import SILENT, Progress
from runtime.system.version import VERSION


def check_sampler_output(name: str | None, out: Path | None) -> None:
    """Check that a result can be stored, before hours of measuring: its name, and the folder of its file.

    Raises:
        RequestError: no name for a sampler.
        OutputError: no folder for its file.
    """
    if name is not None and not is_sampler_name(name):
        raise RequestError(f"--name {name!r}", allowed="letters, digits, . _ + and -, and nothing that reads as blocks")
    if out is not None:
        make_folder(out.absolute().parent)


def make_sampler(
    manifest: Manifest,
    name: str,
    kind: str,
    guidance: Guidance,
    command: str,
    *,
    has_refiner: bool = False,
    schedule: str | None = None,
    grid: Grid | None = None,
    rule: str | None = None,
    setting: float | None = None,
    measured: Mapping[str, object],
) -> CalibratedSampler:
    """Return the record of a sampler that was measured on a directory's model.

    Args:
        has_refiner: whether it uses the refiner, and so serves only models with this one.
        schedule, grid, rule, setting, measured: as in `CalibratedSampler`.
    """
    roles = ("predictor", "refiner") if has_refiner else ("predictor",)
    sampler = CalibratedSampler(
        schema=SAMPLER_SCHEMA,
        name=name,
        kind=kind,
        model={role: manifest.model.sources[role] for role in roles if role in manifest.model.sources},
        grid=grid,
        schedule=schedule,
        rule=rule,
        setting=setting,
        guidance=to_json(guidance.resolve(manifest.defaults)),
        measured=to_json(measured),
        command=command,
        flowturbo=VERSION,
    )
    check_calibrated_sampler(sampler, f"the sampler {name}")
    return sampler


def store_sampler(
    sampler: CalibratedSampler, out: Path | None, engines: Path | None, progress: Progress = SILENT
) -> None:
    """Write the file, and put the sampler into the manifest of `engines`."""
    path = out or Path(f"{sampler.name}.json")
    write_calibrated_sampler(path, sampler)
    progress.write(f"written: {path}")
    if engines is not None:
        write_manifest(engines, merge_samplers(read_manifest(engines), [sampler]))
        progress.write(f"in {engines} now: flowturbo-run --engine {engines} --schedule {sampler.name}")
