"""`flowturbo-export`: build-engines, add-sampler, inspect, verify, doctor."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from export.build import DEFAULT_LIMITS, BuildResult, build
from export.build_request import resolve_request, resolve_targets
from export.cli.build_options import (
    build_options,
    checkpoint_options,
    default_schedule_option,
    graph_options,
    layer_options,
    pop_gate_limits,
    sampler_options,
    target_options,
)
from export.cli.display import make_proof_table, make_wide_console, print_build, print_manifest
from export.directory_samplers import add_samplers, collect_samplers
from export.directory_source import open_directory
from runtime.cli.command_base import PATH, Group, echo_json
from runtime.cli.progress_display import show_progress
from runtime.directory.manifest import read_manifest
from runtime.directory.records import Manifest
from runtime.system.errors import RequestError
from runtime.system.json_codec import to_json
from runtime.system.progress import Progress
from runtime.system.version import VERSION


@click.group(cls=Group)
@click.version_option(VERSION)
def main() -> None:
    """Checkpoints to engines, and the proof that nothing changed on the way."""


@main.command("build-engines")
@checkpoint_options
@target_options
@sampler_options
@layer_options
@graph_options
@build_options
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and nothing else on stdout.")
def build_engines(
    source: Path | None,
    out: Path | None,
    samplers: tuple[Path, ...],
    default_schedule: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Export, compile and prove: flowturbo-export build-engines --out engines

    With no checkpoint named, the demo model. Unchanged inputs rebuild nothing; an interrupted build goes on.
    """
    started = time.monotonic()
    target = out or source or Path("engines")
    is_demo = options["predictor"] is None and source is None
    sampler_set = collect_samplers(target, samplers, default_schedule, with_demo=is_demo, force=options["force"])
    with show_progress(quiet=as_json) as progress:
        if source is None:
            result = _build_checkpoints(target, options, sampler_set=sampler_set, progress=progress)
        else:
            result = _build_directory(source, target, options, sampler_set=sampler_set, progress=progress)
    if as_json:
        echo_json(to_json(result.manifest))
    else:
        print_build(result, target, time.monotonic() - started)


def _pop_build_flags(options: dict[str, Any]) -> dict[str, Any]:
    """What a build may do, from checkpoints or not; taken out of the options."""
    return {name: options.pop(name) for name in ("rebuild", "force", "low_memory")}


def _build_checkpoints(out: Path, options: dict[str, Any], *, progress: Progress, **sampler_set: Any) -> BuildResult:
    for option, value, effect in (
        ("--allow-foreign", options.pop("allow_foreign"), "keeps the engines that are in the --from directory"),
        ("--against", options.pop("against"), "judges engines that are built from the --from directory"),
    ):
        if value:
            raise RequestError(f"{option} without --from", remedy=f"leave it out: it {effect}")
    flags, gate = _pop_build_flags(options), pop_gate_limits(options)
    if options["max_batch"] is None:
        del options["max_batch"]
    return build(resolve_request(**options), out, gate=gate, progress=progress, **flags, **sampler_set)


def _build_directory(
    source: Path, out: Path, options: dict[str, Any], *, progress: Progress, **sampler_set: Any
) -> BuildResult:
    flags = _pop_build_flags(options)
    directory_options = {name: options.pop(name) for name in ("allow_foreign", "against")}
    targets, precision = options.pop("targets"), options.pop("precision")
    gate = DEFAULT_LIMITS if directory_options["against"] is None else pop_gate_limits(options)
    if any(map(_is_given, options.values())):  # what is left decides how checkpoints are exported
        raise RequestError(
            "--from together with checkpoints or options of their export",
            allowed="--target, --precision, --against (with --gate-images and --gate-psnr), --out, --low-memory, "
            "--rebuild, --force, --allow-foreign",
            remedy="what the directory was exported with stays; build from checkpoints to change it",
        )
    directory = open_directory(source, resolve_targets(targets, precision), **directory_options)
    return build(directory, out, gate=gate, progress=progress, **flags, **sampler_set)


def _is_given(value: Any) -> bool:
    """Whether an option without a default of its own was given: 0 is a value, off and nothing are not."""
    return value is not None and value is not False and value != ()


@main.command("add-sampler")
@click.argument("folder", type=PATH)
@click.argument("files", nargs=-1, type=PATH)
@default_schedule_option
@click.option("--force", is_flag=True, help="Also samplers that were calibrated for another model.")
def add_sampler(folder: Path, files: tuple[Path, ...], default_schedule: str | None, force: bool) -> None:
    """Keep samplers of flowturbo-calibrate in an engine directory; nothing is built again."""
    manifest = add_samplers(folder, collect_samplers(folder, files, default_schedule, force=force))
    click.echo(f"{folder} has {', '.join(sampler.name for sampler in manifest.samplers) or 'no saved sampler'}")


@main.command()
@click.argument("folder", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="The manifest with every graph's inputs and outputs.")
def inspect(folder: Path, as_json: bool) -> None:
    """What is in an engine directory."""
    manifest = read_manifest(folder)
    if as_json:
        echo_json(_describe_manifest(manifest))
    else:
        print_manifest(folder, manifest)


def _describe_manifest(manifest: Manifest) -> dict[str, Any]:
    """The manifest, each graph with its inputs and outputs."""
    data: dict[str, Any] = to_json(manifest)
    for record, graph in zip(data["graphs"], manifest.graphs, strict=True):
        spec = manifest.build_spec(graph.graph, graph.resolution)
        record["inputs"] = {name: to_json(tensor) for name, tensor in spec.inputs.items()}
        record["outputs"] = {name: to_json(tensor) for name, tensor in spec.outputs.items()}
    return data


@main.command()
@click.argument("folder", type=PATH)
@click.option("--allow-foreign", is_flag=True, help="Try engines that another device or release built.")
@click.option("--json", "as_json", is_flag=True, help="The comparisons as JSON.")
def verify(folder: Path, allow_foreign: bool, as_json: bool) -> None:
    """Prove a directory again: every hash, every graph, a whole trajectory and picture."""
    from export.proof.verify import verify_directory

    manifest = read_manifest(folder)
    with show_progress(quiet=as_json) as progress:
        records, skipped = verify_directory(folder, manifest, progress, allow_foreign)
    if as_json:
        echo_json({"proofs": to_json(records), "not_executed": skipped})
        return
    make_wide_console().print(make_proof_table(tuple(records)))
    for line in skipped:
        click.echo(line)
    click.echo(f"verified: {len(manifest.files)} files unaltered, {len(records)} comparisons within tolerance")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def doctor(as_json: bool) -> None:
    """What this machine has, what would be used, and what to install."""
    from export.doctor import collect_doctor_report, print_doctor_report

    report = collect_doctor_report()
    if as_json:
        echo_json(report)
    else:
        print_doctor_report(report, make_wide_console())
