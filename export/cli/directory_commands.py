"""`flowturbo-export inspect`, `verify` and `doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from export.cli.display import make_proof_table, make_wide_console, print_manifest
from export.doctor import collect_doctor_report, print_doctor_report
from export.proof.verify import verify_directory
from runtime.cli.command_base import Command, echo_json
from runtime.cli.dataclass_options import options
from runtime.cli.progress_display import show_progress
from runtime.directory.manifest import read_manifest
from runtime.system.json_codec import to_json
from runtime.system.option_fields import REQUIRED, argument, option


@dataclass(frozen=True)
class InspectOptions:
    """Which directory."""

    folder: Path = argument(REQUIRED)
    as_json: bool = option(False, "--json", help="The manifest with every graph's inputs and outputs.")


@click.command(cls=Command)
@options(InspectOptions)
def inspect(inspected: InspectOptions) -> None:
    """What is in an engine directory."""
    manifest = read_manifest(inspected.folder)
    if not inspected.as_json:
        print_manifest(inspected.folder, manifest)
        return
    data = to_json(manifest)
    for record, graph in zip(data["graphs"], manifest.graphs, strict=True):
        spec = manifest.build_spec(graph.graph, graph.resolution)
        record["inputs"] = {name: to_json(tensor) for name, tensor in spec.inputs.items()}
        record["outputs"] = {name: to_json(tensor) for name, tensor in spec.outputs.items()}
    echo_json(data)


@dataclass(frozen=True)
class VerifyOptions:
    """Which directory, and what is tried."""

    folder: Path = argument(REQUIRED)
    allow_foreign: bool = option(False, help="Try engines that another device or release built.")
    as_json: bool = option(False, "--json", help="The comparisons as JSON.")


@click.command(cls=Command)
@options(VerifyOptions)
def verify(verified: VerifyOptions) -> None:
    """Prove a directory again: every hash, every graph, a whole trajectory and picture."""
    manifest = read_manifest(verified.folder)
    with show_progress(quiet=verified.as_json) as progress:
        records, skipped = verify_directory(verified.folder, manifest, progress, verified.allow_foreign)
    if verified.as_json:
        echo_json({"proofs": to_json(records), "not_executed": skipped})
        return
    make_wide_console().print(make_proof_table(tuple(records)))
    for line in skipped:
        click.echo(line)
    click.echo(f"verified: {len(manifest.files)} files unaltered, {len(records)} comparisons within tolerance")


@dataclass(frozen=True)
class DoctorOptions:
    """How the report is shown."""

    as_json: bool = option(False, "--json", help="The report as JSON.")


@click.command(cls=Command)
@options(DoctorOptions)
def doctor(shown: DoctorOptions) -> None:
    """What this machine has, what would be used, and what to install."""
    report = collect_doctor_report()
    if shown.as_json:
        echo_json(report)
    else:
        print_doctor_report(report, make_wide_console())
