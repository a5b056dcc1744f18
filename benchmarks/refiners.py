"""python -m benchmarks.refiners: compare refiners of one predictor, trained in different ways, as they are deployed.

Each is built into engines and samples the same seeds, with the released second call of an R block and with the
consistent one. They are compared with 250 Heun steps of the predictor alone. The rows without a refiner have the same
predictor evaluations in longer steps.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from flowturbo.demo import PREDICTOR, VAES
from flowturbo.demo import REFERENCE as PHOTOGRAPHS
from flowturbo.evaluation.quality.engine_images import EngineImages
from flowturbo.evaluation.quality.features import Extractor
from flowturbo.evaluation.quality.metrics import compute_metrics
from flowturbo.evaluation.quality.populations import ImageSet, measure_image_set
from flowturbo.evaluation.quality.references import ExtractorOptions, load_reference
from flowturbo.evaluation.quality.same_seed import REFERENCE_SAMPLER
from flowturbo.evaluation.quality.sampled_latents import SampledLatents, make_balanced_draw
from runtime.cli.command_base import PATH, Command
from runtime.pipeline import Pipeline
from runtime.request import RequestOptions
from runtime.system.errors import RequestError
from runtime.system.files import make_folder, write_atomically, write_json

SCHEDULES = ("H1P5R3", "H2P4R2", "H2P8R2")
PLAIN_SCHEDULES = {"H1P5R3": "H1P5", "H2P4R2": "H2P4", "H2P8R2": "H2P8"}
"""The same predictor evaluations without a refiner: fewer and longer steps."""
VAE = VAES["ema"].name
COLUMNS = {"latent_rms": "latent rms ↓", "psnr_db": "PSNR (dB) ↑", "kid": "KID ↓"}


@dataclass(frozen=True)
class RefinerSetup:
    """What all refiners are measured on: images, guidance, the photographs' features, and the cache folder."""

    images: int
    guidance: tuple[float, ...]
    extractor: Extractor
    photographs: ImageSet
    cache: Path


@dataclass(frozen=True)
class RefinerResult:
    """One line of the table."""

    refiner: str
    second_call: str
    schedule: str
    guidance: float
    values: Mapping[str, float]

    @property
    def plain_schedule(self) -> str:
        """Return the schedule with the same predictor evaluations and no refiner."""
        return PLAIN_SCHEDULES.get(self.schedule, self.schedule)


def build_refiner_engines(name: str, refiner: Path, folder: Path) -> Path:
    """Build engines of the demo's predictor with this refiner, unless they are there."""
    out = folder / f"engines-{name}"
    checkpoints: list[str | Path] = ["--predictor", PREDICTOR, "--refiner", refiner, "--vae", VAES["ema"]]
    arguments = ["build-engines", *checkpoints, "--target", "cpu", "--max-batch", "32", "--out", out]
    subprocess.run([Path(sys.executable).with_name("flowturbo-export"), *arguments], check=True)
    return out


def measure_sampler(
    pipeline: Pipeline, fine: Pipeline, sampler: RequestOptions, setup: RefinerSetup
) -> dict[str, float]:
    """Return same-seed error and kernel distance of one sampler; `fine` are the engines of the exact solution."""
    fine_sampler: RequestOptions = {**REFERENCE_SAMPLER, "guidance": sampler["guidance"]}
    draw = make_balanced_draw(sorted(pipeline.manifest.model.classes), setup.images)
    fine_images = EngineImages(fine, SampledLatents(fine, draw, fine_sampler, setup.cache), VAE, cache_images=True)
    latents = SampledLatents(pipeline, draw, sampler, setup.cache)
    image_set = measure_image_set(
        EngineImages(pipeline, latents, VAE, fine=fine_images), setup.extractor, setup.cache, latents.key
    )
    metrics = compute_metrics(image_set.population, setup.photographs.population, leave_out_noise=True)
    return {**metrics, **{name: float(np.mean(values)) for name, values in image_set.scores.items()}}


