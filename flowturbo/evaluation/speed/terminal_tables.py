"""Reports for people at a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowturbo.evaluation.speed.bench_report import ALL_STAGES, BenchmarkReport, ConditionResult
from flowturbo.evaluation.speed.conditions import ENGINES
from flowturbo.evaluation.speed.report_diff import ConditionChange, ReportDiff
from flowturbo.evaluation.speed.roofline import MachineLimits, Prediction, StageUtilization
from flowturbo.evaluation.speed.statistics import Ratio

MIN_WIDE_COLUMNS = 130
"""Columns of a terminal that shows every number."""
_ALL_STATISTICS = ("p50", "p90", "p95", "p99", "mean", "sd", "min", "max")
_NARROW_STATISTICS = ("p50", "p95", "sd")
_VERDICT_STYLES = {
    "slower": "bold red",
    "faster": "bold green",
    "same": "green",
    "unclear": "yellow",
    "too few samples": "yellow",
}


def render_benchmark(report: BenchmarkReport, console: Console) -> None:
    """The whole report, shortest first."""
    console.print(_format_machine(report), soft_wrap=True, highlight=False)
    console.print(_build_image_table(report, console.width))
    console.print(_build_stage_table(report.conditions, console.width))
    for line in (
        *_format_comparisons(report),
        *_format_cold_starts(report),
        *_format_memory(report),
        *_format_energy(report),
    ):
        console.print(line, soft_wrap=True, highlight=False)
    for warning in report.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}", soft_wrap=True, highlight=False)


def _format_machine(report: BenchmarkReport) -> str:
    cpu, gpus = report.environment["cpu"], report.environment["gpus"]
    parts = [f"{cpu['model']}, {cpu['physical_cores']} cores", *(gpu["name"] for gpu in gpus)]
    runners = dict.fromkeys(result.condition.runner for result in report.conditions)
    clocks = dict.fromkeys(result.clock for result in report.conditions)
    return escape(f"{'; '.join(parts)}. {'; '.join(runners)}. Clock: {', '.join(clocks)}")


def _build_table(title: str, columns: Sequence[str], text_columns: Sequence[str] = ("",)) -> Table:
    """A table whose columns hold numbers, but those of `text_columns`."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in text_columns else "right", overflow="fold")
    return table


def _build_image_table(report: BenchmarkReport, width: int) -> Table:
    """Runs; a narrow terminal shows fewer numbers, the JSON and the page have all."""
    is_wide = width >= MIN_WIDE_COLUMNS
    numbers, precision = (_ALL_STATISTICS, ("precision",)) if is_wide else (_NARROW_STATISTICS, ())
    columns = ("", *precision, "NFE", "px", "batch", *numbers, "runs", "images/s")
    table = _build_table("a run, from the request to encoded pictures (ms)", columns, ("", "precision"))
    for result in report.conditions:
        condition = result.condition
        table.add_row(
            escape(format_row_label(result)), *([condition.precision] if is_wide else []), format_nfe(result),
            str(condition.resolution), str(condition.batch),
            *(format_ms(getattr(result.image, f"{name}_ms")) for name in numbers),
            str(result.image.count), f"{result.images_per_s:.3g}",
        )  # fmt: skip
    return table


def _build_stage_table(results: Sequence[ConditionResult], width: int) -> Table:
    is_wide = width >= MIN_WIDE_COLUMNS
    title = f"of which (ms a run{'; median of one call × calls' if is_wide else ''})"
    heads = ALL_STAGES if is_wide else tuple(name[:5] for name in ALL_STAGES)
    table = _build_table(title, ("", "px", "batch", *heads))
    for result in results:
        cells = []
        for name in ALL_STAGES:
            stage = result.stages[name]
            has_many_calls = is_wide and stage.calls_per_run > 1
            calls = f" ({format_ms(stage.p50_ms)} × {stage.calls_per_run:g})" if has_many_calls else ""
            cells.append(f"{format_ms(stage.per_run_ms)}{calls}" if stage.count else "–")
        table.add_row(
            escape(format_row_label(result)), str(result.condition.resolution), str(result.condition.batch), *cells
        )
    return table


def format_row_label(result: ConditionResult) -> str:
    """What a row is about: "engines H1P5R3"."""
    condition = result.condition
    return (
        f"{condition.engine if condition.implementation == ENGINES else condition.implementation} {condition.sampler}"
    )


def format_nfe(result: ConditionResult) -> str:
    """Evaluations of predictor + refiner."""
    return f"{result.nfe.get('predictor', 0):g}+{result.nfe.get('refiner', 0):g}"


