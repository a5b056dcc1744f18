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
        machine: the yardstick's ratio: how much slower the machine itself was.
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
    """Compares the conditions that both reports have.

    Raises:
        RequestError: there is none, or the least effect is none.
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
        stages={
            stage: _compute_stage_ratio(_list_stage_runs(before, stage), _list_stage_runs(after, stage))
            for stage in ALL_STAGES
        },
    )


def _significant_ratio(machine: Ratio) -> float:
    """The machine's own ratio where its interval excludes 1, else 1."""
    if machine.low is None or machine.high is None or machine.low <= 1 <= machine.high:
        return 1.0
    return machine.value


def _list_stage_runs(result: ConditionResult, stage: str) -> Sequence[float]:
    derived_stages_ms = {"host": result.samples.host_ms, "png": result.samples.png_ms}
    return derived_stages_ms.get(stage) or result.samples.runs_ms.get(stage, ())


def _compute_stage_ratio(before: Sequence[float], after: Sequence[float]) -> float | None:
    if not before or not after or np.median(before) <= 0:
        return None
    return float(np.median(after) / np.median(before))


def _index_conditions(report: BenchmarkReport, other: BenchmarkReport) -> dict[tuple[str, ...], ConditionResult]:
    """Conditions by what is compared. Where both reports have one engine directory, its name does not matter."""
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
    """What else differs, as warnings."""
    warnings = []
    for name, value_before, value_after in _list_facts(before, after):
        if value_before != value_after:
            warnings.append(f"{name}: {_format_fact(value_before)} before, {_format_fact(value_after)} after")
    slowdown = _significant_ratio(machine)
    if abs(slowdown - 1) >= min_effect:
        direction = "slower" if slowdown > 1 else "faster"
        warnings.append(
            f"the machine itself was {abs(slowdown - 1):.0%} {direction} (fixed arithmetic): ratios are not "
            "corrected for it, "
            "verdicts are; best run both in one go: flowturbo-bench BEFORE AFTER"
        )
    return warnings


def _list_facts(before: BenchmarkReport, after: BenchmarkReport) -> list[tuple[str, Any, Any]]:
    """What should be equal, by name, before and after."""
    facts_before, facts_after = _collect_facts(before), _collect_facts(after)
    return [(name, facts_before.get(name), facts_after.get(name)) for name in {**facts_before, **facts_after}]


def _collect_facts(report: BenchmarkReport) -> dict[str, Any]:
    environment, engine_conditions = (
        report.environment,
        [c.condition for c in report.conditions if c.condition.implementation == ENGINES],
    )
    cpu = environment.get("cpu", {})
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
