"""Reports for people at a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowturbo.evaluation.speed.bench_report import ALL_STAGES, ConditionResult, Report
from flowturbo.evaluation.speed.conditions import ENGINES
from flowturbo.evaluation.speed.report_diff import Change, Compared
from flowturbo.evaluation.speed.roofline import Achieved, Limits, Prediction
from flowturbo.evaluation.speed.statistics import Ratio

WIDE = 130
"""Columns of a terminal that shows every number."""
_NUMBERS = ("p50", "p90", "p95", "p99", "mean", "sd", "min", "max")
_FEW = ("p50", "p95", "sd")
_VERDICTS = {
    "slower": "bold red",
    "faster": "bold green",
    "same": "green",
    "unclear": "yellow",
    "too few samples": "yellow",
}


def render(report: Report, console: Console) -> None:
    """The whole report, shortest first."""
    console.print(_machine(report), soft_wrap=True, highlight=False)
    console.print(_images(report, console.width))
    console.print(_stages(report.conditions, console.width))
    for line in (*_ratios(report), *_colds(report), *_memory(report), *_energy(report)):
        console.print(line, soft_wrap=True, highlight=False)
    for warning in report.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}", soft_wrap=True, highlight=False)


def _machine(report: Report) -> str:
    cpu, gpus = report.environment["cpu"], report.environment["gpus"]
    parts = [f"{cpu['model']}, {cpu['physical_cores']} cores", *(gpu["name"] for gpu in gpus)]
    runners = dict.fromkeys(result.condition.runner for result in report.conditions)
    clocks = dict.fromkeys(result.clock for result in report.conditions)
    return escape(f"{'; '.join(parts)}. {'; '.join(runners)}. Clock: {', '.join(clocks)}")


def _table(title: str, columns: Sequence[str], text: Sequence[str] = ("",)) -> Table:
    """A table whose columns hold numbers, but those of `text`."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in text else "right", overflow="fold")
    return table


def _images(report: Report, width: int) -> Table:
    """Runs; a narrow terminal shows fewer numbers, the JSON and the page have all."""
    wide = width >= WIDE
    numbers, precision = (_NUMBERS, ("precision",)) if wide else (_FEW, ())
    columns = ("", *precision, "NFE", "px", "batch", *numbers, "runs", "images/s")
    table = _table("a run, from the request to encoded pictures (ms)", columns, ("", "precision"))
    for result in report.conditions:
        own = result.condition
        table.add_row(
            escape(who(result)), *([own.precision] if wide else []), nfe_text(result),
            str(own.resolution), str(own.batch),
            *(ms_text(getattr(result.image, f"{name}_ms")) for name in numbers),
            str(result.image.count), f"{result.images_per_s:.3g}",
        )  # fmt: skip
    return table


def _stages(results: Sequence[ConditionResult], width: int) -> Table:
    wide = width >= WIDE
    title = f"of which (ms a run{'; median of one call × calls' if wide else ''})"
    heads = ALL_STAGES if wide else tuple(name[:5] for name in ALL_STAGES)
    table = _table(title, ("", "px", "batch", *heads))
    for result in results:
        cells = []
        for name in ALL_STAGES:
            stage = result.stages[name]
            many = wide and stage.calls_per_run > 1
            calls = f" ({ms_text(stage.p50_ms)} × {stage.calls_per_run:g})" if many else ""
            cells.append(f"{ms_text(stage.per_run_ms)}{calls}" if stage.count else "–")
        table.add_row(escape(who(result)), str(result.condition.resolution), str(result.condition.batch), *cells)
    return table


def who(result: ConditionResult) -> str:
    """What a row is about: "engines H1P5R3"."""
    own = result.condition
    return f"{own.engine if own.implementation == ENGINES else own.implementation} {own.sampler}"


def nfe_text(result: ConditionResult) -> str:
    """Evaluations of predictor + refiner."""
    return f"{result.nfe.get('predictor', 0):g}+{result.nfe.get('refiner', 0):g}"


