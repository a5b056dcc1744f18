"""What people typed at commit 083078a still works: every command line of its README and docs, and every option name.

The two data files were written from that commit: the shell blocks of its documents, and `click` parameters of its
commands.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parent.parent
COMMAND_LINES = (DATA / "command_lines_083078a.txt").read_text().splitlines()
OPTIONS = dict(line.split(": ") for line in (DATA / "options_083078a.txt").read_text().splitlines())
MAINS = dict(re.findall(r'^(flowturbo-\w+) = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that a line runs, and the words that are left for it."""
    module, _, function = MAINS[words[0]].partition(":")
    command: click.Command = getattr(importlib.import_module(module), function)
    rest = words[1:]
    while isinstance(command, click.Group):
        is_named = rest and rest[0] in command.commands
        name = rest.pop(0) if is_named else command.default  # type: ignore[attr-defined]  # what may be left out
        command = command.commands[name]
    return command, rest


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if "…" not in line])
def test_a_command_line_is_understood(line: str) -> None:
    command, rest = find_command(shlex.split(line))
    context = command.make_context(str(command.name), rest)
    assert not context.args


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_exists(name: str) -> None:
    command, rest = find_command(name.split())
    assert not rest
    flags = {
        flag
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    assert set(OPTIONS[name].split()) - {"--version"} <= flags


def test_there_are_command_lines_of_every_command() -> None:
    assert len(COMMAND_LINES) > 60
    assert {line.split()[0] for line in COMMAND_LINES} == set(MAINS)
