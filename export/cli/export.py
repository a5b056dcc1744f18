"""`flowturbo-export`: build-engines, add-sampler, inspect, verify, doctor."""

from __future__ import annotations

import click

from runtime.cli.lazy_group import LazyGroup
from runtime.system.version import VERSION

COMMANDS = {
    "build-engines": ("export.cli.build_engines:build_engines", "Export, compile and prove an engine directory."),
    "add-sampler": ("export.cli.build_engines:add_sampler", "Keep calibrated samplers in an engine directory."),
    "inspect": ("export.cli.directory_commands:inspect", "Show what is in an engine directory."),
    "verify": ("export.cli.directory_commands:verify", "Prove a directory again: hashes, graphs, a whole picture."),
    "doctor": ("export.cli.directory_commands:doctor", "Show what this machine has, and what to install."),
}


@click.group(cls=LazyGroup, commands=COMMANDS)
@click.version_option(VERSION)
def main() -> None:
    """Checkpoints to engines, and the proof that nothing changed on the way."""


if __name__ == "__main__":
    main()
