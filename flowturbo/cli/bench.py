"""`flowturbo-bench`: time pictures here, compare reports, and estimate devices."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import click
from rich.console import Console

from flowturbo.evaluation.load_options import make_load_options
from flowturbo.evaluation.speed.baselines import BASELINE_MODES, parse_baselines
from flowturbo.evaluation.speed.bench_job import BenchmarkJob, run_benchmark
from flowturbo.evaluation.speed.bench_report import read_report
from flowturbo.evaluation.speed.html_page import write_page
from flowturbo.evaluation.speed.report_diff import MIN_EFFECT, compare_reports
from flowturbo.evaluation.speed.rounds import MAX_ROUNDS, MIN_ROUNDS, Rounds
from flowturbo.evaluation.speed.terminal_tables import render_benchmark, render_comparison
from runtime.cli.command_base import Command, check_output_path, echo_json
from runtime.cli.dataclass_options import OptionDefaults, options
from runtime.cli.lazy_group import LazyGroup
from runtime.cli.progress_display import show_progress
from runtime.cli.runner_options import RunnerOptions
from runtime.request import GuidanceOptions, RequestOptions, collect_keywords
from runtime.sampling.sampler import FLOWTURBO, SOLVER_NAMES, SamplerChoice
from runtime.system.errors import RequestError
from runtime.system.files import write_json
from runtime.system.json_codec import to_json
from runtime.system.option_fields import REQUIRED, argument, option
from runtime.system.version import VERSION

RUN = "run"


class BenchGroup(LazyGroup):
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
        assert isinstance(command, Command)
        with formatter.section(f"Options of {ctx.info_name} ENGINES…"):
            formatter.write_dl(command.list_help_records(ctx))


LAZY_COMMANDS = {
    "roofline": (
        "flowturbo.cli.bench_roofline:roofline",
        "Estimate a picture's time on devices; measure what this machine reaches.",
    )
}


@click.group(cls=BenchGroup, commands=LAZY_COMMANDS, no_args_is_help=True, subcommand_metavar="ENGINES… | COMMAND …")
@click.version_option(VERSION)
def main() -> None:
    """Measure: flowturbo-bench engines

    Latency of a picture and of every stage, images/s, first picture of a fresh process, memory and energy. Several
    directories or samplers take turns, round by round. docs/benchmark.md says how to read the figures.
    """


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, how long, and where the report goes."""

    engines: tuple[Path, ...] = argument(REQUIRED)
    classes: tuple[str, ...] = option(
        (), "--class", help="Class index or name; may be repeated.", default_text="any", advanced=True
    )
    seed: int = option(0, help="Seed of the first image.", minimum=0, maximum=2**62, advanced=True)
    batches: str = option("1", "--batch", help="Images at once, for example 1,2,4,8.")
    resolutions: str | None = option(
        None, "--resolution", help="Pixels a side, for example 256,512.", default_text="the first built"
    )
    samplers: tuple[str, ...] = option(
        (),
        "--sampler",
        help="FlowTurbo blocks such as H1P5R3, a saved sampler (a name of the directory's or a .json file), or a "
        "solver; may be repeated.",
        default_text="the directory's",
    )
    schedules: tuple[str, ...] = option(
        (), "--schedule", help="Blocks or a saved sampler, as --sampler takes them; may be repeated.", advanced=True
    )
    solvers: tuple[str, ...] = option(
        (), "--solver", help="A solver, as --sampler takes it; may be repeated.", choices=SOLVER_NAMES, advanced=True
    )
    vae: str | None = option(
        None,
        help="Decoder variant, as built; none leaves the decoder out.",
        default_text="the directory's first",
        advanced=True,
    )
    tile: int | None = option(None, help="Decode in tiles of so many pixels: slower, in less memory.", advanced=True)
    repeats: int | None = option(
        None, help="Rounds.", minimum=1, maximum=100_000, default_text="as many as fit --duration"
    )
    duration: float | None = option(
        None,
        help=f"Seconds per condition; {MIN_ROUNDS} rounds at least, {MAX_ROUNDS} at most.",
        minimum=0.1,
        maximum=86_400,
        default_text="10; no limit with --repeats",
    )
    warmup: int | None = option(
        None, help="Rounds before.", minimum=0, maximum=1000, default_text="until they get no faster", advanced=True
    )
    conditioning: Literal["fresh", "kept"] = option(
        "fresh",
        help="Whether each run computes its modulations, as for a class not seen before, or has them.",
        advanced=True,
    )
    cold: bool = option(True, "--cold/--no-cold", help="Time the first picture of fresh processes.")
    energy: bool = option(True, "--energy/--no-energy", help="Count joules where the device can.", advanced=True)
    baselines: tuple[str, ...] = option(
        (),
        "--baseline",
        help="Measure another implementation in the same rounds, on the same weights and seeds: torch, or some of "
        f"{', '.join(f'torch:{mode}' for mode in BASELINE_MODES)}.",
    )
    checkpoints: tuple[str, ...] = option(
        (),
        "--checkpoint",
        help="What the baseline loads: predictor=FILE, refiner=FILE, vae=DIR.",
        default_text="the demo's, if they fit",
        advanced=True,
    )
    out: Path | None = option(None, help="Write the report, .json, for `flowturbo-bench compare`.")
    html: Path | None = option(None, help="Write the report as one page with plots, that opens offline.")
    as_json: bool = option(False, "--json", help="Print the report as JSON and nothing else on stdout.")

    def list_requests(self, sampler: SamplerChoice, guidance: GuidanceOptions) -> tuple[RequestOptions, ...]:
        """Return the keyword arguments of `Pipeline.request` for every sampler.

        Where there are solvers, --steps is theirs alone.

        Raises:
            RequestError: several guidance scales.
        """
        if isinstance(guidance.guidance, tuple):
            scales = ",".join(f"{scale:g}" for scale in guidance.guidance)
            raise RequestError(f"--guidance {scales}", allowed="one scale for all images of a benchmark")
        names = [
            *(replace(sampler, schedule=name) for name in self.schedules),
            *(replace(sampler, solver=name) for name in self.solvers),
            *(replace(sampler, sampler=name) for name in self.samplers),
        ]
        has_solver = bool(self.solvers) or any(name in SOLVER_NAMES for name in self.samplers)
        requests: list[RequestOptions] = []
        for choice in names or [sampler]:
            is_schedule = choice.schedule is not None or (choice.sampler or FLOWTURBO) not in SOLVER_NAMES
            keywords = collect_keywords(replace(choice, steps=None) if has_solver and is_schedule else choice, guidance)
            if self.vae not in (None, "none"):
                keywords["vae"] = self.vae
            requests.append(keywords)
        return tuple(requests)


