"""The sections of a report: titles, columns, rows and notes as text. The terminal and the HTML page show the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowturbo.evaluation.speed.bench_report import ALL_STAGES, BenchmarkReport, ConditionResult
from flowturbo.evaluation.speed.statistics import Ratio, Statistics, count_required_samples
from flowturbo.evaluation.speed.svg import ChartLine, draw_line_chart, draw_stacked_bars
from runtime.system.json_codec import to_json

MAX_POINTS = 400
"""Points of a line over the runs. A plot of more shows the largest of each bunch; the data keep all."""
_STATISTIC_NAMES = ("p50", "p90", "p95", "p99", "mean", "sd", "min", "max")
_LATENCY_LABEL = "ms a run (p50; bars: min to p90)"


@dataclass(frozen=True)
class Column:
    """A column of a table: numbers, unless `is_text`; a narrow terminal leaves out columns that are `is_wide`."""

    title: str
    is_text: bool = False
    is_wide: bool = False


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes:
        rows: cells as plain text, one per column; a narrow terminal leaves out what follows " (".
        notes: lines below the table.
        figures: caption and SVG of each plot; pages show them.
        is_page_only: terminals leave the section out.
    """

    title: str
    columns: Sequence[Column] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    figures: Sequence[tuple[str, str]] = field(default=(), repr=False)
    is_page_only: bool = False


def describe_machine(report: BenchmarkReport) -> str:
    """Return what ran where: "a CPU, 2 cores. onnxruntime … (cpu, 2 threads), fp32. Clock: monotonic."."""
    cpu, gpus = report.environment["cpu"], report.environment["gpus"]
    machine = [f"{cpu['model']}, {cpu['physical_cores']} cores", *(gpu["name"] for gpu in gpus)]
    runners = dict.fromkeys(f"{r.condition.runner}, {r.condition.precision}" for r in report.conditions)
    clocks = dict.fromkeys(result.clock for result in report.conditions)
    return f"{'; '.join(machine)}. {'; '.join(runners)}. Clock: {', '.join(clocks)}."


