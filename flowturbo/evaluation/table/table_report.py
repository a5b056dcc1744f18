"""A table of samplers as files: JSON for machines, CSV for spreadsheets, a Markdown page, and a Pareto plot."""

from __future__ import annotations

import csv
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowturbo.evaluation.quality.metrics import METRICS
from flowturbo.evaluation.table.latency import LEAST_ROUNDS, ROW_MS, Latency
from flowturbo.evaluation.table.pareto_plot import save_pareto
from flowturbo.evaluation.table.table_run import RowResult, Spread, TableResult, TableSettings, shown_columns
from runtime.system.files import make_folder, replacing, write_json
from runtime.system.json_codec import to_json
from runtime.system.version import VERSION

SCHEMA = 1
SAME_SEED_LABELS = {"psnr_db": ("PSNR (dB)", 1), "ssim": ("SSIM", 3), "latent_rms": ("latent rms", 4)}


@dataclass(frozen=True)
class Facts:
    """What the numbers of a table are of.

    Attributes:
        command: that makes the page again.
        engines: what runs, from `runtime.pipeline.describe`, and the directory's hash and resolution.
        machine: cores and threads, for the reader of latencies.
        extractor, reference: what judged the pictures and what they were compared with.
    """

    command: str
    engines: Mapping[str, Any]
    machine: str
    extractor: str
    extractor_hash: str
    reference: str
    reference_count: int


def write_report(result: TableResult, facts: Facts, out: Path, page: Path, title: str) -> None:
    """Writes table.json and table.csv into `out`, and the page with its plot (PNG and SVG) beside it."""
    write_numbers(result, facts, out)
    with replacing(out / "table.csv") as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(_csv_rows(result))
    images = make_folder(page.parent / "images")
    plot = images / f"{page.stem}-pareto"
    drawn = save_pareto(result, plot)
    with replacing(page) as aside:
        aside.write_text(markdown(result, facts, title, f"images/{plot.name}.png" if drawn else None), encoding="utf-8")


def write_numbers(result: TableResult, facts: Facts, out: Path) -> None:
    """Writes table.json, of as many rows as there are."""
    write_json(make_folder(out) / "table.json", finite(as_json(result, facts)))


def as_json(result: TableResult, facts: Facts) -> dict[str, Any]:
    """Everything, as JSON data; a PSNR of equal images is infinite."""
    return {"schema": SCHEMA, "flowturbo": VERSION, **to_json(facts), **to_json(result)}


