"""Samplers that were calibrated for a model: small named records, in a file of their own or in a manifest.

`flowturbo-calibrate` writes them, `flowturbo-run --schedule NAME` and `build-engines --sampler FILE` read them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from runtime.sampling.blocks import is_schedule
from runtime.sampling.tableaus import MultistepTable
from runtime.system.errors import RequestError
from runtime.system.files import write_json
from runtime.system.json_codec import JsonObject, read_versioned, to_json

SAMPLER_SCHEMA = 1
SAMPLER_KINDS = ("schedule", "table", "adaptive")
MAX_TABLE_STEPS = 16
"""Most steps of a table: each reads all slopes before it, and the history holds so many."""


MAX_COEFFICIENT = 1e3
"""Size of a coefficient in a table; those of real ones are below 10."""


@dataclass(frozen=True)
class CalibratedSampler:
    """A calibrated sampler.

    Attributes:
        name: by which users select it.
        kind: `schedule` (FlowTurbo blocks on a grid), `table` (a multistep table with its own grid) or `adaptive`
            (a rule of step control with its setting).
        model: sha256 of the checkpoints that it was calibrated for, by role; the refiner only where it is used.
        grid: times from 0 to 1, of a schedule or a table.
        schedule: its blocks, for example H1P5R3.
        rows: a table's coefficients, row i over the slopes 0 … i − 1.
        refiner: number of evaluations at the end of a table that are the refiner's.
        rule, setting: of adaptive steps: a name of `ADAPTIVE_RULES`, and its constant or tolerance.
        guidance: scale, channels and interval that it was measured with.
        measured: results of the calibration.
        command: the command that made it.
    """

    schema: int
    name: str
    kind: str
    model: Mapping[str, str]
    grid: tuple[float, ...] | None = None
    schedule: str | None = None
    rows: tuple[tuple[float, ...], ...] | None = None
    refiner: int = 0
    rule: str | None = None
    setting: float | None = None
    guidance: JsonObject = field(default_factory=dict)
    measured: JsonObject = field(default_factory=dict)
    command: str = ""
    flowturbo: str = ""

    @property
    def sha256(self) -> str:
        """sha256 of its canonical JSON."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True).encode()).hexdigest()

    @property
    def table(self) -> MultistepTable:
        """Coefficients of a table."""
        return MultistepTable(tuple(b - a for a, b in pairwise(self.grid or ())), self.rows or (), self.refiner)


def describe_sampler(sampler: CalibratedSampler) -> str:
    """Describe a sampler in one line."""
    if sampler.kind == "adaptive":
        return f"{sampler.name} ({sampler.rule} {sampler.setting:g})"
    steps = len(sampler.grid or ()) - 1
    refiner_text = f" + {sampler.refiner} R" if sampler.refiner else ""
    return f"{sampler.name} ({sampler.schedule or f'table of {steps - sampler.refiner}{refiner_text}'})"


NAME_PROBLEM = "is no word of letters, digits, . _ + and -, or reads as blocks"


def is_sampler_name(name: str) -> bool:
    """Return whether a sampler may have this name: `--schedule NAME` must not read it as blocks, or as a path."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", name) is not None and not is_schedule(name)


def check_calibrated_sampler(sampler: CalibratedSampler, where: str) -> None:
    """Raise RequestError where the parts of a saved sampler do not fit together."""
    grid, rows = sampler.grid or (), sampler.rows or ()
    steps = len(grid) - 1
    is_increasing = len(grid) > 1 and grid[0] == 0.0 and grid[-1] == 1.0 and all(a < b for a, b in pairwise(grid))
    needs_grid = sampler.kind in ("schedule", "table")
    problems = [
        (sampler.kind not in SAMPLER_KINDS, f"has the kind {sampler.kind!r} ({', '.join(SAMPLER_KINDS)} are known)"),
        (not is_sampler_name(sampler.name), f"has the name {sampler.name!r}, which {NAME_PROBLEM}"),
        (needs_grid and not is_increasing, "has no time grid that rises from 0 to 1"),
        (sampler.kind == "schedule" and not sampler.schedule, "names no blocks"),
        (
            sampler.kind == "table" and [len(row) for row in rows] != list(range(steps)),
            "has rows that do not fit its grid: row i holds i coefficients",
        ),
        (
            any(not abs(coefficient) <= MAX_COEFFICIENT for row in rows for coefficient in row),
            f"has a coefficient that is no number of at most {MAX_COEFFICIENT:g} in size",
        ),
        (sampler.kind == "table" and steps > MAX_TABLE_STEPS, f"has more than {MAX_TABLE_STEPS} steps"),
        (not 0 <= sampler.refiner < max(steps, 1), f"has {sampler.refiner} refiner evaluations of {steps}"),
        (sampler.kind == "adaptive" and (sampler.rule is None or sampler.setting is None), "names no rule and setting"),
    ]
    for is_broken, problem in problems:
        if is_broken:
            raise RequestError(f"{where} {problem}", remedy="calibrate again")


def read_calibrated_sampler(path: Path) -> CalibratedSampler:
    """Return the calibrated sampler of a file.

    Raises:
        RequestError: there is no file, it is something else, or its parts do not fit together.
    """
    sampler = read_versioned(
        path,
        CalibratedSampler,
        SAMPLER_SCHEMA,
        name="saved sampler",
        remedy="flowturbo-calibrate writes them; calibrate again",
        error_type=RequestError,
    )
    check_calibrated_sampler(sampler, str(path))
    return sampler


def write_calibrated_sampler(path: Path, sampler: CalibratedSampler) -> None:
    """Write the file, whole or not at all."""
    check_calibrated_sampler(sampler, sampler.name)
    write_json(path, to_json(sampler))


def is_calibrated_for(sampler: CalibratedSampler, sources: Mapping[str, str]) -> bool:
    """Return whether a sampler was calibrated for these checkpoints (role → sha256)."""
    return all(sources.get(role) == sha256 for role, sha256 in sampler.model.items())


def check_calibrated_for(sampler: CalibratedSampler, sources: Mapping[str, str]) -> None:
    """Check that a sampler was calibrated for these checkpoints (role → sha256).

    Raises:
        RequestError: it was calibrated for others.
    """
    for role, sha256 in sampler.model.items():
        if sources.get(role) != sha256:
            raise RequestError(
                f"the sampler {sampler.name} was calibrated for another {role} ({sha256[:12]} …)",
                allowed=f"the {role} of this directory ({sources.get(role, 'none')[:12]})",
                remedy="calibrate for this model (flowturbo-calibrate), or pass --force to use it all the same",
            )
