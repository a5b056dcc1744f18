"""Show the progress of a command on stderr: bars on a terminal, plain lines elsewhere, nothing under --json."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from runtime.cli.command_base import is_terminal
from runtime.system.progress import Progress

LINE_INTERVAL_SECONDS = 15.0
"""Between two lines of one task where no bar can be drawn."""


@contextmanager
def show_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Give the progress object of a command; `quiet` (--json) shows nothing."""
    if quiet:
        yield Progress()
    elif is_terminal():
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
            yield _TerminalProgress(bars)
    else:
        yield LineProgress()


class _TerminalProgress(Progress):
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}
        self._stage: Any = None

    def stage(self, text: str) -> None:
        if self._stage is not None:
            self._bars.remove_task(self._stage)
        self._stage = self._bars.add_task(text, total=None)

    def update(self, task: str, done: int, total: int) -> None:
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total)
        self._bars.update(self._tasks[task], completed=done, total=total)

    def write(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)


class LineProgress(Progress):
    """A line per stage (what ticks in parentheses is for a terminal), and a line of a task now and then."""

    def __init__(self) -> None:
        self._last_stage = ""
        self._start_time = self._last_line_time = time.monotonic()

    def stage(self, text: str) -> None:
        name = text.partition(" (")[0]
        if name != self._last_stage:
            click.echo(name, err=True)
        self._last_stage = name

    def update(self, task: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self._last_line_time >= LINE_INTERVAL_SECONDS:
            self._last_line_time = now
            click.echo(f"[{now - self._start_time:5.0f} s] {task}: {done}/{total}", err=True)

    def write(self, text: str) -> None:
        click.echo(text, err=True)
