"""`flowturbo-export build-engines` and `add-sampler`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import click

from export.build import DEFAULT_LIMITS, build
from export.build_request import BuildRequest, resolve_targets
from export.cli.build_options import BuildOptions, CheckpointOptions, GateOptions, TargetOptions
from export.cli.display import print_build
from export.directory_samplers import add_samplers, collect_samplers
from export.directory_source import DirectorySource, open_directory
from runtime.cli.command_base import Command, echo_json
from runtime.cli.dataclass_options import options
from runtime.cli.progress_display import show_progress
from runtime.system.errors import RequestError
from runtime.system.json_codec import to_json
from runtime.system.option_fields import REQUIRED, argument, option


@click.command("build-engines", cls=Command)
@options(CheckpointOptions, TargetOptions, GateOptions, BuildOptions)
def build_engines(
    checkpoints: CheckpointOptions, target: TargetOptions, gate: GateOptions, build_options: BuildOptions
) -> None:
    """Export, compile and prove: flowturbo-export build-engines --out engines

    With no checkpoint named, the demo model. Unchanged inputs rebuild nothing; an interrupted build goes on.
    """
    started, source = time.monotonic(), build_options.source
    out = build_options.out or source or Path("engines")
    sampler_set = collect_samplers(
        out,
        build_options.samplers,
        build_options.default_schedule,
        with_demo=checkpoints.predictor is None and source is None,
        force=build_options.force,
    )
    against = build_options.against
    from_source: BuildRequest | DirectorySource
    if source is None:
        for flag, is_given, effect in (
            ("--allow-foreign", build_options.allow_foreign, "keeps the engines that are in the --from directory"),
            ("--against", against, "compares engines that are built from the --from directory"),
        ):
            if is_given:
                raise RequestError(f"{flag} without --from", remedy=f"leave it out: it {effect}")
        from_source = checkpoints.resolve(target)
    else:
        if checkpoints != CheckpointOptions() or (against is None and gate != GateOptions()):
            raise RequestError(
                "--from together with checkpoints or options of their export",
                allowed="--target, --precision, --against (with --gate-images and --gate-psnr), --out, "
                "--low-memory, --rebuild, --force, --allow-foreign",
                remedy="what the directory was exported with stays; build from checkpoints to change it",
            )
        precisions = resolve_targets(target.targets, target.precision)
        from_source = open_directory(source, precisions, allow_foreign=build_options.allow_foreign, against=against)
    with show_progress(quiet=build_options.as_json) as progress:
        result = build(
            from_source,
            out,
            rebuild=build_options.rebuild,
            force=build_options.force,
            low_memory=build_options.low_memory,
            gate=DEFAULT_LIMITS if source is not None and against is None else gate.make_limits(),
            sampler_set=sampler_set,
            progress=progress,
        )
    if build_options.as_json:
        echo_json(to_json(result.manifest))
    else:
        print_build(result, out, time.monotonic() - started)


@dataclass(frozen=True)
class AddSamplerOptions:
    """Which samplers are added to which directory."""

    folder: Path = argument(REQUIRED)
    files: tuple[Path, ...] = argument(())
    default_schedule: str | None = option(None, help="What flowturbo-run uses: blocks, or the name of a saved sampler.")
    force: bool = option(False, help="Also samplers that were calibrated for another model.")


@click.command("add-sampler", cls=Command)
@options(AddSamplerOptions)
def add_sampler(added: AddSamplerOptions) -> None:
    """Keep samplers of flowturbo-calibrate in an engine directory; nothing is built again."""
    folder = added.folder
    sampler_set = collect_samplers(folder, added.files, added.default_schedule, force=added.force)
    manifest = add_samplers(folder, sampler_set)
    click.echo(f"{folder} has {', '.join(sampler.name for sampler in manifest.samplers) or 'no saved sampler'}")
