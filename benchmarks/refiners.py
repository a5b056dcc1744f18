"""python -m benchmarks.refiners: refiners of one predictor compared, trained in different ways, as they are deployed.

Each is built into engines and samples the same seeds; what it adds is measured against 250 Heun steps of the predictor
alone, with the released second call of an R block and with the consistent one. The rows without a refiner take the same
predictor evaluations and steps as long.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from flowturbo.demo import PREDICTOR, VAES
from flowturbo.demo import REFERENCE as PHOTOGRAPHS
from flowturbo.evaluation.quality.engine_images import EngineImages
from flowturbo.evaluation.quality.features import Extractor
from flowturbo.evaluation.quality.metrics import compute_metrics
from flowturbo.evaluation.quality.populations import Described, describe
from flowturbo.evaluation.quality.references import extractor_for, load_reference
from flowturbo.evaluation.quality.same_seed import REFERENCE
from flowturbo.evaluation.quality.sampled_latents import SampledLatents, balanced_draw
from runtime.cli.command_base import PATH, Command
from runtime.pipeline import Pipeline
from runtime.system.errors import RequestError
from runtime.system.files import make_folder, replacing, write_json

SCHEDULES = ("H1P5R3", "H2P4R2", "H2P8R2")
PLAIN = {"H1P5R3": "H1P5", "H2P4R2": "H2P4", "H2P8R2": "H2P8"}
"""The same predictor evaluations without a refiner: fewer and longer steps."""
VAE = VAES["ema"].name
COLUMNS = {"latent_rms": "latent rms ↓", "psnr_db": "PSNR (dB) ↑", "kid": "KID ↓"}


@dataclass(frozen=True)
class Setting:
    """What all refiners are measured on: images, guidance, the photographs' features, a folder to keep things."""

    images: int
    guidance: tuple[float, ...]
    extractor: Extractor
    photographs: Described
    cache: Path


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    refiner: str
    second_call: str
    schedule: str
    guidance: float
    values: Mapping[str, float]


def build(name: str, refiner: Path, folder: Path) -> Path:
    """Engines of the demo's predictor with this refiner; what is there already is not built again."""
    out = folder / f"engines-{name}"
    checkpoints: list[str | Path] = ["--predictor", PREDICTOR, "--refiner", refiner, "--vae", VAES["ema"]]
    words = ["build-engines", *checkpoints, "--target", "cpu", "--max-batch", "32", "--out", out]
    subprocess.run([Path(sys.executable).with_name("flowturbo-export"), *words], check=True)
    return out


def measure(pipeline: Pipeline, fine: Pipeline, sampler: Mapping[str, Any], setting: Setting) -> dict[str, float]:
    """Same-seed error and kernel distance of one sampler; `fine` are the engines that made the exact solution."""
    guided = {"guidance": sampler["guidance"]}
    draw = balanced_draw(sorted(pipeline.manifest.model.classes), setting.images)
    exact = EngineImages(fine, SampledLatents(fine, draw, {**REFERENCE, **guided}, setting.cache), VAE, keep=True)
    latents = SampledLatents(pipeline, draw, sampler, setting.cache)
    found = describe(EngineImages(pipeline, latents, VAE, against=exact), setting.extractor, setting.cache, latents.key)
    metrics = compute_metrics(found.population, setting.photographs.population, leave_out_noise=True)
    return {**metrics, **{name: float(np.mean(values)) for name, values in found.scores.items()}}


def lines_of(name: str, pipeline: Pipeline, fine: Pipeline, setting: Setting) -> Iterator[Line]:
    """A refiner with either second call; "none" is the predictor alone."""
    calls = ("—",) if name == "none" else ("released", "consistent")
    for guidance in setting.guidance:
        for call in calls:
            for schedule in SCHEDULES:
                sampler = {"schedule": PLAIN[schedule] if name == "none" else schedule, "guidance": guidance}
                sampler |= {"consistent": True} if call == "consistent" else {}
                click.echo(f"{name}, {call}, {sampler['schedule']}, guidance {guidance:g}", err=True)
                values = measure(pipeline, fine, sampler, setting)
                yield Line(name, call, str(sampler["schedule"]), guidance, {key: values[key] for key in COLUMNS})


