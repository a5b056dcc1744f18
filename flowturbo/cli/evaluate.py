"""flowturbo-eval: metrics, references, scores of image sets, and the table of samplers."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from flowturbo import demo
from flowturbo.evaluation.load_options import make_load_options
from flowturbo.evaluation.quality import scores as commands
from flowturbo.evaluation.quality.features import EXTRACTORS
from flowturbo.evaluation.quality.metrics import METRICS
from flowturbo.evaluation.quality.references import ExtractorOptions
from flowturbo.evaluation.table.entries import SAMPLER_ENTRIES, select_entries
from flowturbo.evaluation.table.table_job import TableJob, fill_shard, make_table
from flowturbo.evaluation.table.table_run import TableSettings
from flowturbo.plotting import check_matplotlib
from runtime.cli.command_base import Group, check_output_path, echo_json
from runtime.cli.dataclass_options import OptionDefaults, options
from runtime.cli.progress_display import show_progress
from runtime.cli.runner_options import RunnerOptions
from runtime.directory.manifest import MANIFEST_FILE, read_manifest
from runtime.request import GuidanceOptions, collect_keywords
from runtime.sampling.sampler import NAME_FIELDS, SamplerChoice, expand_sampler_name
from runtime.system.errors import RequestError
from runtime.system.files import write_json
from runtime.system.hashes import make_cache_folder
from runtime.system.option_fields import REQUIRED, argument, option, split_words
from runtime.system.version import VERSION

DEMO_REFERENCE = "demo"
"""Name of the demo's own reference pack."""