def format_ms(value: float | None) -> str:
    """Milliseconds with three digits or none after the point, whichever is more; – where there are too few samples."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def format_ratio(ratio: Ratio, unit: str = "×") -> str:
    """ "1.52 × (1.48 to 1.57)"."""
    spread = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{ratio.value:.2f} {unit}{spread}"


def _format_comparisons(report: BenchmarkReport) -> list[str]:
    lines = []
    for comparison in report.comparisons:
        result, other = report.conditions[comparison.condition], report.conditions[comparison.against]
        agreement_text = (
            f"; latents differ by {comparison.latents_off:.2g} relative rms"
            if comparison.latents_off is not None
            else ""
        )
        setup = f"{result.condition.resolution} px, batch {result.condition.batch}"
        ratio = format_ratio(comparison.ratio)
        faster = (
            f"[bold]{escape(format_row_label(result))}[/bold] is {ratio} as fast as {escape(format_row_label(other))}"
        )
        lines.append(f"{faster} ({setup}{agreement_text})")
    return lines


def _format_cold_starts(report: BenchmarkReport) -> list[str]:
    return [
        f"first picture of a fresh process, {escape(cold.engine)} {cold.resolution} px, caches {cold.caches}: "
        f"{cold.total_ms:.0f} ms = start {cold.process_ms:.0f} + import {cold.import_ms:.0f} + load {cold.load_ms:.0f} "
        f"+ first run {cold.first_image_ms:.0f} (second run {cold.second_image_ms:.0f})"
        for cold in report.cold
    ]


def _format_memory(report: BenchmarkReport) -> list[str]:
    lines = []
    for entry in report.memory["alone"]:
        weights = f", weights {format_mib(entry['weight_bytes'])}" if entry["weight_bytes"] else ""
        lines.append(
            f"memory of {escape(entry['engine'])} {entry['resolution']} px alone: peak "
            f"{format_mib(entry['peak_rss_bytes'])}, "
            f"of which anonymous at the end {format_mib(entry['anonymous_bytes'])}{weights}"
        )
    return lines


def format_mib(size: int | None) -> str:
    """Bytes as MiB."""
    return "unknown" if size is None else f"{size / 2**20:.0f} MiB"


def _format_energy(report: BenchmarkReport) -> list[str]:
    lines = [
        f"energy of {escape(result.condition.name)}: {energy.joules_per_image:.3g} J a picture at {energy.watts:.3g} W "
        f"(idle {energy.idle_watts:.3g} W), {energy.meter} of {energy.what}"
        for result in report.conditions
        if (energy := result.energy) is not None
    ]
    reasons = dict.fromkeys(r.energy_problem for r in report.conditions if r.energy is None)
    return lines + [f"energy: not known, {escape(reason)}" for reason in reasons]


def render_comparison(diff: ReportDiff, console: Console) -> None:
    """What changed, and how sure that is."""
    columns = ("", "before ms", "after ms", "ratio", "99 % interval", "verdict", "stages that moved")
    table = _build_table("time after over time before (a run, medians)", columns, ("", *columns[4:]))
    for change in diff.changes:
        low, high = change.ratio.low, change.ratio.high
        table.add_row(
            escape(change.name), format_ms(change.before_ms), format_ms(change.after_ms), f"{change.ratio.value:.3f}",
            "–" if low is None or high is None else f"{low:.3f} to {high:.3f}",
            f"[{_VERDICT_STYLES[change.verdict]}]{change.verdict}[/]", _format_moved_stages(change, diff.min_effect),
        )  # fmt: skip
    console.print(table)
    for side, names in (("before", diff.only_before), ("after", diff.only_after)):
        for name in names:
            console.print(f"only {side}: {escape(name)}", soft_wrap=True, highlight=False)
    for warning in diff.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}", soft_wrap=True, highlight=False)


def _format_moved_stages(change: ConditionChange, min_effect: float) -> str:
    moved = {
        name: r for name, r in change.stages.items() if r is not None and not 1 / (1 + min_effect) < r < 1 + min_effect
    }
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in moved.items())


def render_roofline(predictions: Sequence[Prediction], console: Console, title: str) -> None:
    """Estimates by device, a table for each sampler; every title says what they are."""
    for sampler in dict.fromkeys(p.sampler for p in predictions):
        sampler_predictions = [p for p in predictions if p.sampler == sampler]
        models = dict.fromkeys(p.model for p in sampler_predictions)
        heading = f"ESTIMATES, not measurements: ms per picture, {sampler}, {title}"
        table = _build_table(heading, ("device", "TFLOP/s", "GB/s", "share", *models), ("device",))
        for device in dict.fromkeys(p.device for p in sampler_predictions):
            cells = [_format_estimate(p) for p in sampler_predictions if p.device == device]
            rate = f"{device.tflops:g} {device.precision}"
            table.add_row(device.name, rate, f"{device.gbytes:g}", f"{device.efficiency:g}", *cells)
        console.print(table)
    has_unknown_decoder = any(p.decoder_ms is None for p in predictions)
    note = "; ?: its manifest does not describe the decoder, build the directory again" if has_unknown_decoder else ""
    console.print(f"sampling + decoder; share: of the peak that is reached, a rule of thumb{note}", highlight=False)


def _format_estimate(prediction: Prediction) -> str:
    decoder_ms = prediction.decoder_ms
    decoder_text = " + ?" if decoder_ms is None else f" + {format_ms(decoder_ms)}" if decoder_ms else ""
    return f"~{format_ms(prediction.sampling_ms)}{decoder_text}"


def render_limits(limits: MachineLimits, console: Console) -> None:
    """What this machine can do."""
    rates = ", ".join(f"{name} {value / 1e9:.3g} GFLOP/s" for name, value in limits.flops_per_s.items())
    console.print(
        f"this machine, measured: matrix product {rates}; copy {limits.bytes_per_s / 1e9:.1f} GB/s read and written "
        f"({escape(limits.note)})",
        soft_wrap=True,
        highlight=False,
    )


def render_utilization(name: str, rows: Sequence[StageUtilization], console: Console) -> None:
    """What engines reach of it."""
    columns = ("stage", "ms a run", "GFLOP/s", "least ms", "bound by", "reached")
    table = _build_table(f"{name}: measured, and what the limits above allow", columns, ("stage", "bound by"))
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
