"""The report as one HTML page: no script, no style sheet, no picture from anywhere else; it opens offline.

The page carries its own data: the report's JSON stands in it, in an element that browsers do not run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flowturbo.evaluation.speed.bench_report import ALL_STAGES, BenchmarkReport, ConditionResult
from flowturbo.evaluation.speed.conditions import ENGINES
from flowturbo.evaluation.speed.statistics import count_required_samples
from flowturbo.evaluation.speed.svg import ChartLine, draw_line_chart, draw_stacked_bars
from flowturbo.evaluation.speed.terminal_tables import format_mib, format_ms, format_nfe, format_ratio, format_row_label
from runtime.system.files import write_atomically
from runtime.system.json_codec import to_json

_STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.2rem 0.6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child, table.facts td { text-align: left; } td:first-child { white-space: nowrap; }
.wide { overflow-x: auto; margin-bottom: 1rem; } .plots { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 0; max-width: 100%; } figcaption { font-weight: 600; margin-bottom: 0.3rem; }
svg { max-width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; } .grid { stroke: var(--line); }
.warning { border-left: 4px solid #d55e00; padding-left: 0.7rem; margin: 0.3rem 0; } small { opacity: 0.75; }
"""
_STATISTIC_NAMES = ("p50", "p90", "p95", "p99", "mean", "sd", "min", "max")
MAX_POINTS = 400
"""Of a line over the runs; more are thinned out in the plot (the largest of each bunch stays), never in the data."""


def write_page(path: Path, report: BenchmarkReport) -> None:
    """Writes the page, whole or not at all."""
    with write_atomically(path) as aside:
        aside.write_text(render_html(report), encoding="utf-8")


def render_html(report: BenchmarkReport) -> str:
    """The page's text."""
    sections = [
        _render_head(report),
        *(f'<p class="warning">{escape(text)}</p>' for text in report.warnings),
        _render_section("Pictures", _render_images(report), _render_comparisons(report)),
        _render_section(
            "Where the time goes",
            _render_figure("a run by stage (means)", _render_stage_bars(report.conditions)),
            _render_stages(report),
        ),
        _render_section("How it grows", *_render_curves(report.conditions)),
        _render_section("Every run, in order", *_render_runs(report)),
        _render_section("First picture of a fresh process", _render_cold_starts(report)),
        _render_section("Memory", _render_memory(report)),
        _render_section("Energy", _render_energy(report)),
        _render_section("Where it was measured", _render_environment(report)),
    ]
    data = json.dumps(to_json(report), ensure_ascii=False).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # browsers ask for /favicon.ico otherwise
        f"<title>flowturbo-bench {escape(report.created)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + f'\n<script type="application/json" id="report">{data}</script>\n</body></html>\n'
    )


def _render_head(report: BenchmarkReport) -> str:
    runners = dict.fromkeys(f"{r.condition.runner}, {r.condition.precision}" for r in report.conditions)
    cpu, gpus = report.environment["cpu"], report.environment["gpus"]
    machine = [f"{cpu['model']}, {cpu['physical_cores']} cores", *(gpu["name"] for gpu in gpus)]
    return (
        f"<h1>What a picture takes</h1><p><small>{escape(report.created)}, flowturbo {escape(report.flowturbo)}, "
        f"<code>{escape(' '.join(report.command))}</code></small></p>"
        f"<p>{escape('; '.join(machine))}. {escape('; '.join(runners))}. {_render_method(report)}</p>"
    )


def _render_method(report: BenchmarkReport) -> str:
    rounds, conditionings = report.rounds, dict.fromkeys(r.condition.conditioning for r in report.conditions)
    runs_needed = ", ".join(f"p{p} {count_required_samples(p)}" for p in (90, 95, 99))
    return escape(
        f"Up to {rounds['taken']} rounds, in each every condition once in an order drawn anew. Nothing is discarded. "
        f"Conditioning: {', '.join(conditionings)}. Percentiles need runs ({runs_needed}); – where there are fewer."
    )


