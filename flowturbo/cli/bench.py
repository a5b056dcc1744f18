"""`flowturbo-bench`: time pictures here, compare reports, and estimate devices."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from flowturbo.cli.bench_roofline import roofline
from flowturbo.evaluation.load_options import LoadOptions
from flowturbo.evaluation.speed.baselines import BASELINE_MODES, parse_baselines
from flowturbo.evaluation.speed.bench_job import BenchmarkJob, run_benchmark
from flowturbo.evaluation.speed.bench_report import read_report
from flowturbo.evaluation.speed.html_page import write_page
from flowturbo.evaluation.speed.report_diff import MIN_EFFECT, compare_reports
from flowturbo.evaluation.speed.rounds import MAX_ROUNDS, MIN_ROUNDS, Rounds
from flowturbo.evaluation.speed.terminal_tables import render_benchmark, render_comparison
from runtime.cli.command_base import PATH, Group, check_output_path, echo_json
from runtime.cli.progress_display import show_progress
from runtime.cli.sampler_options import parse_request_options, repeatable_sampler_options, runner_options
from runtime.request import RequestOptions
from runtime.system.errors import RequestError
from runtime.system.files import write_json
from runtime.system.json_codec import to_json
from runtime.system.version import VERSION

RUN = "run"


class BenchGroup(Group):
    """A group with a default command: a first word that is no command is an engine directory."""

    default = RUN

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names, "--version"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, then the options of the default one."""
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
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    help="Measure another implementation in the same rounds, on the same weights and seeds: torch, or some of "
    f"{', '.join(f'torch:{mode}' for mode in BASELINE_MODES)}.",
)
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
    for file in (out, html):
        check_output_path(file)
    if out is not None and html is not None and out.absolute() == html.absolute():
        raise RequestError(f"--out and --html both {out}", remedy="name a .json file and a .html file")
    checkpoint_paths: dict[str, Path] = {}
    for assignment in checkpoints:
        role, _, path = assignment.partition("=")
        if role not in ("predictor", "refiner", "vae") or not path or role in checkpoint_paths:
            raise RequestError(f"--checkpoint {assignment}", allowed="once each: predictor=FILE, refiner=FILE, vae=DIR")
        checkpoint_paths[role] = Path(path)
    samplers = take_sampler_options(options, None if vae == "none" else vae)
    job = BenchmarkJob(
        folders=engines,
        classes=classes,
        samplers=samplers,
        batches=parse_whole_numbers("--batch", batches),
        resolutions=parse_whole_numbers("--resolution", resolutions) if resolutions else (),
        load_options=LoadOptions(**options),  # type: ignore[typeddict-item]
        rounds=Rounds(repeats, duration if duration or repeats else 10.0, warmup),
        conditioning=conditioning,
        seed=seed,
        decode=vae != "none",
        cold=cold,
        energy=energy,
        baselines=parse_baselines(baselines),
        checkpoints=checkpoint_paths,
    )
    with show_progress(quiet=as_json) as progress:
        report = run_benchmark(job, ["flowturbo-bench", *sys.argv[1:]], progress)
    if out is not None:
        write_json(out, to_json(report))
    if html is not None:
        write_page(html, report)
    if as_json:
        echo_json(to_json(report))
        return
    render_benchmark(report, Console(width=None if sys.stdout.isatty() else 200))
    for file in (out, html):
        if file is not None:
            click.echo(str(file))


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
    """Compare two reports, with noise in mind: flowturbo-bench compare before.json after.json"""
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
    """Take one set of request options per --schedule and --solver out of a command's `options`.

    --steps applies to solvers where there are both.

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
    """Parse different whole numbers separated by commas.

    Raises:
        RequestError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise RequestError(
            f"{option} {text!r}", allowed=f"different whole numbers, separated by commas: {option} 1,2,4"
        )
    return tuple(map(int, parts))
