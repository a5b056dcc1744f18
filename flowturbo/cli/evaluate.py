"""flowturbo-eval: metrics, references, scores of image sets, and the table of samplers."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from flowturbo import demo
from flowturbo.evaluation.load_options import LoadOptions
from flowturbo.evaluation.quality import scores as commands
from flowturbo.evaluation.quality.features import EXTRACTORS, PIXEL_RANGES
from flowturbo.evaluation.quality.metrics import METRICS
from flowturbo.evaluation.quality.references import ExtractorOptions
from flowturbo.evaluation.table.entries import BASELINE_NAME, SAMPLER_ENTRIES, select_entries
from flowturbo.evaluation.table.table_job import TableJob, fill_shard, make_table
from flowturbo.evaluation.table.table_run import TableSettings
from flowturbo.plotting import check_matplotlib
from runtime.backends import BACKENDS
from runtime.backends.onnxruntime import PROVIDERS
from runtime.cli.command_base import PATH, Group, check_output_path, combine_options, echo_json
from runtime.cli.progress_display import show_progress
from runtime.directory.manifest import MANIFEST_FILE, read_manifest
from runtime.sampling.sampler import FLOWTURBO
from runtime.sampling.solvers import SOLVERS
from runtime.system.errors import RequestError
from runtime.system.files import write_json
from runtime.system.hashes import find_cache_folder
from runtime.system.version import VERSION

DEMO_REFERENCE = "demo"
"""Name of the demo's own reference pack."""


feature_options = combine_options(
    click.option(
        "--features", help=f"{', '.join(EXTRACTORS)}, or an ONNX file with one image input.  [default: the reference's]"
    ),
    click.option("--input-size", type=click.IntRange(1), help="Pixels a side of an ONNX file that takes any."),
    click.option(
        "--input-range", type=click.Choice(list(PIXEL_RANGES)), help="What 0 … 255 become for it.  [default: 0..1]"
    ),
    click.option(
        "--features-provider", default="cpu", show_default=True, type=click.Choice(list(PROVIDERS)), help="Runs it."
    ),
)
engine_options = combine_options(
    click.option("--engine-resolution", type=int, help="Resolution of the engines.  [default: the first built]"),
    click.option("--backend", type=click.Choice(list(BACKENDS)), help="[default: the fastest that can run here]"),
    click.option("--provider", type=click.Choice(list(PROVIDERS)), help="ONNX Runtime execution provider of engines."),
    click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: physical cores]"),
)
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result and nothing else on stdout.")


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


shard_option = click.option(
    "--shard", type=Shard(), help="Make this process's part only, e.g. 0/2; then run once without it."
)


def _split_words(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (value or "").split(",") if word.strip())


