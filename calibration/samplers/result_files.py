"""Keeps what a calibration found: a file of its own, and a place in the engine directory's manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from calibration.samplers.probe import Guidance
from runtime.directory.manifest import merge_samplers, read_manifest, write_manifest
from runtime.directory.records import Manifest
from runtime.sampling.calibrated import (
    SAMPLER_SCHEMA,
    CalibratedSampler,
    check_calibrated_sampler,
    is_sampler_name,
    write_calibrated_sampler,
)
from runtime.system.errors import RequestError
from runtime.system.files import make_folder
from runtime.system.version import VERSION


def check_sampler_output(name: str | None, out: Path | None) -> None:
    """Whether a result can be kept, before hours of measuring: its name, and the folder of its file.

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
    **parts: Any,
) -> CalibratedSampler:
    """A record of a sampler that was measured on a directory's model.

    Args:
        has_refiner: it uses the refiner, so it is bound to that one too.
        parts: further fields of `SavedSampler`.
    """
    roles = ("predictor", "refiner") if has_refiner else ("predictor",)
    measured = json.loads(json.dumps(parts.pop("measured", {})))
    sampler = CalibratedSampler(
        schema=SAMPLER_SCHEMA,
        name=name,
        kind=kind,
        model={role: manifest.model.sources[role] for role in roles if role in manifest.model.sources},
        guidance=describe_guidance(manifest, guidance),
        measured=measured,
        command=command,
        flowturbo=VERSION,
        **parts,
    )
    check_calibrated_sampler(sampler, f"the sampler {name}")
    return sampler


def describe_guidance(manifest: Manifest, guidance: Guidance) -> Mapping[str, Any]:
    """What a calibration was guided with, the directory's defaults filled in."""
    defaults = manifest.defaults
    return {
        "scale": defaults.guidance if guidance.scale is None else guidance.scale,
        "channels": defaults.guidance_channels if guidance.channels is None else guidance.channels,
        "interval": list(guidance.interval),
    }


def store_sampler(
    sampler: CalibratedSampler, out: Path | None, engines: Path | None, say: Callable[[str], None]
) -> None:
    """Writes the file, and into the manifest of `engines`."""
    path = out or Path(f"{sampler.name}.json")
    write_calibrated_sampler(path, sampler)
    say(f"written: {path}")
    if engines is not None:
        write_manifest(engines, merge_samplers(read_manifest(engines), [sampler]))
        say(f"in {engines} now: flowturbo-run --engine {engines} --schedule {sampler.name}")