class Shard(click.ParamType):  # type: ignore[type-arg]  # generic in click's newest releases only
    """I/N: the I-th of N processes, from 0."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        index, _, count = str(value).partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            self.fail(f"{value!r}: write I/N with I from 0 to N - 1, for example 0/2 and 1/2", param, ctx)
        return int(index), int(count)


SHARD = Shard()
METRICS_HELP = "Which, separated by commas."


@dataclass(frozen=True)
class EngineRunnerOptions(RunnerOptions):
    """What runs the engines, and at which size."""

    engine_resolution: int | None = option(
        None, help="Resolution of the engines.", default_text="the first built", advanced=True
    )


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION)
def main() -> None:
    """Measure the quality of pictures, and compare samplers.

    \b
    flowturbo-eval table engines --reference demo --num 256 --out runs/table
    flowturbo-eval score pictures/ --reference demo
    flowturbo-eval score samples.npz --reference VIRTUAL_imagenet256_labeled.npz --features inception
    """


@dataclass(frozen=True)
class MetricsOptions:
    """Ready features, and which metrics of them."""

    sample_features: Path = option(REQUIRED, help=".npy [N, E], or a pack of flowturbo-eval reference.")
    reference_features: Path | None = option(None, help=".npy [M, E], or a pack.")
    probs: Path | None = option(None, help=".npy [N, K]: class probabilities of the samples, for the Inception Score.")
    names: tuple[str, ...] = option(
        (), "--metrics", help=METRICS_HELP, default_text=f"all: {', '.join(METRICS)}", parse=split_words
    )
    as_json: bool = option(False, "--json", help="Print the result and nothing else on stdout.")


@main.command()
@options(MetricsOptions)
def metrics(given: MetricsOptions) -> None:
    """Compute every metric that ready features allow."""
    values = commands.score_features(given.sample_features, given.reference_features, given.probs, given.names)
    _print_result(values, given.as_json)


@dataclass(frozen=True)
class ScoreOptions:
    """Which images are measured, and against what."""

    samples: Path = argument(REQUIRED)
    reference: str = option(REQUIRED, help=f"A folder of images, an ADM .npz, a pack, or {DEMO_REFERENCE}.")
    resolution: int | None = option(
        None, help="Centre-crop folders of images to this many pixels.", minimum=1, advanced=True
    )
    names: tuple[str, ...] = option(
        (), "--metrics", help=METRICS_HELP, default_text=f"all: {', '.join(METRICS)}", parse=split_words
    )
    cache: Path | None = option(
        None, help="Folder for features and latents.", default_text="in the user's cache", advanced=True
    )
    shard: tuple[int, int] | None = option(
        None, help="Make this process's part only, e.g. 0/2; then run once without it.", type=SHARD, advanced=True
    )
    num: int | None = option(None, help="Images to make, of engines.", minimum=1)
    seed: int = option(0, help="Of the first image.", minimum=0, maximum=2**62, advanced=True)
    guidance: float | None = option(None, help="Guidance scale; 1 is none.", default_text="the directory's")
    guidance_channels: int | None = option(None, help="Latent channels that are guided.", advanced=True)
    vae: str | None = option(None, help="Decoder variant, as built.", default_text="the directory's first")
    out: Path | None = option(None, help="Write the result here too, as JSON.")
    as_json: bool = option(False, "--json", help="Print the result and nothing else on stdout.")


@main.command()
@options(ScoreOptions, OptionDefaults(SamplerChoice(), only=NAME_FIELDS), ExtractorOptions, EngineRunnerOptions)
def score(
    scored: ScoreOptions, sampler: SamplerChoice, features: ExtractorOptions, runner: EngineRunnerOptions
) -> None:
    """Measure SAMPLES: a folder of images, an .npz or .npy, or an engine directory that is sampled on the fly."""
    check_output_path(scored.out)
    engine_options = commands.EngineOptions(
        sampler=collect_keywords(
            expand_sampler_name(sampler), GuidanceOptions(scored.guidance, scored.guidance_channels)
        ),
        num=scored.num,
        seed=scored.seed,
        vae=scored.vae,
        resolution=runner.engine_resolution,
        load_options=make_load_options(runner),
    )
    with show_progress(quiet=scored.as_json) as progress:
        result = commands.score_images(
            scored.samples,
            _resolve_reference(scored.reference),
            extractor_options=features,
            resolution=scored.resolution,
            names=scored.names,
            cache=scored.cache or make_cache_folder("evaluation"),
            shard=scored.shard,
            engine_options=engine_options,
            progress=progress,
        )
    if result is None:
        return
    if scored.out is not None:
        write_json(scored.out, result)
    _print_result(result, scored.as_json)


@dataclass(frozen=True)
class ReferenceOptions:
    """Which images a reference pack is made of."""

    data: Path = option(REQUIRED, help="A folder of images (any depth), or an .npz with arr_0.")
    resolution: int | None = option(None, help="Centre-crop to this many pixels, as ADM does.", minimum=1)
    cache: Path | None = option(None, help="Folder for features; a killed call goes on there.")
    name: str | None = option(None, help="What reports call it.", default_text="the name of --data")
    out: Path = option(REQUIRED, help="The pack to write, .npz.")
    as_json: bool = option(False, "--json", help="Print the result and nothing else on stdout.")


@main.command()
@options(ReferenceOptions, ExtractorOptions)
def reference(made: ReferenceOptions, features: ExtractorOptions) -> None:
    """Make a small reference pack: statistics of all images, features of up to 10,000."""
    check_output_path(made.out)
    with show_progress(quiet=made.as_json) as progress:
        image_set = commands.make_reference(
            made.data,
            made.out,
            extractor_options=features,
            resolution=made.resolution,
            name=made.name,
            cache=made.cache,
            progress=progress,
        )
    _print_result(image_set, made.as_json)


@dataclass(frozen=True)
class InceptionOptions:
    """Which weights, and where the ONNX file goes."""

    weights: Path = option(REQUIRED, help="pt_inception-2015-12-05-6726825d.pth")
    out: Path | None = option(None, help="ONNX file to write.", default_text="where --features inception finds it")


@main.command()
@options(InceptionOptions)
def inception(converted: InceptionOptions) -> None:
    """Convert the TF-2015 Inception's public weights to ONNX, once. Needs the export extra; what follows does not."""
    out = converted.out or EXTRACTORS["inception"].path()
    check_output_path(out)
    commands.convert_inception_weights(converted.weights, out)
    click.echo(str(out))


@dataclass(frozen=True)
class CompareScoresOptions:
    """Which results."""

    results: tuple[Path, ...] = argument(REQUIRED)
    as_json: bool = option(False, "--json", help="Print the result and nothing else on stdout.")


