"""What every command shares: one clean line for a user's mistake, quiet warnings, progress on a terminal."""

from __future__ import annotations

import errno
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from runtime.directory.manifest import MANIFEST_FILE
from runtime.system.errors import FlowTurboError, OutputError
from runtime.system.files import make_folder

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def combine_options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Options as one decorator, in the order in which --help shows them."""

    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


class Command(click.Command):
    """A command whose user errors are one message and exit code 1; only our own bugs show a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        warnings.showwarning = _show_warning
        try:
            return super().invoke(ctx)
        except FlowTurboError as error:
            click.echo(f"error: {error}", err=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
                raise
            click.echo(f"error: {error.strerror}: {error.filename or 'output'}", err=True)
        except KeyboardInterrupt:
            click.echo("cancelled", err=True)
            ctx.exit(130)
        ctx.exit(1)


class Group(click.Group):
    """A group whose commands are `Command`s."""

    command_class = Command


def echo_json(data: Any) -> None:
    """The only thing on stdout under --json."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def check_output_path(path: Path | None) -> None:
    """Finds out before an hour of work that its result cannot be written; makes the folder.

    Raises:
        OutputError: a folder, an engine directory's manifest, or a place that cannot be made.
    """
    if path is None:
        return
    if path.is_dir() or path.name == MANIFEST_FILE:
        raise OutputError(f"cannot write {path}", allowed="a file of its own", remedy="name another file")
    folder = make_folder(path.absolute().parent)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror}", remedy="name another file") from error


def is_terminal() -> bool:
    """Whether progress may be drawn: somebody is looking at stderr."""
    return sys.stderr.isatty()


def _show_warning(message: Warning | str, *details: Any, **options: Any) -> None:
    click.echo(f"warning: {message}", err=True)
