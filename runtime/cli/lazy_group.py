"""A group of commands that are imported when one of them is needed."""

from __future__ import annotations

import importlib
from collections import UserDict
from collections.abc import Mapping
from typing import Any

import click

from runtime.cli.command_base import Group


class LazyGroup(Group):
    """A group whose --help imports none of its commands; a command is imported to run it or to show its own --help.

    `commands` has, by name, the place "module:function" and one line for the group's --help.

    Attributes:
        summaries: these lines.
    """

    def __init__(self, *arguments: Any, commands: Mapping[str, tuple[str, str]], **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.summaries = {name: summary for name, (_, summary) in commands.items()}
        self.commands = LazyCommands({name: place for name, (place, _) in commands.items()})

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands with their summaries; those that are added later have their docstrings."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, self.summaries.get(name) or self.commands[name].get_short_help_str(90))
                    for name in self.commands
                ]
            )


class LazyCommands(UserDict[str, Any]):
    """Commands by name, imported when they are looked up."""

    def __getitem__(self, name: str) -> click.Command:
        place = self.data[name]
        if isinstance(place, str):
            module, _, function = place.partition(":")
            self.data[name] = place = getattr(importlib.import_module(module), function)
        command: click.Command = place
        return command