@main.command()
@options(CompareScoresOptions)
def compare(compared: CompareScoresOptions) -> None:
    """Put results of `score --out` side by side; refused where extractor, reference or number of images differ."""
    scores = commands.compare_scores(compared.results)
    if compared.as_json:
        echo_json(scores)
        return
    names = list(dict.fromkeys(name for result in scores for name in result["metrics"]))
    click.echo(f"{'':32}" + "".join(f"{METRICS[name].label:>12}" for name in names))
    for result in scores:
        values = (result["metrics"].get(name) for name in names)
        click.echo(f"{result['samples'][-31:]:32}" + "".join(f"{'–' if v is None else f'{v:.5g}':>12}" for v in values))


@dataclass(frozen=True)
class TableOptions:
    """Which samplers are compared, on what, and where the table goes."""

    engines: Path = argument(REQUIRED)
    reference: str = option(REQUIRED, help=f"A folder of images, an ADM .npz, a pack, or {DEMO_REFERENCE}.")
    resolution: int | None = option(
        None, help="Centre-crop a reference folder to this many pixels.", minimum=1, advanced=True
    )
    rows: tuple[str, ...] = option(
        (),
        help="Names or patterns, separated by commas.",
        default_text=f"all {len(SAMPLER_ENTRIES)}",
        parse=split_words,
    )
    processes: int = option(1, help="To make pictures in.", minimum=1, maximum=256)
    shard: tuple[int, int] | None = option(
        None, help="Make this process's part only, e.g. 0/2; then run once without it.", type=SHARD, advanced=True
    )
    out: Path = option(REQUIRED, help="Folder of the table, and of what makes a killed run go on.")
    page: Path | None = option(None, help="Markdown page to write.", default_text="OUT/table.md")
    title: str = option("Samplers compared", help="Heading of the page.", advanced=True)
    as_json: bool = option(False, "--json", help="Print the result and nothing else on stdout.")


@main.command()
@options(TableOptions, TableSettings, ExtractorOptions, EngineRunnerOptions)
def table(
    compared: TableOptions, settings: TableSettings, features: ExtractorOptions, runner: EngineRunnerOptions
) -> None:
    """Compare samplers on ENGINES: acceleration, NFE, latency, quality, same-seed error; × every VAE.

    Writes table.json, table.csv, table.md and a Pareto plot into --out. A killed run continues where it stopped.
    """
    out, shard, as_json = compared.out, compared.shard, compared.as_json
    if (out / MANIFEST_FILE).exists():
        raise RequestError(f"--out {out} is an engine directory", remedy="name a folder of its own")
    job = TableJob(
        engines=compared.engines,
        resolution=runner.engine_resolution,
        load_options=make_load_options(runner),
        reference=_resolve_reference(compared.reference),
        crop=compared.resolution,
        extractor_options=features,
        entries=select_entries(compared.rows, read_manifest(compared.engines).samplers),
        settings=settings,
        out=out,
    )
    page = compared.page or out / "table.md"
    check_output_path(page)
    check_matplotlib("eval")
    with show_progress(quiet=as_json) as progress:
        if shard is not None:
            fill_shard(job, shard, progress)
            return
        command = shlex.join(["flowturbo-eval", *sys.argv[1:]])
        table_data = make_table(
            job, processes=compared.processes, page=page, title=compared.title, command=command, progress=progress
        )
    if as_json:
        echo_json(table_data)
    else:
        click.echo(str(page))


def _resolve_reference(name: str) -> Path:
    return demo.REFERENCE if name == DEMO_REFERENCE else Path(name)


def _print_result(result: commands.Summary, as_json: bool) -> None:
    if as_json:
        echo_json(result)
        return
    for name, value in result.items():
        if isinstance(value, dict):
            for key, entry in value.items():
                click.echo(f"{key:18} {entry:.6g}" if isinstance(entry, float) else f"{key:18} {entry}")
        elif name == "notes":
            for note in value:
                click.echo(f"note: {note}")
        else:
            click.echo(f"{name:18} {value:.6g}" if isinstance(value, float) else f"{name:18} {value}")


if __name__ == "__main__":
    main()
