"""The rows of the table. A row is a label and keyword arguments of `Pipeline.request`.

Every solver of the runtime is a row automatically; a sampler with particular options is one line here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from flowturbo.evaluation.quality.same_seed import REFERENCE_SAMPLER
from runtime.request import RequestOptions
from runtime.sampling.calibrated import CalibratedSampler, describe_sampler
from runtime.sampling.solvers import ADAPTIVE_RULES, SOLVERS
from runtime.sampling.tableaus import SEARCHED_TABLES
from runtime.system.errors import RequestError

BASELINE_NAME = "heun-25"
"""Name of the row that acceleration is measured against, as in the papers of SiT and FlowTurbo."""
FINEST_NAME = "heun-250"
"""Name of the row that stands for the exact solution."""

SIT, FLOWTURBO, OTHER = "SiT", "FlowTurbo", "other"


@dataclass(frozen=True)
class SamplerEntry:
    """One sampler.

    Attributes:
        name: its name for `--rows`.
        label: its name in the table.
        group: SiT's own samplers, FlowTurbo's schedules, or others.
        sampler: keyword arguments of `Pipeline.request`.
    """

    name: str
    label: str
    group: str
    sampler: RequestOptions = field(default_factory=lambda: RequestOptions())


SCHEDULES = ("H1P5R3", "H2P4R2", "H2P8R2", "H5P7R3", "H8P9R5")
"""Published in the FlowTurbo paper, from the fastest to the best."""
WITHOUT_REFINER = ("H1P8", "H2P6")
HEUN_STEPS = (4, 8, 12)

SAMPLER_ENTRIES: tuple[SamplerEntry, ...] = (
    SamplerEntry(BASELINE_NAME, "SiT, Heun 25", SIT, {"solver": "heun", "steps": 25}),
    SamplerEntry("dopri5", "SiT, dopri5", SIT, {"solver": "dopri5"}),
    SamplerEntry(FINEST_NAME, "SiT, Heun 250", SIT, REFERENCE_SAMPLER),
    *(SamplerEntry(schedule, f"FlowTurbo {schedule}", FLOWTURBO, {"schedule": schedule}) for schedule in SCHEDULES),
    *(SamplerEntry(schedule, schedule, OTHER, {"schedule": schedule}) for schedule in WITHOUT_REFINER),
    *(SamplerEntry(f"heun-{n}", f"Heun {n}", OTHER, {"solver": "heun", "steps": n}) for n in HEUN_STEPS),
    *(
        SamplerEntry(f"searched-{n}", f"searched {n}", OTHER, {"solver": "searched", "steps": n})
        for n in sorted(SEARCHED_TABLES)
    ),
    *(
        SamplerEntry(name, f"{name} {solver.default_steps}", OTHER, {"solver": name})
        for name, solver in SOLVERS.items()
        if name not in ("heun", "searched")
    ),
    *(
        SamplerEntry(name, f"adaptive {name}, {rule.parameter} {rule.default:g}", OTHER, {"adaptive": name})
        for name, rule in ADAPTIVE_RULES.items()
    ),
    SamplerEntry("sde-euler-50", "SiT SDE, Euler 50", SIT, {"solver": "sde-euler", "steps": 50}),
    SamplerEntry("sde-heun-25", "SiT SDE, Heun 25", SIT, {"solver": "sde-heun", "steps": 25}),
)


def list_entries(samplers: Sequence[CalibratedSampler]) -> tuple[SamplerEntry, ...]:
    """Return every row that a directory with these calibrated samplers can have."""
    return (
        *SAMPLER_ENTRIES,
        *(SamplerEntry(s.name, f"calibrated {describe_sampler(s)}", OTHER, {"schedule": s.name}) for s in samplers),
    )


def select_entries(
    patterns: Sequence[str] = (), samplers: Sequence[CalibratedSampler] = ()
) -> tuple[SamplerEntry, ...]:
    """Return the rows with a name that fits a pattern ("H*", "heun-25"), in the table's order; all without patterns.

    Args:
        samplers: calibrated ones of the directory, which are rows too.

    Raises:
        RequestError: a pattern fits none.
    """
    entries = list_entries(samplers)
    for pattern in patterns:
        if not any(fnmatchcase(entry.name, pattern) for entry in entries):
            raise RequestError(f"row {pattern!r}", allowed=", ".join(entry.name for entry in entries))
    return tuple(entry for entry in entries if not patterns or any(fnmatchcase(entry.name, p) for p in patterns))