def _render_section(title: str, *parts: str) -> str:
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _render_table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are text and escaped here."""
    head_cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head_row = f"<thead><tr>{head_cells}</tr></thead>" if head else ""
    return f'<div class="wide"><table class="{kind}">{head_row}<tbody>{body}</tbody></table></div>'


def _render_figure(caption: str, plot: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{plot}</figure>"


def _render_images(report: BenchmarkReport) -> str:
    head = ("", "precision", "NFE", "px", "batch", *(f"{n} ms" for n in _STATISTIC_NAMES), "runs", "images/s")
    rows = []
    for result in report.conditions:
        condition, image = result.condition, result.image
        numbers = [format_ms(getattr(image, f"{name}_ms")) for name in _STATISTIC_NAMES]
        labels = [
            format_row_label(result),
            condition.precision,
            format_nfe(result),
            str(condition.resolution),
            str(condition.batch),
        ]
        rows.append([*labels, *numbers, str(image.count), f"{result.images_per_s:.3g}"])
    return _render_table(head, rows)


def _render_comparisons(report: BenchmarkReport) -> str:
    rows = []
    for comparison in report.comparisons:
        result, other = report.conditions[comparison.condition], report.conditions[comparison.against]
        rms_error = "" if comparison.latents_off is None else f"{comparison.latents_off:.2g}"
        setup = f"{result.condition.resolution} px × {result.condition.batch}"
        rows.append(
            [format_row_label(result), format_row_label(other), setup, format_ratio(comparison.ratio), rms_error]
        )
    head = ("", "against", "", "times as fast (99 % interval)", "latents differ by (relative rms)")
    return _render_table(head, rows) if rows else ""


def _render_stage_bars(results: Sequence[ConditionResult]) -> str:
    rows = []
    for result in results:
        parts = {name: max(result.stages[name].per_run_ms or 0.0, 0.0) for name in ALL_STAGES}
        rows.append((result.condition.name, {name: value for name, value in parts.items() if value}))
    return draw_stacked_bars(rows, "ms")


def _render_stages(report: BenchmarkReport) -> str:
    head = ("", "stage", "calls a run", "ms a run", *(f"{n} ms" for n in _STATISTIC_NAMES), "calls")
    rows = []
    for result in report.conditions:
        for name in ALL_STAGES:
            stage = result.stages[name]
            if stage.count:
                numbers = [format_ms(getattr(stage, f"{number}_ms")) for number in _STATISTIC_NAMES]
                labels = [result.condition.name, name, f"{stage.calls_per_run:g}", format_ms(stage.per_run_ms)]
                rows.append([*labels, *numbers, str(stage.count)])
    return f"<details><summary>each stage, call by call</summary>{_render_table(head, rows)}</details>"


def _render_curves(results: Sequence[ConditionResult]) -> list[str]:
    """Latency and throughput by batch, latency by resolution and by evaluations, where there are several of them."""
    latency: Callable[[ConditionResult], float] = lambda result: result.image.p50_ms or 0.0  # noqa: E731
    plots = [
        _render_curve(
            results, "images at once", "ms a run (p50; bars: min to p90)", lambda r: r.condition.batch, latency
        ),
        _render_curve(results, "images at once", "images/s", lambda r: r.condition.batch, lambda r: r.images_per_s),
        _render_curve(
            results, "pixels a side", "ms a run (p50; bars: min to p90)", lambda r: r.condition.resolution, latency
        ),
        _render_curve(
            results, "evaluations of both networks", "ms a run (p50; bars: min to p90)", _count_evaluations, latency
        ),
    ]
    figures = [_render_figure(caption, plot) for caption, plot in plots if plot]
    return ['<div class="plots">', *figures, "</div>"] if figures else []


def _count_evaluations(result: ConditionResult) -> float:
    return result.nfe.get("predictor", 0) + result.nfe.get("refiner", 0)


def _render_curve(
    results: Sequence[ConditionResult],
    x_label: str,
    y_label: str,
    x: Callable[[ConditionResult], float],
    y: Callable[[ConditionResult], float],
) -> tuple[str, str]:
    """One line for everything that differs in x alone; "" where nothing does."""
    groups: dict[str, list[ConditionResult]] = {}
    for result in results:
        condition = result.condition
        fixed_labels = {
            "images at once": (condition.sampler, f"{condition.resolution} px"),
            "pixels a side": (condition.sampler, f"× {condition.batch}"),
        }.get(x_label, (f"{condition.resolution} px", f"× {condition.batch}"))
        name = condition.engine if condition.implementation == ENGINES else condition.implementation
        groups.setdefault(" ".join((name, *fixed_labels)), []).append(result)
    lines = []
    for name, group in groups.items():
        if len({x(result) for result in group}) > 1:
            ordered = sorted(group, key=x)
            bars = [(r.image.min_ms or 0.0, r.image.p90_ms or r.image.max_ms or 0.0) for r in ordered]
            lines.append(ChartLine(name, [(x(r), y(r)) for r in ordered], bars if "bars" in y_label else ()))
    return f"{y_label.split(' (')[0]} by {x_label}", draw_line_chart(lines, x_label, y_label) if lines else ""


def _render_runs(report: BenchmarkReport) -> list[str]:
    lines = [ChartLine(r.condition.name, _thin_out(r.samples.image_ms)) for r in report.conditions]
    return [
        _render_figure(
            "time of each run: outliers and drifts show here",
            draw_line_chart(lines, "round", "ms a run", markers=False),
        )
    ]


def _thin_out(values: Sequence[float]) -> list[tuple[float, float]]:
    """The largest of every bunch, so that no outlier is lost."""
    bunch_size = -(-len(values) // MAX_POINTS)
    bunches = [values[start : start + bunch_size] for start in range(0, len(values), bunch_size)]
    return [(1.0 + index * bunch_size, max(bunch)) for index, bunch in enumerate(bunches)]


def _render_cold_starts(report: BenchmarkReport) -> str:
    if not report.cold:
        return ""
    bars = [
        (
            f"{cold.engine} {cold.resolution} px, caches {cold.caches}",
            {
                "start of Python": cold.process_ms,
                "import": cold.import_ms,
                "load": cold.load_ms,
                "first run": cold.first_image_ms,
            },
        )
        for cold in report.cold
    ]
    notes = dict.fromkeys(cold.compile_note for cold in report.cold)
    note = f"Compilation is not told apart: {'; '.join(notes)}. The files were in the system's page cache."
    return (
        _render_figure("from the command to the first picture", draw_stacked_bars(bars, "ms"))
        + f"<p><small>{escape(note)}</small></p>"
    )


def _render_memory(report: BenchmarkReport) -> str:
    head = ("one directory alone", "px", "weights", "peak", "resident", "anonymous", "of files")
    keys = ("weight_bytes", "peak_rss_bytes", "rss_bytes", "anonymous_bytes", "file_bytes")
    rows = [
        [str(entry["engine"]), str(entry["resolution"]), *(format_mib(entry[key]) for key in keys)]
        for entry in report.memory["alone"]
    ]
    process = report.memory["process"]
    note = f"This process, with all that it compared: peak {format_mib(process['peak_rss_bytes'])}."
    gpu = report.memory["gpu"]
    if gpu["used_bytes_after"] is not None:
        before, after = format_mib(gpu["used_bytes_before"]), format_mib(gpu["used_bytes_after"])
        note += f" GPU memory in use by everybody: {before} before, {after} after."
    return (_render_table(head, rows) if rows else "") + f"<p><small>{escape(note)}</small></p>"


def _render_energy(report: BenchmarkReport) -> str:
    rows = [
        [
            r.condition.name,
            f"{e.joules_per_image:.3g}",
            f"{e.watts:.3g}",
            f"{e.idle_watts:.3g}",
            f"{e.meter}: {e.what}",
            str(e.images),
        ]
        for r in report.conditions
        if (e := r.energy) is not None
    ]
    if rows:
        return _render_table(("", "J a picture", "W", "W idle", "meter", "pictures"), rows)
    reasons = "; ".join(dict.fromkeys(r.energy_problem for r in report.conditions))
    return f"<p>Not known: {escape(reasons)}.</p>"


def _render_environment(report: BenchmarkReport) -> str:
    facts = {
        **report.environment,
        "yardstick (fixed arithmetic), ms": to_json(report.yardstick),
        "engines": dict(report.engines),
    }
    return _render_table((), [[name, _format_value(value)] for name, value in facts.items()], "facts")


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_format_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_format_value, value)) or "none"
    return "unknown" if value is None else str(value)
