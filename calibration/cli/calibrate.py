"""`flowturbo-calibrate`: measures a model to deploy it better."""

from __future__ import annotations

import click

from runtime.cli.lazy_group import LazyGroup
from runtime.system.version import VERSION

COMMANDS = {
    "constant": (
        "calibration.cli.sampler_commands:constant",
        "Find the setting of a rule of adaptive steps that meets a number of evaluations.",
    ),
    "schedule": (
        "calibration.cli.sampler_commands:schedule",
        "Freeze adaptive steps, or find the best blocks for a time or a number of evaluations.",
    ),
    "solver": ("calibration.cli.sampler_commands:solver", "Search a multistep table for a model by gradient."),
    "study": (
        "calibration.cli.sampler_commands:study",
        "Measure all samplers of a directory and write a page.",
    ),
    "int8": (
        "calibration.cli.lowbit_commands:int8",
        "Measure what the layers of a model read, for build-engines --precision int8.",
    ),
    "sensitivity": (
        "calibration.cli.lowbit_commands:sensitivity",
        "Measure what every layer costs in quality when it is quantised.",
    ),
}


@click.group(
    cls=LazyGroup,
    commands=COMMANDS,
    purpose="calibration",
    extra="calibrate",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(VERSION)
def main() -> None:
    """Measure a model to deploy it better: samplers that fit it, kept by name.

    \b
    flowturbo-calibrate schedule engines --steps 8 --name frozen8
    flowturbo-calibrate solver engines --nfe 6 --name fast6
    flowturbo-run --engine engines --class 207 --sampler fast6

    What is found is written to a small JSON file and into the engine directory's manifest. Everything is measured by
    the same-seed error: the distance of the latents from those of a very fine sampler, on seeds that were not used.
    """


if __name__ == "__main__":
    main()
