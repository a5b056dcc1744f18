"""`flowturbo-bench`: what a picture takes here, what changed, and what a device could do at best."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flowturbo.cli.bench_roofline import roofline
from flowturbo.evaluation.speed.baselines import parse_baselines
from flowturbo.evaluation.speed.bench_job import BenchmarkJob, run_benchmark
from flowturbo.evaluation.speed.bench_report import read_report
from flowturbo.evaluation.speed.html_page import write_page
from flowturbo.evaluation.speed.report_diff import MIN_EFFECT, compare_reports
from flowturbo.evaluation.speed.rounds import MAX_ROUNDS, MIN_ROUNDS, ProgressCallback, Rounds
from flowturbo.evaluation.speed.terminal_tables import render_benchmark, render_comparison
from runtime.cli.command_base import PATH, Group, check_output_path, echo_json, is_terminal
from runtime.cli.sampler_options import parse_request_options, repeatable_sampler_options, runner_options
from runtime.request import RequestOptions
from runtime.system.errors import RequestError
from runtime.system.files import write_json
from runtime.system.json_codec import to_json
from runtime.system.version import VERSION

RUN = "run"


class BenchGroup(Group):
    """A group whose first command may be left out: what is no command's name is an engine directory."""

    default = RUN

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names, "--version"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands, then the options of the one that may be left out."""
        super().format_options(ctx, formatter)
        command = self.commands[self.default]
        with formatter.section(f"Options of {ctx.info_name} ENGINES…"):
            records = [record for option in command.params if (record := option.get_help_record(ctx))]
            formatter.write_dl(records)


@click.group(cls=BenchGroup, no_args_is_help=True, subcommand_metavar="ENGINES… | COMMAND …")
@click.version_option(VERSION)
def main() -> None:
    """Measure: flowturbo-bench engines

    Latency of a picture and of every stage, images/s, first picture of a fresh process, memory and energy. Several
    directories or samplers take turns, round by round. docs/benchmark.md says how to read the figures.
    """


_BASELINE_HELP = (
    "Measure another implementation in the same rounds, on the same weights and seeds: torch, or some of torch:eager, "
    "torch:eager-bf16, torch:compile, torch:compile-bf16."
)


@main.command(RUN)
@click.argument("engines", nargs=-1, required=True, type=PATH)
@click.option("--class", "classes", multiple=True, help="Class index or name; may be repeated.  [default: any]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**62), help="Seed of the first image.")
@click.option("--batch", "batches", default="1", show_default=True, help="Images at once, for example 1,2,4,8.")
@click.option("--resolution", "resolutions", help="Pixels a side, for example 256,512.  [default: the first built]")
@repeatable_sampler_options
@click.option("--vae", help="Decoder variant, as built; none leaves the decoder out.  [default: the directory's first]")
@runner_options
@click.option("--tile", "decode_tile", type=int, help="Decode in tiles of so many pixels: slower, in less memory.")
@click.option("--repeats", type=click.IntRange(1, 100_000), help="Rounds.  [default: as many as fit --duration]")
@click.option(
    "--duration",
    type=click.FloatRange(0.1, 86_400),
    help=f"Seconds per condition; {MIN_ROUNDS} rounds at least, {MAX_ROUNDS} at most.  "
    "[default: 10; no limit with --repeats]",
)
@click.option("--warmup", type=click.IntRange(0, 1000), help="Rounds before.  [default: until they get no faster]")
@click.option(
    "--conditioning",
    type=click.Choice(["fresh", "kept"]),
    default="fresh",
    show_default=True,
    help="Whether each run computes its modulations, as for a class not seen before, or has them.",
)
@click.option("--cold/--no-cold", default=True, show_default=True, help="Time the first picture of fresh processes.")
@click.option("--energy/--no-energy", default=True, show_default=True, help="Count joules where the device can.")
@click.option("--baseline", "baselines", multiple=True, help=_BASELINE_HELP)
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    help="What the baseline loads: predictor=FILE, refiner=FILE, vae=DIR.  [default: the demo's, if they fit]",
)
@click.option("--out", type=PATH, help="Write the report, .json, for `flowturbo-bench compare`.")
@click.option("--html", type=PATH, help="Write the report as one page with plots, that opens offline.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON and nothing else on stdout.")
def run(
    engines: tuple[Path, ...],
    classes: tuple[str, ...],
    seed: int,
    batches: str,
    resolutions: str | None,
    vae: str | None,
    repeats: int | None,
    duration: float | None,
    warmup: int | None,
    conditioning: str,
    cold: bool,
    energy: bool,
    baselines: tuple[str, ...],
    checkpoints: tuple[str, ...],
    out: Path | None,
    html: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure engine directories: flowturbo-bench engines --batch 1,4 --html bench.html"""
    for path in (out, html):
        check_output_path(path)
    if out is not None and html is not None and out.absolute() == html.absolute():
        raise RequestError(f"--out and --html both {out}", remedy="name a .json file and a .html file")
    samplers = take_sampler_options(options, None if vae == "none" else vae)
    job = BenchmarkJob(
        folders=engines,
        classes=classes,
        samplers=samplers,
        batches=parse_whole_numbers("--batch", batches),
        resolutions=parse_whole_numbers("--resolution", resolutions) if resolutions else (),
        load_options=options,
        rounds=Rounds(repeats, duration if duration or repeats else 10.0, warmup),
        conditioning=conditioning,
        seed=seed,
        decode=vae != "none",
        cold=cold,
        energy=energy,
        baselines=parse_baselines(baselines),
        checkpoints=_parse_checkpoints(checkpoints),
    )
    with _show_progress() as progress:
        report = run_benchmark(job, ["flowturbo-bench", *sys.argv[1:]], progress)
    if out is not None:
        write_json(out, to_json(report))
    if html is not None:
        write_page(html, report)
    if as_json:
        echo_json(to_json(report))
        return
    render_benchmark(report, Console(width=None if sys.stdout.isatty() else 200))
    for path in (out, html):
        if path is not None:
            click.echo(str(path))