def list_sections(report: BenchmarkReport) -> list[Section]:
    """Return the sections of a report, the most important first."""
    conditions = report.conditions
    stage_bars = [
        (r.condition.name, {name: ms for name in ALL_STAGES if (ms := r.stages[name].per_run_ms or 0.0) > 0})
        for r in conditions
    ]
    lines = []
    for result in conditions:  # of every bunch of runs the largest, so that no outlier is lost
        times_ms = result.samples.image_ms
        bunch_size = -(-len(times_ms) // MAX_POINTS)
        starts = range(0, len(times_ms), bunch_size)
        points = [(1.0 + i, max(times_ms[i : i + bunch_size])) for i in starts]
        lines.append(ChartLine(result.condition.name, points))
    runs_chart = draw_line_chart(lines, "round", "ms a run", markers=False)
    return [
        Section(
            "A run, from the request to encoded pictures (ms)",
            [
                *(Column("", is_text=True), Column("precision", is_text=True, is_wide=True)),
                *(Column("NFE"), Column("px"), Column("batch")),
                *(Column(name, is_wide=name not in ("p50", "p95", "sd")) for name in _STATISTIC_NAMES),
                *(Column("runs"), Column("images/s")),
            ],
            [
                [
                    *(r.condition.label, r.condition.precision),
                    f"{r.nfe.get('predictor', 0):g}+{r.nfe.get('refiner', 0):g}",
                    *(str(r.condition.resolution), str(r.condition.batch), *_format_statistics(r.image)),
                    *(str(r.image.count), f"{r.images_per_s:.3g}"),
                ]
                for r in conditions
            ],
        ),
        _build_comparisons(report),
        Section(
            "Where the time goes (ms a run; median of one call × calls)",
            [Column("", is_text=True), Column("px"), Column("batch"), *map(Column, ALL_STAGES)],
            [
                [
                    *(result.condition.label, str(result.condition.resolution), str(result.condition.batch)),
                    *(_format_stage(result, name) for name in ALL_STAGES),
                ]
                for result in conditions
            ],
            figures=[("a run by stage (means)", draw_stacked_bars(stage_bars, "ms"))],
        ),
        Section(
            "Each stage, call by call (ms)",
            [
                *(Column("", is_text=True), Column("stage", is_text=True), Column("calls a run"), Column("a run")),
                *(*map(Column, _STATISTIC_NAMES), Column("calls")),
            ],
            [
                [
                    *(result.condition.name, name, f"{stage.calls_per_run:g}", format_ms(stage.per_run_ms)),
                    *(*_format_statistics(stage), str(stage.count)),
                ]
                for result in conditions
                for name in ALL_STAGES
                if (stage := result.stages[name]).count
            ],
            is_page_only=True,
        ),
        Section("How it grows", figures=_draw_curves(conditions), is_page_only=True),
        Section(
            "Every run, in order",
            figures=[("time of each run: outliers and drifts show here", runs_chart)],
            is_page_only=True,
        ),
        _build_cold_starts(report),
        _build_memory(report),
        _build_energy(conditions),
        Section(
            "Where it was measured",
            [Column("", is_text=True), Column("", is_text=True)],
            [
                [name, _format_value(value)]
                for name, value in {
                    **report.environment,
                    "yardstick (fixed arithmetic), ms": to_json(report.yardstick),
                    "engines": report.engines,
                }.items()
            ],
            is_page_only=True,
        ),
    ]


def describe_method(report: BenchmarkReport) -> str:
    """Return how the report was measured."""
    conditionings = dict.fromkeys(r.condition.conditioning for r in report.conditions)
    runs_needed = ", ".join(f"p{p} {count_required_samples(p)}" for p in (90, 95, 99))
    return (
        f"Up to {report.rounds['taken']} rounds, in each every condition once in a new random order. Nothing is "
        f"discarded. Conditioning: {', '.join(conditionings)}. Percentiles need runs ({runs_needed}); – where there "
        "are fewer."
    )


def _build_comparisons(report: BenchmarkReport) -> Section:
    notes = []
    for comparison in report.comparisons:
        result, other = report.conditions[comparison.condition], report.conditions[comparison.against]
        error = comparison.latents_off
        agreement = "" if error is None else f"; latents differ by {error:.2g} relative rms"
        notes.append(
            f"{result.condition.label} is {format_ratio(comparison.ratio)} as fast as {other.condition.label} "
            f"({result.condition.resolution} px, batch {result.condition.batch}{agreement})"
        )
    return Section("Compared (ratio of medians and its 99 % interval)", notes=notes)


def _build_cold_starts(report: BenchmarkReport) -> Section:
    """Describe each start, and draw its parts as bars."""
    notes, bars = [], []
    for cold in report.cold:
        name = f"{cold.engine} {cold.resolution} px, caches {cold.caches}"
        notes.append(
            f"first picture of a fresh process, {name}: {cold.total_ms:.0f} ms = start {cold.process_ms:.0f} + import "
            f"{cold.import_ms:.0f} + load {cold.load_ms:.0f} + first run {cold.first_image_ms:.0f} (second run "
            f"{cold.second_image_ms:.0f})"
        )
        parts = {"start of Python": cold.process_ms, "import": cold.import_ms, "load": cold.load_ms}
        bars.append((name, {**parts, "first run": cold.first_image_ms}))
    if notes:
        compile_notes = "; ".join(dict.fromkeys(cold.compile_note for cold in report.cold))
        notes.append(f"compilation: {compile_notes}. The files were in the system's page cache.")
    figures = [("from the command to the first picture", draw_stacked_bars(bars, "ms"))] if bars else []
    return Section("First picture of a fresh process", notes=notes, figures=figures)


def _build_memory(report: BenchmarkReport) -> Section:
    memory = report.memory
    notes = [f"this process, with all that it compared: peak {format_mib(memory.process.peak_rss_bytes)}"]
    if memory.gpu.used_bytes_after is not None:
        before, after = format_mib(memory.gpu.used_bytes_before), format_mib(memory.gpu.used_bytes_after)
        notes.append(f"GPU memory in use by all programs: {before} before, {after} after")
    columns = ("px", "weights", "peak", "resident", "anonymous", "of files")
    return Section(
        "Memory of one directory alone",
        [Column("", is_text=True), *map(Column, columns)],
        [
            [
                *(entry.engine, str(entry.resolution), format_mib(entry.weight_bytes)),
                *(format_mib(entry.peak_rss_bytes), format_mib(entry.rss_bytes)),
                *(format_mib(entry.anonymous_bytes), format_mib(entry.file_bytes)),
            ]
            for entry in memory.alone
        ],
        notes,
    )


def _build_energy(results: Sequence[ConditionResult]) -> Section:
    rows, reasons = [], []
    for result in results:
        if (energy := result.energy) is None:
            reasons.append(f"energy: not known, {result.energy_problem}")
            continue
        watts = f"{energy.joules_per_image:.3g}", f"{energy.watts:.3g}", f"{energy.idle_watts:.3g}"
        rows.append([result.condition.name, *watts, f"{energy.meter}: {energy.what}", str(energy.images)])
    columns = [Column("", is_text=True), *map(Column, ("J a picture", "W", "W idle"))]
    return Section(
        "Energy", [*columns, Column("meter", is_text=True), Column("pictures")], rows, list(dict.fromkeys(reasons))
    )


def _format_stage(result: ConditionResult, name: str) -> str:
    stage = result.stages[name]
    calls = f" ({format_ms(stage.p50_ms)} × {stage.calls_per_run:g})" if stage.calls_per_run > 1 else ""
    return f"{format_ms(stage.per_run_ms)}{calls}" if stage.count else "–"


def _draw_curves(results: Sequence[ConditionResult]) -> list[tuple[str, str]]:
    """Draw latency and throughput by batch, and latency by resolution and by evaluations, where these vary.

    A line joins the conditions that differ in x alone.
    """
    x_values: dict[str, Callable[[ConditionResult], float]] = {
        "images at once": lambda r: r.condition.batch,
        "pixels a side": lambda r: r.condition.resolution,
        "evaluations of both networks": lambda r: r.nfe.get("predictor", 0) + r.nfe.get("refiner", 0),
    }
    curves = [(label, _LATENCY_LABEL) for label in x_values]
    curves.insert(1, ("images at once", "images/s"))
    figures = []
    for x_label, y_label in curves:
        get_x, has_bars = x_values[x_label], y_label == _LATENCY_LABEL
        groups: dict[str, list[ConditionResult]] = {}
        for result in results:
            c = result.condition
            fixed = {
                "images at once": f"{c.sampler} {c.resolution} px",
                "pixels a side": f"{c.sampler} × {c.batch}",
            }.get(x_label, f"{c.resolution} px × {c.batch}")
            groups.setdefault(f"{c.maker} {fixed}", []).append(result)
        lines = []
        for name, group in groups.items():
            if len({get_x(result) for result in group}) > 1:
                ordered = sorted(group, key=get_x)
                points = [(get_x(r), (r.image.p50_ms or 0.0) if has_bars else r.images_per_s) for r in ordered]
                bars = [(r.image.min_ms or 0.0, r.image.p90_ms or r.image.max_ms or 0.0) for r in ordered]
                lines.append(ChartLine(name, points, bars if has_bars else ()))
        if lines:
            caption = f"{y_label.split(' (')[0]} by {x_label}"
            figures.append((caption, draw_line_chart(lines, x_label, y_label)))
    return figures


def _format_statistics(statistics: Statistics) -> list[str]:
    return [format_ms(getattr(statistics, f"{name}_ms")) for name in _STATISTIC_NAMES]


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_format_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_format_value, value)) or "none"
    return "unknown" if value is None else str(value)


def format_ms(value: float | None) -> str:
    """Return milliseconds with three digits, or none after the point if that is more; – for too few samples."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def format_ratio(ratio: Ratio) -> str:
    """Return "1.52 × (1.48 to 1.57)"."""
    spread = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{ratio.value:.2f} ×{spread}"


def format_mib(size: int | None) -> str:
    """Return bytes as MiB."""
    return "unknown" if size is None else f"{size / 2**20:.0f} MiB"