@main.command(RUN)
@options(
    BenchOptions,
    OptionDefaults(SamplerChoice(), omit=("sampler", "schedule", "solver")),
    GuidanceOptions,
    RunnerOptions,
)
def run(bench: BenchOptions, sampler: SamplerChoice, guidance: GuidanceOptions, runner: RunnerOptions) -> None:
    """Measure engine directories: flowturbo-bench engines --batch 1,4 --html bench.html"""
    out, html = bench.out, bench.html
    for path in (out, html):
        check_output_path(path)
    if out is not None and html is not None and out.absolute() == html.absolute():
        raise RequestError(f"--out and --html both {out}", remedy="name a .json file and a .html file")
    job = BenchmarkJob(
        folders=bench.engines,
        classes=bench.classes,
        samplers=bench.list_requests(sampler, guidance),
        batches=parse_whole_numbers("--batch", bench.batches),
        resolutions=parse_whole_numbers("--resolution", bench.resolutions) if bench.resolutions else (),
        load_options={**make_load_options(runner), "decode_tile": bench.tile},
        rounds=Rounds(bench.repeats, bench.duration if bench.duration or bench.repeats else 10.0, bench.warmup),
        conditioning=bench.conditioning,
        seed=bench.seed,
        decode=bench.vae != "none",
        cold=bench.cold,
        energy=bench.energy,
        baselines=parse_baselines(bench.baselines),
        checkpoints=_parse_checkpoints(bench.checkpoints),
    )
    with show_progress(quiet=bench.as_json) as progress:
        report = run_benchmark(job, ["flowturbo-bench", *sys.argv[1:]], progress)
    if out is not None:
        write_json(out, to_json(report))
    if html is not None:
        write_page(html, report)
    if bench.as_json:
        echo_json(to_json(report))
        return
    render_benchmark(report, Console(width=None if sys.stdout.isatty() else 200))
    for path in (out, html):
        if path is not None:
            click.echo(str(path))


@dataclass(frozen=True)
class CompareOptions:
    """Two reports, and what counts as a change."""

    before: Path = argument(REQUIRED)
    after: Path = argument(REQUIRED)
    min_effect: float = option(
        MIN_EFFECT, help="Least change worth a verdict, as a share: runs differ by a few per cent anyway."
    )
    fail_on_regression: bool = option(False, help="Exit 1 if anything is slower.")
    as_json: bool = option(False, "--json", help="Print JSON and nothing else on stdout.")


@main.command()
@options(CompareOptions)
def compare(reports: CompareOptions) -> None:
    """Compare two reports, with noise in mind: flowturbo-bench compare before.json after.json"""
    diff = compare_reports(read_report(reports.before), read_report(reports.after), reports.min_effect)
    if reports.as_json:
        echo_json(to_json(diff) | {"regressions": [change.name for change in diff.regressions]})
    else:
        render_comparison(diff, Console(width=None if sys.stdout.isatty() else 200))
    undecided = [change.name for change in diff.changes if change.verdict in ("unclear", "too few samples")]
    if reports.fail_on_regression and undecided:
        click.echo(f"warning: no verdict on {', '.join(undecided)}: measure longer (--duration, --repeats)", err=True)
    if reports.fail_on_regression and diff.regressions:
        click.echo(f"error: slower: {', '.join(change.name for change in diff.regressions)}", err=True)
        click.get_current_context().exit(1)


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


def _parse_checkpoints(assignments: Sequence[str]) -> dict[str, Path]:
    """Return the paths of role=FILE words by role."""
    roles = ("predictor", "refiner", "vae")
    paths = {}
    for assignment in assignments:
        role, _, path = assignment.partition("=")
        if role not in roles or not path or role in paths:
            raise RequestError(f"--checkpoint {assignment}", allowed="once each: predictor=FILE, refiner=FILE, vae=DIR")
        paths[role] = Path(path)
    return paths


if __name__ == "__main__":
    main()
