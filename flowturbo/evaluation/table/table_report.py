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
from flowturbo.evaluation.table.latency import MAX_SAMPLER_MS, MIN_SAMPLER_ROUNDS, Latency
from flowturbo.evaluation.table.pareto_plot import save_pareto_plot
from flowturbo.evaluation.table.table_run import RowResult, Spread, TableResult, list_columns
from runtime.system.files import make_folder, write_atomically, write_json
from runtime.system.json_codec import to_json
from runtime.system.version import VERSION

SCHEMA = 1
SAME_SEED_LABELS = {"psnr_db": ("PSNR (dB)", 1), "ssim": ("SSIM", 3), "latent_rms": ("latent rms", 4)}


@dataclass(frozen=True)
class TableFacts:
    """The circumstances of a table.

    Attributes:
        command: makes the page again.
        engines: what runs, from `runtime.pipeline.describe`, and the directory's hash and resolution.
        machine: cores and threads, for the reader of latencies.
        extractor, reference: what measured the pictures, and what they were compared with.
    """

    command: str
    engines: Mapping[str, Any]
    machine: str
    extractor: str
    extractor_hash: str
    reference: str
    reference_count: int


def write_table(result: TableResult, facts: TableFacts, out: Path, page: Path, title: str) -> None:
    """Write table.json and table.csv into `out`, and the page with its plot (PNG and SVG) beside it."""
    write_table_json(result, facts, out)
    with write_atomically(out / "table.csv") as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        names = list_columns(result)
        head = ["name", "label", "group", "sampler", "vae", "nfe_predictor", "nfe_refiner", "median_ms", "p95_ms"]
        writer = csv.writer(file)
        writer.writerow([*head, "acceleration", *(f"{name}{suffix}" for name in names for suffix in ("", "_std"))])
        for row in result.rows:
            values = [row.values.get(name) for name in names]
            writer.writerow(
                [row.name, row.label, row.group, row.sampler, row.vae, row.nfe["predictor"], row.nfe["refiner"]]
                + [row.latency.median_ms, row.latency.p95_ms, row.acceleration]
                + [x for value in values for x in ((value.mean, value.std) if value else (None, None))]
            )
    images = make_folder(page.parent / "images")
    plot = images / f"{page.stem}-pareto"
    has_plot = save_pareto_plot(result, plot)
    with write_atomically(page) as aside:
        aside.write_text(
            format_table_page(result, facts, title, f"images/{plot.name}.png" if has_plot else None), encoding="utf-8"
        )


def write_table_json(result: TableResult, facts: TableFacts, out: Path) -> None:
    """Write table.json, of as many rows as there are."""
    write_json(make_folder(out) / "table.json", replace_infinite(table_to_json(result, facts)))


def table_to_json(result: TableResult, facts: TableFacts) -> dict[str, Any]:
    """Return everything as JSON data; a PSNR of equal images is infinite."""
    return {"schema": SCHEMA, "flowturbo": VERSION, **to_json(facts), **to_json(result)}