def page(lines: Sequence[Line], images: int, command: str) -> str:
    """The table as Markdown, one part per guidance; the best of each schedule in bold."""
    parts = [
        "# Refiners compared on the demo model",
        f"Made by\n\n```\n{command}\n```",
        f"{images} images, compared with 250 Heun steps of the predictor from the same seeds with the same guidance.",
        "- What the refiners are: [training.md](training.md#refiner).\n"
        "- Second call: how the R block was run, as released or with `--consistent`.\n"
        "- none: the predictor alone, with the same predictor evaluations in fewer and longer steps.\n"
        "- Bold: the best of its schedule.",
    ]
    for guidance in dict.fromkeys(line.guidance for line in lines):
        those = [line for line in lines if line.guidance == guidance]
        rows = [f"## Guidance {guidance:g}", ""]
        rows += [f"| refiner | second call | schedule | {' | '.join(COLUMNS.values())} |", "|---" * 6 + "|"]
        rows += [_row(line, [o for o in those if PLAIN.get(o.schedule, o.schedule) == _plain(line)]) for line in those]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _plain(line: Line) -> str:
    return PLAIN.get(line.schedule, line.schedule)


def _row(line: Line, rivals: Sequence[Line]) -> str:
    cells = []
    for name, title in COLUMNS.items():
        choose = max if "↑" in title else min
        best = choose(rival.values[name] for rival in rivals)
        text = f"{line.values[name]:.1f}" if name == "psnr_db" else f"{line.values[name]:.4f}"
        cells.append(f"**{text}**" if line.values[name] == best else text)
    return f"| {line.refiner} | {line.second_call} | {line.schedule} | {' | '.join(cells)} |"


def named(text: str) -> tuple[str, Path]:
    """NAME=FILE as it is typed."""
    name, _, file = text.partition("=")
    if not file or not Path(file).is_file():
        raise RequestError(f"--refiner {text}", allowed="NAME=FILE, the file a checkpoint of flowturbo-train refiner")
    return name, Path(file)


@click.command(cls=Command)
@click.option("--refiner", "refiners", multiple=True, required=True, help="NAME=FILE; may be repeated.")
@click.option("--num", default=256, show_default=True, type=click.IntRange(8), help="Images.")
@click.option("--guidance", default=(4.0, 1.0), show_default=True, multiple=True, type=float, help="May be repeated.")
@click.option("--out", type=PATH, default=Path("runs/refiners"), show_default=True, help="Engines and what is kept.")
@click.option("--page", "page_file", type=PATH, help="Markdown file to write.  [default: OUT/refiners.md]")
def main(refiners: Sequence[str], num: int, guidance: tuple[float, ...], out: Path, page_file: Path | None) -> None:
    """Compare refiners of the demo's predictor. A killed run goes on where it stopped."""
    folders = {name: build(name, file, make_folder(out)) for name, file in map(named, refiners)}
    first = next(iter(folders.values()))
    cache = make_folder(out / "cache")
    lines: list[Line] = []
    with Pipeline.load(first, provider="cpu") as fine, extractor_for(None, PHOTOGRAPHS, None, None, "cpu") as extractor:
        setting = Setting(num, guidance, extractor, load_reference(PHOTOGRAPHS, extractor, cache=cache), cache)
        lines += lines_of("none", fine, fine, setting)
        for name, folder in folders.items():
            with Pipeline.load(folder, provider="cpu") as pipeline:
                lines += lines_of(name, pipeline, fine, setting)
    command = "python -m benchmarks.refiners " + " ".join(sys.argv[1:])
    write_json(out / "refiners.json", {"images": num, "lines": [{**vars(line)} for line in lines]})
    with replacing(page_file or out / "refiners.md") as aside:
        aside.write_text(page(lines, num, command), encoding="utf-8")
    click.echo(page_file or out / "refiners.md")


if __name__ == "__main__":
    main()
