"""Progress of work that takes minutes, on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from runtime.cli.command_base import on_terminal

Report = Callable[[int, int], None]
"""Told how much is done, and how much there is."""

Say = Callable[[str, int, int], None]
"""Told what is being done, how much of it is, and how much there is."""

QUIET_SECONDS = 15.0
"""Between two lines of progress where no bar can be drawn."""


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Say]:
    """Progress on stderr: a bar where somebody watches, a line now and then elsewhere, nothing if `quiet`."""
    if quiet:
        yield lambda what, done, of: None
    elif not on_terminal():
        yield _lines()
    else:
        columns = (
            TextColumn("{task.description:28}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bars:
            tasks: dict[str, Any] = {}

            def say(what: str, done: int, of: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=of)
                bars.update(tasks[what], completed=done, total=of)

            yield say


def _lines() -> Say:
    started = told = time.monotonic()

    def say(what: str, done: int, of: int) -> None:
        nonlocal told
        if done >= of or time.monotonic() - told >= QUIET_SECONDS:
            told = time.monotonic()
            click.echo(f"[{told - started:5.0f} s] {what}: {done}/{of}", err=True)

    return say