def replace_infinite(data: Any) -> Any:
    """Replace infinity, which JSON does not have, by null: the PSNR of equal images."""
    if isinstance(data, dict):
        return {key: replace_infinite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [replace_infinite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def format_table_page(result: TableResult, facts: TableFacts, title: str, plot: str | None) -> str:
    """Format the page: what was measured, how, the table, the plot."""
    settings, engines, names = result.settings, facts.engines, list_columns(result)
    repeats = f", {settings.repeats} times with other seeds (mean ± std)" if settings.repeats > 1 else ""
    parts = [
        f"# {title}",
        f"Made by flowturbo {VERSION} with\n\n```\n{facts.command}\n```",
        f"{settings.num} images at {engines['resolution']} px{repeats}, guidance {engines['guidance']:g} on "
        f"{engines['guidance_channels']} channels, on {engines['provider']} in {engines['precision']}, "
        f"{facts.machine}. Engines {engines['hash']}.\n"
        f"Quality is measured with the extractor {facts.extractor} ({facts.extractor_hash}), against "
        f"{facts.reference_count} images ({facts.reference}).",
    ]
    head = ["sampler", "NFE", "ms/image (p95)", "acceleration", *(["vs. eager"] if result.eager else [])]
    head += [
        f"{METRICS[name].label} {'↓' if METRICS[name].better == 'lower' else '↑'}"
        if name in METRICS
        else SAME_SEED_LABELS[name][0]
        for name in names
    ]
    for vae in settings.vaes:
        cells = [_format_cells(row, names, result.eager.get(vae)) for row in result.rows if row.vae == vae]
        lines = [f"| {' | '.join(row)} |" for row in (head, *cells)]
        parts.append("\n".join([f"## VAE {vae}", "", lines[0], "|---" * len(head) + "|", *lines[1:]]))
    parts.append(_format_legend(result))
    if plot is not None:
        parts.append(f"![latency against quality]({plot})")
    return "\n\n".join(parts) + "\n"


def _format_cells(row: RowResult, names: Sequence[str], eager: Latency | None) -> list[str]:
    predictor, refiner = (f"{row.nfe[network]:.4g}" for network in ("predictor", "refiner"))
    return [
        row.label,
        predictor if row.nfe["refiner"] == 0 else f"{predictor} + {refiner} R",
        f"{row.latency.median_ms:.1f} ({row.latency.p95_ms:.1f})",
        f"{row.acceleration:+.1%}",
        *([] if eager is None else [f"{1 - row.latency.median_ms / eager.median_ms:+.1%}"]),
        *(_format_spread(name, row.values.get(name)) for name in names),
    ]


def _format_spread(name: str, value: Spread | None) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value.mean):
        return "∞"
    digits = METRICS[name].digits if name in METRICS else SAME_SEED_LABELS[name][1]
    spread = "" if value.std is None else f" ± {value.std:.{digits}f}"
    return f"{value.mean:.{digits}f}{spread}"


def _format_legend(result: TableResult) -> str:
    settings = result.settings
    is_subset = settings.same_seed is not None and settings.same_seed < settings.num
    repeats = " of every repeat" if settings.repeats > 1 else ""
    subset = f", for the first {settings.same_seed}{repeats}" if is_subset else ""
    baseline_label = next(row.label for row in result.rows if row.name == settings.baseline)
    lines = [
        "NFE: network evaluations of a picture, a guided one counted once. R: of the refiner.",
        f"Acceleration: 1 − t / t of {baseline_label}, with the same decoder on the same compiled engines."
        + (
            " vs. eager: the same against 25 Heun steps in PyTorch, uncompiled, float32, decoded by the engine."
            if result.eager
            else ""
        ),
        f"ms/image: median (95th percentile) over {settings.timing_rounds} rounds, or {MIN_SAMPLER_ROUNDS} and "
        f"more until {MAX_SAMPLER_MS / 1e3:g} s are full, of {settings.timing_batch} at a time, sampling and decoding. "
        "The rows take turns.",
        "PSNR, SSIM, latent rms: distance from the pictures and latents of the same seeds and engines by Heun with "
        f"{settings.fine_steps} steps{subset}. This is the solver's error alone, not "
        "the model's.",
    ]
    if settings.num < METRICS["fid"].min_images:
        lines.append(
            f"FID and sFID are left out below {METRICS['fid'].min_images} images, where they are mostly noise. "
            "KID has no such bias. IS, precision and recall depend on the number of images: compare them within this "
            "table only."
        )
    if result.skipped:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in result.skipped.items())
        lines.append(f"Not possible with these engines: {reasons}.")
    cpu_seconds_by_name = {row.name: row.sampling_cpu_seconds for row in result.rows}
    lines.append(
        f"This run took {result.seconds / 60:.1f} minutes; what earlier ones left in the folder is not made again. "
        f"Sampling took {sum(cpu_seconds_by_name.values()) / 60:.1f} CPU minutes in all. CPU seconds of each "
        "row:\n\n```\n"
        + textwrap.fill(
            ", ".join(f"{name} {seconds:.0f}" for name, seconds in cpu_seconds_by_name.items()),
            120,
            break_on_hyphens=False,
        )
        + "\n```"
    )
    return "\n\n".join(lines)