def measure_refiner(name: str, pipeline: Pipeline, fine: Pipeline, setup: RefinerSetup) -> Iterator[RefinerResult]:
    """Measure a refiner with either second call; "none" is the predictor alone."""
    second_calls = ("—",) if name == "none" else ("released", "consistent")
    for guidance in setup.guidance:
        for second_call in second_calls:
            for schedule in SCHEDULES:
                plan = PLAIN_SCHEDULES[schedule] if name == "none" else schedule
                sampler: RequestOptions = {"schedule": plan, "guidance": guidance}
                if second_call == "consistent":
                    sampler["consistent"] = True
                click.echo(f"{name}, {second_call}, {plan}, guidance {guidance:g}", err=True)
                values = measure_sampler(pipeline, fine, sampler, setup)
                yield RefinerResult(name, second_call, plan, guidance, {key: values[key] for key in COLUMNS})


def format_refiner_page(results: Sequence[RefinerResult], images: int, command: str) -> str:
    """Format the table as Markdown, one part per guidance; the best of each schedule in bold."""
    parts = [
        "# Refiners compared on the demo model",
        f"Made by\n\n```\n{command}\n```",
        f"{images} images, compared with 250 Heun steps of the predictor from the same seeds with the same guidance.",
        "- What the refiners are: [training.md](training.md#refiner).\n"
        "- Second call: how the R block was run, as released or with `--consistent`.\n"
        "- none: the predictor alone, with the same predictor evaluations in fewer and longer steps.\n"
        "- Bold: the best of its schedule.",
    ]
    for guidance in dict.fromkeys(result.guidance for result in results):
        results_at_guidance = [result for result in results if result.guidance == guidance]
        rows = [f"## Guidance {guidance:g}", ""]
        rows += [f"| refiner | second call | schedule | {' | '.join(COLUMNS.values())} |", "|---" * 6 + "|"]
        for result in results_at_guidance:
            cells = []
            for name, title in COLUMNS.items():
                choose = max if "↑" in title else min
                rivals = [r for r in results_at_guidance if r.plain_schedule == result.plain_schedule]
                best = choose(rival.values[name] for rival in rivals)
                text = f"{result.values[name]:.1f}" if name == "psnr_db" else f"{result.values[name]:.4f}"
                cells.append(f"**{text}**" if result.values[name] == best else text)
            rows.append(f"| {result.refiner} | {result.second_call} | {result.schedule} | {' | '.join(cells)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def parse_refiner(text: str) -> tuple[str, Path]:
    """Parse NAME=FILE."""
    name, _, file = text.partition("=")
    if not file or not Path(file).is_file():
        raise RequestError(f"--refiner {text}", allowed="NAME=FILE, the file a checkpoint of flowturbo-train refiner")
    return name, Path(file)


@click.command(cls=Command)
@click.option("--refiner", "refiners", multiple=True, required=True, help="NAME=FILE; may be repeated.")
@click.option("--num", default=256, show_default=True, type=click.IntRange(8), help="Images.")
@click.option("--guidance", default=(4.0, 1.0), show_default=True, multiple=True, type=float, help="May be repeated.")
@click.option("--out", type=PATH, default=Path("runs/refiners"), show_default=True, help="Engines and the cache.")
@click.option("--page", "page_file", type=PATH, help="Markdown file to write.  [default: OUT/refiners.md]")
def main(refiners: Sequence[str], num: int, guidance: tuple[float, ...], out: Path, page_file: Path | None) -> None:
    """Compare refiners of the demo's predictor. A killed run continues where it stopped."""
    folders = {name: build_refiner_engines(name, file, make_folder(out)) for name, file in map(parse_refiner, refiners)}
    first_folder = next(iter(folders.values()))
    cache = make_folder(out / "cache")
    results: list[RefinerResult] = []
    with (
        Pipeline.load(first_folder, provider="cpu") as fine,
        ExtractorOptions().open(PHOTOGRAPHS) as extractor,
    ):
        setup = RefinerSetup(num, guidance, extractor, load_reference(PHOTOGRAPHS, extractor, cache=cache), cache)
        results += measure_refiner("none", fine, fine, setup)
        for name, folder in folders.items():
            with Pipeline.load(folder, provider="cpu") as pipeline:
                results += measure_refiner(name, pipeline, fine, setup)
    command = "python -m benchmarks.refiners " + " ".join(sys.argv[1:])
    write_json(out / "refiners.json", {"images": num, "lines": [{**vars(result)} for result in results]})
    with write_atomically(page_file or out / "refiners.md") as aside:
        aside.write_text(format_refiner_page(results, num, command), encoding="utf-8")
    click.echo(page_file or out / "refiners.md")


if __name__ == "__main__":
    main()
