"""Compare two reports: what changed, and whether it is more than noise.

A condition is called slower when three things hold. The bootstrap interval of the ratio of medians lies above 1. The
ratio is at least `min_effect` above 1. Both hold beyond the slowdown of the machine, which the yardsticks of both show.
The confidence of 99 % is divided among the conditions (Bonferroni), so that many comparisons do not add up to a
false alarm. The interval covers noise within the runs, the least effect covers differences between any two runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flowturbo.evaluation.speed.bench_report import ALL_STAGES, BenchmarkReport, ConditionResult
from flowturbo.evaluation.speed.conditions import ENGINES
from flowturbo.evaluation.speed.statistics import Ratio, compute_median_ratio
from runtime.system.errors import RequestError

MIN_EFFECT = 0.05
CONFIDENCE = 0.99
Verdict = Literal["slower", "faster", "same", "unclear", "too few samples"]


@dataclass(frozen=True)
class ConditionChange:
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
class ReportDiff:
    """Two reports side by side.

    Attributes:
        machine: the yardstick's ratio, which is the slowdown of the machine itself.
        only_before, only_after: conditions that one report lacks.
        warnings: what else differs.
    """

    min_effect: float
    machine: Ratio
    changes: tuple[ConditionChange, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def regressions(self) -> list[ConditionChange]:
        return [change for change in self.changes if change.verdict == "slower"]


def compare_reports(before: BenchmarkReport, after: BenchmarkReport, min_effect: float = MIN_EFFECT) -> ReportDiff:
    """Compare the conditions that both reports have.

    Raises:
        RequestError: there is none, or the least effect is not between 0 and 1.
    """
    if not 0 < min_effect < 1:
        raise RequestError(f"least effect {min_effect:g}", allowed="between 0 and 1; 0.05 is 5 %")
    before_by_key, after_by_key = _index_conditions(before, after), _index_conditions(after, before)
    shared_keys = [key for key in before_by_key if key in after_by_key]
    if not shared_keys:
        raise RequestError(
            "the reports have no condition in common",
            allowed="conditions of equal sampler, guidance, resolution and batch, on engine directories of one name",
            remedy="repeat the benchmark with the options of the first: " + " ".join(before.command[:12]),
        )
    machine = compute_median_ratio(before.yardstick_ms, after.yardstick_ms)
    confidence = 1 - (1 - CONFIDENCE) / len(shared_keys)
    return ReportDiff(
        min_effect=min_effect,
        machine=machine,
        changes=tuple(
            _compare_condition(before_by_key[key], after_by_key[key], machine, confidence, min_effect)
            for key in shared_keys
        ),
        only_before=tuple(before_by_key[key].condition.name for key in before_by_key if key not in after_by_key),
        only_after=tuple(after_by_key[key].condition.name for key in after_by_key if key not in before_by_key),
        warnings=tuple(_list_differences(before, after, machine, min_effect)),
    )


def decide_verdict(ratio: Ratio, machine: float, min_effect: float) -> Verdict:
    """Decide as the head of this file says.

    Args:
        machine: slowdown of the machine itself; 1 if it was not slower.
    """
    if ratio.low is None or ratio.high is None:
        return "too few samples"
    slow, fast = max(1.0, machine), min(1.0, machine)
    if ratio.low > slow and ratio.value >= slow * (1 + min_effect):
        return "slower"
    if ratio.high < fast and ratio.value <= fast / (1 + min_effect):
        return "faster"
    # Equal times on a machine that became faster are no equal speed: both must say so.
    is_within = all(1 / (1 + min_effect) <= ratio.low / m and ratio.high / m <= 1 + min_effect for m in (1.0, machine))
    return "same" if is_within else "unclear"


def _compare_condition(
    before: ConditionResult, after: ConditionResult, machine: Ratio, confidence: float, min_effect: float
) -> ConditionChange:
    ratio = compute_median_ratio(before.samples.image_ms, after.samples.image_ms, confidence=confidence)
    return ConditionChange(
        name=after.condition.name,
        before_ms=float(np.median(before.samples.image_ms)),
        after_ms=float(np.median(after.samples.image_ms)),
        ratio=ratio,
        verdict=decide_verdict(ratio, _significant_ratio(machine), min_effect),
        stages={stage: _compute_stage_ratio(before, after, stage) for stage in ALL_STAGES},
    )


def _significant_ratio(machine: Ratio) -> float:
    """Return the machine's ratio where its interval excludes 1, else 1."""
    if machine.low is None or machine.high is None or machine.low <= 1 <= machine.high:
        return 1.0
    return machine.value


def _compute_stage_ratio(before: ConditionResult, after: ConditionResult, stage: str) -> float | None:
    """Compute the ratio of medians of a stage's sums per run, after over before."""
    old_ms, new_ms = (
        {"host": r.samples.host_ms, "png": r.samples.png_ms}.get(stage) or r.samples.runs_ms.get(stage, ())
        for r in (before, after)
    )
    return float(np.median(new_ms) / np.median(old_ms)) if old_ms and new_ms and np.median(old_ms) > 0 else None


def _index_conditions(report: BenchmarkReport, other: BenchmarkReport) -> dict[tuple[str, ...], ConditionResult]:
    """Index conditions by what is compared; with one engine directory in both reports, without its name."""
    has_one_directory = len(report.engines) == len(other.engines) == 1
    return {
        (
            "" if has_one_directory else r.condition.engine,
            r.condition.implementation,
            r.condition.task,
            r.condition.conditioning,
        ): r
        for r in report.conditions
    }


def _list_differences(before: BenchmarkReport, after: BenchmarkReport, machine: Ratio, min_effect: float) -> list[str]:
    """Return warnings of other differences."""
    old, new = _collect_facts(before), _collect_facts(after)
    warnings = [
        f"{name}: {_format_fact(old.get(name))} before, {_format_fact(new.get(name))} after"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    slowdown = _significant_ratio(machine)
    if abs(slowdown - 1) >= min_effect:
        direction = "slower" if slowdown > 1 else "faster"
        warnings.append(
            f"the machine itself was {abs(slowdown - 1):.0%} {direction} (fixed arithmetic): ratios are not "
            "corrected for it, verdicts are; best run both in one go: flowturbo-bench BEFORE AFTER"
        )
    return warnings


def _collect_facts(report: BenchmarkReport) -> dict[str, Any]:
    """Collect what should be equal in two reports, by name."""
    environment, cpu = report.environment, report.environment.get("cpu", {})
    engine_conditions = [c.condition for c in report.conditions if c.condition.implementation == ENGINES]
    return {
        **{name: environment.get(name) for name in ("platform", "python", "driver")},
        **{f"CPU {name}": cpu.get(name) for name in ("model", "logical_cores", "governor")},
        "GPU": [gpu.get("name") for gpu in environment.get("gpus", [])],
        "power mode": (environment.get("jetson") or {}).get("power_mode"),
        **environment.get("versions", {}),
        "runner": sorted({condition.runner for condition in engine_conditions}),
        "precision": sorted({condition.precision for condition in engine_conditions}),
        "engine hashes": sorted(engine.get("hash", "") for engine in report.engines.values()),
    }


def _format_fact(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