def finite(data: Any) -> Any:
    """JSON knows no infinity: null, for the PSNR of equal images."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _csv_rows(result: TableResult) -> list[list[Any]]:
    names = shown_columns(result)
    head = ["name", "label", "group", "sampler", "vae", "nfe_predictor", "nfe_refiner", "median_ms", "p95_ms"]
    rows: list[list[Any]] = [[*head, "acceleration", *(f"{name}{end}" for name in names for end in ("", "_std"))]]
    for row in result.rows:
        values = [row.values.get(name) for name in names]
        rows.append(
            [row.name, row.label, row.group, row.sampler, row.vae, row.nfe["predictor"], row.nfe["refiner"]]
            + [row.latency.median_ms, row.latency.p95_ms, row.acceleration]
            + [x for value in values for x in ((value.mean, value.std) if value else (None, None))]
        )
    return rows


def markdown(result: TableResult, facts: Facts, title: str, plot: str | None) -> str:
    """The page: what was measured, how, the table, the plot."""
    parts = [f"# {title}", _preface(result, facts), *_tables(result), _legend(result, facts)]
    if plot is not None:
        parts.append(f"![latency against quality]({plot})")
    return "\n\n".join(parts) + "\n"


def _preface(result: TableResult, facts: Facts) -> str:
    settings, engines = result.settings, facts.engines
    repeats = f", {settings.repeats} times with other seeds (mean ± std)" if settings.repeats > 1 else ""
    return (
        f"Made by flowturbo {VERSION} with\n\n```\n{facts.command}\n```\n\n"
        f"{settings.num} images at {engines['resolution']} px{repeats}, guidance {engines['guidance']:g} on "
        f"{engines['guidance_channels']} channels, on {engines['provider']} in {engines['precision']}, "
        f"{facts.machine}. Engines {engines['hash']}.\n"
        f"Quality is measured with the extractor {facts.extractor} ({facts.extractor_hash}), against "
        f"{facts.reference_count} images ({facts.reference})."
    )


def _tables(result: TableResult) -> list[str]:
    names = shown_columns(result)
    accelerations = ["acceleration", *(["vs. eager"] if result.eager else [])]
    head = ["sampler", "NFE", "ms/image (p95)", *accelerations, *(_label(name) for name in names)]
    tables = []
    for vae in result.settings.vaes:
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        lines += [
            "| " + " | ".join(_cells(row, names, result.eager.get(vae))) + " |" for row in result.rows if row.vae == vae
        ]
        tables.append(f"## VAE {vae}\n\n" + "\n".join(lines))
    return tables


def _cells(row: RowResult, names: Sequence[str], eager: Latency | None) -> list[str]:
    predictor, refiner = (f"{row.nfe[network]:.4g}" for network in ("predictor", "refiner"))
    nfe = predictor if row.nfe["refiner"] == 0 else f"{predictor} + {refiner} R"
    latency = f"{row.latency.median_ms:.1f} ({row.latency.p95_ms:.1f})"
    return [
        row.label,
        nfe,
        latency,
        f"{row.acceleration:+.1%}",
        *([] if eager is None else [f"{1 - row.latency.median_ms / eager.median_ms:+.1%}"]),
        *(_value(name, row.values.get(name)) for name in names),
    ]


def _label(name: str) -> str:
    if name in METRICS:
        return f"{METRICS[name].label} {'↓' if METRICS[name].better == 'lower' else '↑'}"
    return SAME_SEED_LABELS[name][0]


def _value(name: str, value: Spread | None) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value.mean):
        return "∞"
    digits = METRICS[name].digits if name in METRICS else SAME_SEED_LABELS[name][1]
    spread = "" if value.std is None else f" ± {value.std:.{digits}f}"
    return f"{value.mean:.{digits}f}{spread}"


def _legend(result: TableResult, facts: Facts) -> str:
    settings = result.settings
    base = next(row.label for row in result.rows if row.name == settings.baseline)
    lines = [
        "NFE: network evaluations of a picture, a guided one counted once. R: of the refiner.",
        f"Acceleration: 1 − t / t of {base}, with the same decoder on the same compiled engines."
        + (
            " vs. eager: the same against 25 Heun steps in PyTorch, uncompiled, float32, decoded by the engine."
            if result.eager
            else ""
        ),
        f"ms/image: median (95th percentile) over {settings.timing_rounds} rounds, or {LEAST_ROUNDS} and more until "
        f"{ROW_MS / 1e3:g} s are full, of {settings.timing_batch} at a time, sampling and decoding. "
        "The rows take turns.",
        "PSNR, SSIM, latent rms: distance from the pictures and latents of the same seeds and engines by Heun with "
        f"{settings.fine_steps} steps{_compared(settings)}. This is the solver's error alone, not the model's.",
    ]
    if settings.num < METRICS["fid"].least:
        lines.append(
            f"FID and sFID are left out below {METRICS['fid'].least} images, where they are mostly noise. KID has no "
            "such bias. IS, precision and recall depend on the number of images: compare them within this table only."
        )
    if result.skipped:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in result.skipped.items())
        lines.append(f"Not possible with these engines: {reasons}.")
    once = {row.name: row.sampling_cpu_seconds for row in result.rows}
    lines.append(
        f"This run took {result.seconds / 60:.1f} minutes; what earlier ones left in the folder is not made again. "
        f"Sampling took {sum(once.values()) / 60:.1f} CPU minutes in all. CPU seconds of each row:\n\n```\n"
        + textwrap.fill(
            ", ".join(f"{name} {seconds:.0f}" for name, seconds in once.items()), 120, break_on_hyphens=False
        )
        + "\n```"
    )
    return "\n\n".join(lines)


def _compared(settings: TableSettings) -> str:
    few = settings.same_seed is not None and settings.same_seed < settings.num
    return f", for the first {settings.same_seed}{' of every repeat' * (settings.repeats > 1)}" if few else ""
