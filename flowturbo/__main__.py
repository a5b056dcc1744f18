"""`python -m flowturbo`: list the commands, which are programs of their own."""

from __future__ import annotations

import sys

from runtime.system.errors import RequestError
from runtime.system.version import VERSION

COMMANDS = {
    "flowturbo-run": ("runtime.cli.run", "make pictures with an engine directory"),
    "flowturbo-export": ("export.cli.export", "build engines from checkpoints, inspect and verify them"),
    "flowturbo-train": ("flowturbo.cli.train", "train a SiT, a refiner or a VAE"),
    "flowturbo-calibrate": ("calibration.cli.calibrate", "find samplers and low precision for a model"),
    "flowturbo-eval": ("flowturbo.cli.evaluate", "measure the quality of pictures"),
    "flowturbo-bench": ("flowturbo.cli.bench", "measure speed, memory and energy"),
}
"""Command → its module for `python -m`, and what it does."""


def main(words: list[str]) -> int:
    """Print the commands. A word that is no option is one of them, which cannot be run from here."""
    asked = [word for word in words if not word.startswith("-")]
    if words == ["--version"]:
        print(f"flowturbo {VERSION}")
        return 0
    if asked:
        name = next((n for n in COMMANDS if asked[0] in (n, n.partition("-")[2])), None)
        remedy = f"{name} …, or python -m {COMMANDS[name][0]} …" if name else "python -m flowturbo lists what they do"
        error = RequestError(f"python -m flowturbo {asked[0]}", allowed=", ".join(COMMANDS), remedy=remedy)
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("FlowTurbo has these commands; each has --help:\n")
    for name, (module, summary) in COMMANDS.items():
        print(f"  {name:<20} {summary} (python -m {module})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
