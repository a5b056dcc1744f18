"""What changed between two reports, and whether it is more than noise.

A condition is called slower when three things hold: the bootstrap interval of the ratio of medians lies above 1, the
ratio is at least `min_effect` above 1, and both hold beyond what the machine itself was slower by, which the
yardstick of both reports tells. The confidence of 99 % is shared out among the conditions (Bonferroni): many
comparisons may not add up to a false alarm. The interval answers for noise within the runs, the least effect for what
runs differ by anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flowturbo.evaluation.speed.bench_report import ALL_STAGES, ConditionResult, Report
from flowturbo.evaluation.speed.conditions import ENGINES
from flowturbo.evaluation.speed.statistics import Ratio, ratio_of_medians
from runtime.system.errors import RequestError

MIN_EFFECT = 0.05
CONFIDENCE = 0.99
Verdict = Literal["slower", "faster", "same", "unclear", "too few samples"]


@dataclass(frozen=True)
class Change:
    """One condition in both reports.

    Attributes:
        ratio: median after over median before.
        stages: the same for each stage's sum per run; None where a report has none of it.
    """

    name: str
    before_ms: float
    after_ms: float
    ratio: Ratio
    verdict: Verdict
    stages: Mapping[str, float | None]


@dataclass(frozen=True)
class Compared:
    """Two reports side by side.

    Attributes:
        machine: the yardstick's ratio: how much slower the machine itself was.
        only_before, only_after: conditions that one report lacks.
        warnings: what else differs.
    """

    min_effect: float
    machine: Ratio
    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "slower"]


def compare_reports(before: Report, after: Report, min_effect: float = MIN_EFFECT) -> Compared:
    """Compares the conditions that both reports have.

    Raises:
        RequestError: there is none, or the least effect is none.
    """
    if not 0 < min_effect < 1:
        raise RequestError(f"least effect {min_effect:g}", allowed="between 0 and 1; 0.05 is 5 %")
    first, second = _by_key(before, after), _by_key(after, before)
    shared = [key for key in first if key in second]
    if not shared:
        raise RequestError(
            "the reports have no condition in common",
            allowed="conditions of equal sampler, guidance, resolution and batch, on engine directories of one name",
            remedy="repeat the benchmark with the options of the first: " + " ".join(before.command[:12]),
        )
    machine = ratio_of_medians(before.yardstick_ms, after.yardstick_ms)
    confidence = 1 - (1 - CONFIDENCE) / len(shared)
    return Compared(
        min_effect=min_effect,
        machine=machine,
        changes=tuple(_change(first[key], second[key], machine, confidence, min_effect) for key in shared),
        only_before=tuple(first[key].condition.name for key in first if key not in second),
        only_after=tuple(second[key].condition.name for key in second if key not in first),
        warnings=tuple(_differences(before, after, machine, min_effect)),
    )


def verdict_of(ratio: Ratio, machine: float, min_effect: float) -> Verdict:
    """See the head of this file.

    Args:
        machine: how much slower the machine itself was; 1 if it was not.
    """
    if ratio.low is None or ratio.high is None:
        return "too few samples"
    slow, fast = max(1.0, machine), min(1.0, machine)
    if ratio.low > slow and ratio.value >= slow * (1 + min_effect):
        return "slower"
    if ratio.high < fast and ratio.value <= fast / (1 + min_effect):
        return "faster"
    # Equal times on a machine that became faster are no equal speed: both must say so.
    within = all(1 / (1 + min_effect) <= ratio.low / m and ratio.high / m <= 1 + min_effect for m in (1.0, machine))
    return "same" if within else "unclear"


def _change(
    before: ConditionResult, after: ConditionResult, machine: Ratio, confidence: float, min_effect: float
) -> Change:
    ratio = ratio_of_medians(before.samples.image_ms, after.samples.image_ms, confidence=confidence)
    return Change(
        name=after.condition.name,
        before_ms=float(np.median(before.samples.image_ms)),
        after_ms=float(np.median(after.samples.image_ms)),
        ratio=ratio,
        verdict=verdict_of(ratio, _changed(machine), min_effect),
        stages={stage: _stage_ratio(_runs(before, stage), _runs(after, stage)) for stage in ALL_STAGES},
    )


def _changed(machine: Ratio) -> float:
    """The machine's own ratio where its interval excludes 1, else 1."""
    if machine.low is None or machine.high is None or machine.low <= 1 <= machine.high:
        return 1.0
    return machine.value


def _runs(result: ConditionResult, stage: str) -> Sequence[float]:
    own = {"host": result.samples.host_ms, "png": result.samples.png_ms}
    return own.get(stage) or result.samples.runs_ms.get(stage, ())


def _stage_ratio(before: Sequence[float], after: Sequence[float]) -> float | None:
    if not before or not after or np.median(before) <= 0:
        return None
    return float(np.median(after) / np.median(before))


def _by_key(report: Report, other: Report) -> dict[tuple[str, ...], ConditionResult]:
    """Conditions by what is compared. Where both reports have one engine directory, its name does not matter."""
    alone = len(report.engines) == len(other.engines) == 1
    return {
        ("" if alone else r.condition.engine, r.condition.implementation, r.condition.task, r.condition.conditioning): r
        for r in report.conditions
    }


def _differences(before: Report, after: Report, machine: Ratio, min_effect: float) -> list[str]:
    """What else differs, as warnings."""
    found = []
    for what, one, two in _facts(before, after):
        if one != two:
            found.append(f"{what}: {_shown(one)} before, {_shown(two)} after")
    own = _changed(machine)
    if abs(own - 1) >= min_effect:
        how = "slower" if own > 1 else "faster"
        found.append(
            f"the machine itself was {abs(own - 1):.0%} {how} (fixed arithmetic): ratios are not corrected for it, "
            "verdicts are; best run both in one go: flowturbo-bench BEFORE AFTER"
        )
    return found


def _facts(before: Report, after: Report) -> list[tuple[str, Any, Any]]:
    """What should be equal, by name, before and after."""
    one, two = _facts_of(before), _facts_of(after)
    return [(name, one.get(name), two.get(name)) for name in {**one, **two}]


def _facts_of(report: Report) -> dict[str, Any]:
    found, engines = (
        report.environment,
        [c.condition for c in report.conditions if c.condition.implementation == ENGINES],
    )
    cpu = found.get("cpu", {})
    return {
        **{name: found.get(name) for name in ("platform", "python", "driver")},
        **{f"CPU {name}": cpu.get(name) for name in ("model", "logical_cores", "governor")},
        "GPU": [gpu.get("name") for gpu in found.get("gpus", [])],
        "power mode": (found.get("jetson") or {}).get("power_mode"),
        **found.get("versions", {}),
        "runner": sorted({condition.runner for condition in engines}),
        "precision": sorted({condition.precision for condition in engines}),
        "engine hashes": sorted(engine.get("hash", "") for engine in report.engines.values()),
    }


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
