"""Progress of work that takes minutes, on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from runtime.cli.command_base import is_terminal

CountCallback = Callable[[int, int], None]
"""Told how much is done, and how much there is."""

Say = Callable[[str, int, int], None]
"""Told what is being done, how much of it is, and how much there is."""

QUIET_SECONDS = 15.0
"""Between two lines of progress where no bar can be drawn."""


@contextmanager
def report_progress(*, quiet: bool = False) -> Iterator[Say]:
    """Progress on stderr: a bar where somebody watches, a line now and then elsewhere, nothing if `quiet`."""
    if quiet:
        yield lambda what, done, of: None
    elif not is_terminal():
        yield _make_line_printer()
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


def _make_line_printer() -> Say:
    start_time = last_print_time = time.monotonic()

    def say(what: str, done: int, of: int) -> None:
        nonlocal last_print_time
        if done >= of or time.monotonic() - last_print_time >= QUIET_SECONDS:
            last_print_time = time.monotonic()
            click.echo(f"[{last_print_time - start_time:5.0f} s] {what}: {done}/{of}", err=True)

    return say