def ms_text(value: float | None) -> str:
    """Milliseconds with three digits or none after the point, whichever is more; – where there are too few samples."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def ratio_text(ratio: Ratio, unit: str = "×") -> str:
    """ "1.52 × (1.48 to 1.57)"."""
    spread = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{ratio.value:.2f} {unit}{spread}"


def _ratios(report: Report) -> list[str]:
    lines = []
    for found in report.comparisons:
        own, other = report.conditions[found.condition], report.conditions[found.against]
        agrees = f"; latents differ by {found.latents_off:.2g} relative rms" if found.latents_off is not None else ""
        where = f"{own.condition.resolution} px, batch {own.condition.batch}"
        faster = f"[bold]{escape(who(own))}[/bold] is {ratio_text(found.ratio)} as fast as {escape(who(other))}"
        lines.append(f"{faster} ({where}{agrees})")
    return lines


def _colds(report: Report) -> list[str]:
    return [
        f"first picture of a fresh process, {escape(cold.engine)} {cold.resolution} px, caches {cold.caches}: "
        f"{cold.total_ms:.0f} ms = start {cold.process_ms:.0f} + import {cold.import_ms:.0f} + load {cold.load_ms:.0f} "
        f"+ first run {cold.first_image_ms:.0f} (second run {cold.second_image_ms:.0f})"
        for cold in report.cold
    ]


def _memory(report: Report) -> list[str]:
    lines = []
    for alone in report.memory["alone"]:
        weights = f", weights {mib(alone['weight_bytes'])}" if alone["weight_bytes"] else ""
        lines.append(
            f"memory of {escape(alone['engine'])} {alone['resolution']} px alone: peak {mib(alone['peak_rss_bytes'])}, "
            f"of which anonymous at the end {mib(alone['anonymous_bytes'])}{weights}"
        )
    return lines


def mib(size: int | None) -> str:
    """Bytes as MiB."""
    return "unknown" if size is None else f"{size / 2**20:.0f} MiB"


def _energy(report: Report) -> list[str]:
    lines = [
        f"energy of {escape(result.condition.name)}: {own.joules_per_image:.3g} J a picture at {own.watts:.3g} W "
        f"(idle {own.idle_watts:.3g} W), {own.meter} of {own.what}"
        for result in report.conditions
        if (own := result.energy) is not None
    ]
    reasons = dict.fromkeys(r.energy_problem for r in report.conditions if r.energy is None)
    return lines + [f"energy: not known, {escape(why)}" for why in reasons]


def render_comparison(compared: Compared, console: Console) -> None:
    """What changed, and how sure that is."""
    columns = ("", "before ms", "after ms", "ratio", "99 % interval", "verdict", "stages that moved")
    table = _table("time after over time before (a run, medians)", columns, ("", *columns[4:]))
    for change in compared.changes:
        low, high = change.ratio.low, change.ratio.high
        table.add_row(
            escape(change.name), ms_text(change.before_ms), ms_text(change.after_ms), f"{change.ratio.value:.3f}",
            "–" if low is None or high is None else f"{low:.3f} to {high:.3f}",
            f"[{_VERDICTS[change.verdict]}]{change.verdict}[/]", _moved(change, compared.min_effect),
        )  # fmt: skip
    console.print(table)
    for what, names in (("before", compared.only_before), ("after", compared.only_after)):
        for name in names:
            console.print(f"only {what}: {escape(name)}", soft_wrap=True, highlight=False)
    for warning in compared.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}", soft_wrap=True, highlight=False)


def _moved(change: Change, least: float) -> str:
    moved = {name: r for name, r in change.stages.items() if r is not None and not 1 / (1 + least) < r < 1 + least}
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in moved.items())


def render_roofline(predictions: Sequence[Prediction], console: Console, title: str) -> None:
    """Estimates by device, a table for each sampler; every title says what they are."""
    for sampler in dict.fromkeys(p.sampler for p in predictions):
        own = [p for p in predictions if p.sampler == sampler]
        models = dict.fromkeys(p.model for p in own)
        heading = f"ESTIMATES, not measurements: ms per picture, {sampler}, {title}"
        table = _table(heading, ("device", "TFLOP/s", "GB/s", "share", *models), ("device",))
        for device in dict.fromkeys(p.device for p in own):
            cells = [_estimate(p) for p in own if p.device == device]
            rate = f"{device.tflops:g} {device.precision}"
            table.add_row(device.name, rate, f"{device.gbytes:g}", f"{device.efficiency:g}", *cells)
        console.print(table)
    unknown = any(p.decoder_ms is None for p in predictions)
    note = "; ?: its manifest does not describe the decoder, build the directory again" if unknown else ""
    console.print(f"sampling + decoder; share: of the peak that is reached, a rule of thumb{note}", highlight=False)


def _estimate(prediction: Prediction) -> str:
    decoder = prediction.decoder_ms
    tail = " + ?" if decoder is None else f" + {ms_text(decoder)}" if decoder else ""
    return f"~{ms_text(prediction.sampling_ms)}{tail}"


def render_limits(limits: Limits, console: Console) -> None:
    """What this machine can do."""
    rates = ", ".join(f"{name} {value / 1e9:.3g} GFLOP/s" for name, value in limits.flops_per_s.items())
    console.print(
        f"this machine, measured: matrix product {rates}; copy {limits.bytes_per_s / 1e9:.1f} GB/s read and written "
        f"({escape(limits.note)})",
        soft_wrap=True,
        highlight=False,
    )


def render_achieved(name: str, rows: Sequence[Achieved], console: Console) -> None:
    """What engines reach of it."""
    columns = ("stage", "ms a run", "GFLOP/s", "least ms", "bound by", "reached")
    table = _table(f"{name}: measured, and what the limits above allow", columns, ("stage", "bound by"))
    for row in rows:
        table.add_row(
            row.stage,
            ms_text(row.ms),
            f"{row.gflops_per_s:.3g}",
            ms_text(row.limit_ms),
            row.bound_by,
            f"{row.share:.0%}",
        )
    console.print(table)