@main.command()
@click.argument("before", type=PATH)
@click.argument("after", type=PATH)
@click.option(
    "--min-effect",
    default=MIN_EFFECT,
    show_default=True,
    type=float,
    help="Least change worth a verdict, as a share: runs differ by a few per cent anyway.",
)
@click.option("--fail-on-regression", is_flag=True, help="Exit 1 if anything is slower.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
@click.pass_context
def compare(
    ctx: click.Context, before: Path, after: Path, min_effect: float, fail_on_regression: bool, as_json: bool
) -> None:
    """What changed between two reports, with noise in mind: flowturbo-bench compare before.json after.json"""
    diff = compare_reports(read_report(before), read_report(after), min_effect)
    if as_json:
        echo_json(to_json(diff) | {"regressions": [change.name for change in diff.regressions]})
    else:
        render_comparison(diff, Console(width=None if sys.stdout.isatty() else 200))
    undecided = [change.name for change in diff.changes if change.verdict in ("unclear", "too few samples")]
    if fail_on_regression and undecided:
        click.echo(f"warning: no verdict on {', '.join(undecided)}: measure longer (--duration, --repeats)", err=True)
    if fail_on_regression and diff.regressions:
        click.echo(f"error: slower: {', '.join(change.name for change in diff.regressions)}", err=True)
        ctx.exit(1)


main.add_command(roofline)


def take_sampler_options(options: dict[str, Any], vae: str | None) -> tuple[RequestOptions, ...]:
    """One set of request options per --schedule and --solver, taken out of a command's `options`.

    --steps goes with solvers where there are both.

    Raises:
        RequestError: several guidance scales.
    """
    schedules, solvers = options.pop("schedule"), options.pop("solver")
    choices = [
        *({"schedule": s, "solver": None} for s in schedules),
        *({"schedule": None, "solver": s} for s in solvers),
    ]
    guidance = options.get("guidance")
    if guidance is not None and "," in guidance:
        raise RequestError(f"--guidance {guidance}", allowed="one scale for all images of a benchmark")
    requests: list[RequestOptions] = []
    for choice in choices or [{"schedule": None, "solver": None}]:
        sampler_options = {**options, **choice}
        if solvers and choice["schedule"] is not None:
            sampler_options["steps"] = None
        request = parse_request_options(sampler_options, images=1)
        if vae is not None:
            request["vae"] = vae
        requests.append(request)
    remaining = {**options, "schedule": None, "solver": None}
    parse_request_options(remaining, images=1)
    options.clear()
    options.update(remaining)
    return tuple(requests)


def parse_whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Different whole numbers separated by commas.

    Raises:
        RequestError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise RequestError(
            f"{option} {text!r}", allowed=f"different whole numbers, separated by commas: {option} 1,2,4"
        )
    return tuple(map(int, parts))


def _parse_checkpoints(assignments: Sequence[str]) -> dict[str, Path]:
    """role=FILE words by role."""
    roles = ("predictor", "refiner", "vae")
    paths = {}
    for assignment in assignments:
        role, _, path = assignment.partition("=")
        if role not in roles or not path or role in paths:
            raise RequestError(f"--checkpoint {assignment}", allowed="once each: predictor=FILE, refiner=FILE, vae=DIR")
        paths[role] = Path(path)
    return paths


@contextmanager
def _show_progress() -> Iterator[ProgressCallback]:
    """A progress bar where somebody watches."""
    if not is_terminal():
        yield lambda text, share: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda text, share: progress.update(task, description=text, completed=share)
