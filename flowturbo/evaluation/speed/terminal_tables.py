"""Print reports on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowturbo.evaluation.speed.bench_report import BenchmarkReport
from flowturbo.evaluation.speed.report_diff import ReportDiff
from flowturbo.evaluation.speed.report_sections import Column, describe_machine, format_ms, list_sections
from flowturbo.evaluation.speed.roofline import MachineLimits, Prediction, StageUtilization

MIN_WIDE_COLUMNS = 130
"""Columns of a terminal that shows every number."""
_VERDICT_STYLES = {
    "slower": "bold red",
    "faster": "bold green",
    "same": "green",
    "unclear": "yellow",
    "too few samples": "yellow",
}


def render_benchmark(report: BenchmarkReport, console: Console) -> None:
    """Print the report. A narrow terminal shows fewer numbers; the JSON file and the page have all."""
    console.print(escape(describe_machine(report)), soft_wrap=True, highlight=False)
    for section in list_sections(report):
        if section.is_page_only:
            continue
        if section.rows:
            is_wide = console.width >= MIN_WIDE_COLUMNS
            shown = [i for i, column in enumerate(section.columns) if is_wide or not column.is_wide]
            table = _build_table(section.title, [section.columns[i] for i in shown])
            for row in section.rows:
                table.add_row(*(escape(row[i] if is_wide else row[i].partition(" (")[0]) for i in shown))
            console.print(table)
        for note in section.notes:
            console.print(escape(note), soft_wrap=True, highlight=False)
    _print_warnings(report.warnings, console)


def _build_table(title: str, columns: Sequence[Column]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="left" if column.is_text else "right", overflow="fold")
    return table


def _build_text_table(title: str, columns: Sequence[str], text_columns: Sequence[str]) -> Table:
    return _build_table(title, [Column(name, name in text_columns) for name in columns])


def _print_warnings(warnings: Sequence[str], console: Console) -> None:
    for warning in warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}", soft_wrap=True, highlight=False)


def render_comparison(diff: ReportDiff, console: Console) -> None:
    """Print what changed between two reports, and how sure that is."""
    columns = ("", "before ms", "after ms", "ratio", "99 % interval", "verdict", "stages that moved")
    table = _build_text_table("time after over time before (a run, medians)", columns, ("", *columns[4:]))
    for change in diff.changes:
        low, high, unmoved = change.ratio.low, change.ratio.high, 1 + diff.min_effect
        moved = {name: r for name, r in change.stages.items() if r is not None and not 1 / unmoved < r < unmoved}
        table.add_row(
            escape(change.name), format_ms(change.before_ms), format_ms(change.after_ms), f"{change.ratio.value:.3f}",
            "–" if low is None or high is None else f"{low:.3f} to {high:.3f}",
            f"[{_VERDICT_STYLES[change.verdict]}]{change.verdict}[/]",
            ", ".join(f"{name} {ratio:.2f}" for name, ratio in moved.items()),
        )  # fmt: skip
    console.print(table)
    for side, names in (("before", diff.only_before), ("after", diff.only_after)):
        for name in names:
            console.print(f"only {side}: {escape(name)}", soft_wrap=True, highlight=False)
    _print_warnings(diff.warnings, console)


def render_roofline(predictions: Sequence[Prediction], console: Console, title: str) -> None:
    """Print estimates by device, a table for each sampler."""
    for sampler in dict.fromkeys(p.sampler for p in predictions):
        sampler_predictions = [p for p in predictions if p.sampler == sampler]
        models = dict.fromkeys(p.model for p in sampler_predictions)
        heading = f"ESTIMATES, not measurements: ms per picture, {sampler}, {title}"
        table = _build_text_table(heading, ("device", "TFLOP/s", "GB/s", "share", *models), ("device",))
        for device in dict.fromkeys(p.device for p in sampler_predictions):
            cells = []
            for p in sampler_predictions:
                if p.device == device:
                    decoder = (
                        " + ?" if p.decoder_ms is None else f" + {format_ms(p.decoder_ms)}" if p.decoder_ms else ""
                    )
                    cells.append(f"~{format_ms(p.sampling_ms)}{decoder}")
            rate = f"{device.tflops:g} {device.precision}"
            table.add_row(device.name, rate, f"{device.gbytes:g}", f"{device.efficiency:g}", *cells)
        console.print(table)
    has_unknown_decoder = any(p.decoder_ms is None for p in predictions)
    note = "; ?: its manifest does not describe the decoder, build the directory again" if has_unknown_decoder else ""
    console.print(f"sampling + decoder; share: of the peak that is reached, a rule of thumb{note}", highlight=False)


def render_limits(limits: MachineLimits, console: Console) -> None:
    """Print what this machine can do."""
    rates = ", ".join(f"{name} {value / 1e9:.3g} GFLOP/s" for name, value in limits.flops_per_s.items())
    console.print(
        f"this machine, measured: matrix product {rates}; copy {limits.bytes_per_s / 1e9:.1f} GB/s read and written "
        f"({escape(limits.note)})",
        soft_wrap=True,
        highlight=False,
    )


def render_utilization(name: str, rows: Sequence[StageUtilization], console: Console) -> None:
    """Print the share of the machine's limits that engines reach."""
    columns = ("stage", "ms a run", "GFLOP/s", "least ms", "bound by", "reached")
    table = _build_text_table(f"{name}: measured, and what the limits above allow", columns, ("stage", "bound by"))
    for row in rows:
        table.add_row(
            row.stage,
            format_ms(row.ms),
            f"{row.gflops_per_s:.3g}",
            format_ms(row.limit_ms),
            row.bound_by,
            f"{row.share:.0%}",
        )
    console.print(table)