metrics_option = click.option(
    "--metrics",
    "names",
    callback=_split_words,
    help=f"Which, separated by commas.  [default: all: {', '.join(METRICS)}]",
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


@main.command()
@click.option("--sample-features", required=True, type=PATH, help=".npy [N, E], or a pack of flowturbo-eval reference.")
@click.option("--reference-features", type=PATH, help=".npy [M, E], or a pack.")
@click.option("--probs", type=PATH, help=".npy [N, K]: class probabilities of the samples, for the Inception Score.")
@metrics_option
@as_json_option
def metrics(
    sample_features: Path, reference_features: Path | None, probs: Path | None, names: tuple[str, ...], as_json: bool
) -> None:
    """Compute every metric that ready features allow."""
    values = commands.score_features(sample_features, reference_features, probs, names)
    _print_result(values, as_json)


@main.command()
@click.argument("samples", type=PATH)
@click.option("--reference", required=True, help=f"A folder of images, an ADM .npz, a pack, or {DEMO_REFERENCE}.")
@click.option("--resolution", type=click.IntRange(1), help="Centre-crop folders of images to this many pixels.")
@feature_options
@metrics_option
@click.option("--cache", type=PATH, help="Folder for features and latents.  [default: in the user's cache]")
@shard_option
@click.option("--num", type=click.IntRange(1), help="Images to make, of engines.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**62), help="Of the first image.")
@click.option("--schedule", help="FlowTurbo blocks, for example H1P5R3.  [default: the directory's]")
@click.option("--solver", type=click.Choice([FLOWTURBO, *SOLVERS]), help="A solver in place of a schedule.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Steps of the solver.")
@click.option("--guidance", type=float, help="Guidance scale; 1 is none.  [default: the directory's]")
@click.option("--guidance-channels", type=int, help="Latent channels that are guided.")
@click.option("--vae", help="Decoder variant, as built.  [default: the directory's first]")
@engine_options
@click.option("--out", type=PATH, help="Write the result here too, as JSON.")
@as_json_option
def score(samples: Path, reference: str, cache: Path | None, as_json: bool, out: Path | None, **options: Any) -> None:
    """Measure SAMPLES: a folder of images, an .npz with arr_0, or an engine directory that is sampled on the fly."""
    check_output_path(out)
    sampler = {name: options.pop(name) for name in ("schedule", "solver", "steps", "guidance", "guidance_channels")}
    engine_options = commands.EngineOptions(
        sampler={name: value for name, value in sampler.items() if value is not None},  # type: ignore[arg-type]
        num=options.pop("num"),
        seed=options.pop("seed"),
        vae=options.pop("vae"),
        resolution=options.pop("engine_resolution"),
        load_options=_take_load_options(options),
    )
    extractor_options = _take_extractor_options(options)
    with show_progress(quiet=as_json) as progress:
        result = commands.score_images(
            samples,
            _resolve_reference(reference),
            extractor_options=extractor_options,
            cache=cache or find_cache_folder() / "evaluation",
            engine_options=engine_options,
            progress=progress,
            **options,
        )
    if result is None:
        return
    if out is not None:
        write_json(out, result)
    _print_result(result, as_json)


@main.command()
@click.option("--data", required=True, type=PATH, help="A folder of images (any depth), or an .npz with arr_0.")
@feature_options
@click.option("--resolution", type=click.IntRange(1), help="Centre-crop to this many pixels, as ADM does.")
@click.option("--cache", type=PATH, help="Folder for features; a killed call goes on there.")
@click.option("--name", help="What reports call it.  [default: the name of --data]")
@click.option("--out", required=True, type=PATH, help="The pack to write, .npz.")
@as_json_option
def reference(data: Path, out: Path, cache: Path | None, as_json: bool, **options: Any) -> None:
    """Make a small reference pack: statistics of all images, features of up to 10,000."""
    check_output_path(out)
    extractor_options = _take_extractor_options(options)
    with show_progress(quiet=as_json) as progress:
        image_set = commands.make_reference(
            data, out, extractor_options=extractor_options, cache=cache, progress=progress, **options
        )
    _print_result(image_set, as_json)


@main.command()
@click.option("--weights", required=True, type=PATH, help="pt_inception-2015-12-05-6726825d.pth")
@click.option("--out", type=PATH, help="ONNX file to write.  [default: where --features inception finds it]")
def inception(weights: Path, out: Path | None) -> None:
    """Convert the TF-2015 Inception's public weights to ONNX, once. Needs the export extra; what follows does not."""
    out = out or EXTRACTORS["inception"].path()
    check_output_path(out)
    commands.convert_inception_weights(weights, out)
    click.echo(str(out))


@main.command()
@click.argument("results", nargs=-1, required=True, type=PATH)
@as_json_option
def compare(results: tuple[Path, ...], as_json: bool) -> None:
    """Put results of `score --out` side by side; refused where extractor, reference or number of images differ."""
    scores = commands.compare_scores(results)
    if as_json:
        echo_json(scores)
        return
    names = list(dict.fromkeys(name for result in scores for name in result["metrics"]))
    click.echo(f"{'':32}" + "".join(f"{METRICS[name].label:>12}" for name in names))
    for result in scores:
        values = (result["metrics"].get(name) for name in names)
        click.echo(f"{result['samples'][-31:]:32}" + "".join(f"{'–' if v is None else f'{v:.5g}':>12}" for v in values))


@main.command()
@click.argument("engines", type=PATH)
@click.option("--reference", required=True, help=f"A folder of images, an ADM .npz, a pack, or {DEMO_REFERENCE}.")
@click.option("--resolution", type=click.IntRange(1), help="Centre-crop a reference folder to this many pixels.")
@feature_options
@click.option("--num", default=256, show_default=True, type=click.IntRange(5), help="Images of a repeat.")
@click.option("--repeats", default=1, show_default=True, type=click.IntRange(1), help="Repeats with other seeds.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**62), help="Of the first image.")
@click.option(
    "--rows",
    callback=_split_words,
    help=f"Names or patterns, separated by commas.  [default: all {len(SAMPLER_ENTRIES)}]",
)
@click.option("--vae", "vaes", multiple=True, help="Decoder variant; may be repeated.  [default: all built]")
@click.option("--guidance", type=float, help="Guidance scale; 1 is none.  [default: the directory's]")
@click.option("--guidance-channels", type=int, help="Latent channels that are guided.")
@click.option("--baseline", default=BASELINE_NAME, show_default=True, help="Row that acceleration is measured against.")
@click.option("--eager", type=click.Path(), help="Predictor checkpoint: Heun 25 in uncompiled PyTorch, timed beside.")
@click.option(
    "--fine-steps", default=250, show_default=True, type=click.IntRange(2), help="Heun steps that stand for exact."
)
@click.option("--same-seed", type=click.IntRange(1), help="Compare only so many images with it.  [default: all]")
@click.option("--timing-rounds", default=10, show_default=True, type=click.IntRange(2), help="Pictures timed per row.")
@click.option("--timing-batch", default=1, show_default=True, type=click.IntRange(1), help="Images timed at once.")
@engine_options
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1, 256), help="To make pictures in.")
@shard_option
@click.option("--out", required=True, type=PATH, help="Folder of the table, and of what makes a killed run go on.")
@click.option("--page", type=PATH, help="Markdown page to write.  [default: OUT/table.md]")
@click.option("--title", default="Samplers compared", show_default=True, help="Heading of the page.")
@as_json_option
def table(
    engines: Path,
    reference: str,
    rows: tuple[str, ...],
    vaes: tuple[str, ...],
    processes: int,
    shard: tuple[int, int] | None,
    out: Path,
    page: Path | None,
    title: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare samplers on ENGINES: acceleration, NFE, latency, quality, same-seed error; × every VAE.

    Writes table.json, table.csv, table.md and a Pareto plot into --out. A killed run continues where it stopped.
    """
    if (out / MANIFEST_FILE).exists():
        raise RequestError(f"--out {out} is an engine directory", remedy="name a folder of its own")
    job = TableJob(
        engines=engines,
        resolution=options.pop("engine_resolution"),
        load_options=_take_load_options(options),
        reference=_resolve_reference(reference),
        crop=options.pop("resolution"),
        extractor_options=_take_extractor_options(options),
        entries=select_entries(rows, read_manifest(engines).samplers),
        settings=TableSettings(vaes=vaes, **options),
        out=out,
    )
    page = page or out / "table.md"
    check_output_path(page)
    check_matplotlib("eval")
    with show_progress(quiet=as_json) as progress:
        if shard is not None:
            fill_shard(job, shard, progress)
            return
        command = shlex.join(["flowturbo-eval", *sys.argv[1:]])
        table_data = make_table(job, processes=processes, page=page, title=title, command=command, progress=progress)
    if as_json:
        echo_json(table_data)
    else:
        click.echo(str(page))


def _take_load_options(options: dict[str, Any]) -> LoadOptions:
    return {"backend": options.pop("backend"), "provider": options.pop("provider"), "threads": options.pop("threads")}


def _take_extractor_options(options: dict[str, Any]) -> ExtractorOptions:
    names = ("features", "input_size", "input_range", "features_provider")
    return ExtractorOptions(*(options.pop(name) for name in names))


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
        else:
            click.echo(f"{name:18} {value:.6g}" if isinstance(value, float) else f"{name:18} {value}")


if __name__ == "__main__":
    main()
