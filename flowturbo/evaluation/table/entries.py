"""The rows of the table: which samplers it compares. A row is a label and keyword arguments of `Pipeline.request`.

Every solver of the runtime comes in by itself; a sampler with particular options is one line here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from flowturbo.evaluation.quality.same_seed import REFERENCE
from runtime.sampling.calibrated import SavedSampler, described
from runtime.sampling.solvers import RULES, SOLVERS
from runtime.sampling.tableaus import SEARCHED
from runtime.system.errors import RequestError

BASELINE = "heun-25"
"""Name of the row that acceleration is measured against: what SiT's and FlowTurbo's papers compare with."""
FINEST = "heun-250"
"""Name of the row that stands for the exact solution."""

SIT, FLOWTURBO, OTHER = "SiT", "FlowTurbo", "other"


@dataclass(frozen=True)
class Row:
    """One sampler.

    Attributes:
        name: what `--rows` calls it.
        label: what the table calls it.
        group: SiT's own samplers, FlowTurbo's schedules, or others.
        sampler: keyword arguments of `Pipeline.request`.
    """

    name: str
    label: str
    group: str
    sampler: Mapping[str, Any] = field(default_factory=dict)


SCHEDULES = ("H1P5R3", "H2P4R2", "H2P8R2", "H5P7R3", "H8P9R5")
"""Published in the FlowTurbo paper, from the fastest to the best."""
WITHOUT_REFINER = ("H1P8", "H2P6")
HEUN_STEPS = (4, 8, 12)

_BASELINES = [
    Row(BASELINE, "SiT, Heun 25", SIT, {"solver": "heun", "steps": 25}),
    Row("dopri5", "SiT, dopri5", SIT, {"solver": "dopri5"}),
    Row(FINEST, "SiT, Heun 250", SIT, REFERENCE),
]
_SCHEDULES = [Row(schedule, f"FlowTurbo {schedule}", FLOWTURBO, {"schedule": schedule}) for schedule in SCHEDULES]
_OTHERS = [
    *(Row(schedule, schedule, OTHER, {"schedule": schedule}) for schedule in WITHOUT_REFINER),
    *(Row(f"heun-{steps}", f"Heun {steps}", OTHER, {"solver": "heun", "steps": steps}) for steps in HEUN_STEPS),
    *(
        Row(f"searched-{steps}", f"searched {steps}", OTHER, {"solver": "searched", "steps": steps})
        for steps in sorted(SEARCHED)
    ),
    *(
        Row(name, f"{name} {solver.default_steps}", OTHER, {"solver": name})
        for name, solver in SOLVERS.items()
        if name not in ("heun", "searched")
    ),
    *(
        Row(name, f"adaptive {name}, {rule.setting} {rule.default:g}", OTHER, {"adaptive": name})
        for name, rule in RULES.items()
    ),
    Row("sde-euler-50", "SiT SDE, Euler 50", SIT, {"solver": "sde-euler", "steps": 50}),
    Row("sde-heun-25", "SiT SDE, Heun 25", SIT, {"solver": "sde-heun", "steps": 25}),
]

ROWS: tuple[Row, ...] = (*_BASELINES, *_SCHEDULES, *_OTHERS)


def rows_of(samplers: Sequence[SavedSampler]) -> tuple[Row, ...]:
    """Every row that a directory with these saved samplers can have."""
    return (*ROWS, *(Row(s.name, f"calibrated {described(s)}", OTHER, {"schedule": s.name}) for s in samplers))


def chosen_rows(patterns: Sequence[str] = (), samplers: Sequence[SavedSampler] = ()) -> tuple[Row, ...]:
    """The rows whose name fits one of the patterns ("H*", "heun-25"), in the table's order; all if there are none.

    Args:
        samplers: saved ones of the directory, which are rows too.

    Raises:
        RequestError: a pattern fits none.
    """
    rows = rows_of(samplers)
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise RequestError(f"row {pattern!r}", allowed=", ".join(row.name for row in rows))
    return tuple(row for row in rows if not patterns or any(fnmatchcase(row.name, p) for p in patterns))
