"""Shared by every command: one message for a user's mistake, quiet warnings, --config and --help-all."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import click

from runtime.cli.config_file import make_config_option
from runtime.directory.manifest import MANIFEST_FILE
from runtime.system.errors import FlowTurboError, OutputError
from runtime.system.files import make_folder

PATH = click.Path(path_type=Path)
SHOW_ALL = "flowturbo.show_all_options"
"""In a click context's `meta` under --help-all."""
OWN_PACKAGES = ("runtime", "flowturbo", "export", "calibration")


_USER_ERRNOS = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EACCES: "name a file or folder that you may use",
    errno.EROFS: "name a folder that can be written",
    errno.ENAMETOOLONG: "shorten the name: a part of a path has at most 255 bytes",
    errno.ELOOP: "name what the link should lead to",
    errno.ENOTDIR: "name a folder where a folder is expected",
    errno.EISDIR: "name a file where a file is expected",
    errno.EMFILE: "allow more open files: ulimit -n",
}
"""Errors of the system that a user can cause, and what to do."""


class UserErrors(click.Command):
    """A command that shows an error of its user as one message, with exit code 1; our own bugs show a traceback."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run the command; a closed stderr is /dev/null, and names that are no text can be printed."""
        _prepare_streams()
        return super().main(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        warnings.showwarning = _show_warning
        try:
            return super().invoke(ctx)
        except FlowTurboError as error:
            click.echo(f"error: {error}", err=True)
        except OSError as error:
            if error.errno not in _USER_ERRNOS:
                raise
            message = FlowTurboError(
                f"{error.strerror}: {error.filename or 'output'}", remedy=_USER_ERRNOS[error.errno]
            )
            click.echo(f"error: {message}", err=True)
        except KeyboardInterrupt:
            click.echo("cancelled", err=True)
            ctx.exit(130)
        ctx.exit(1)


class Command(UserErrors):
    """A command with --config FILE, and with --help-all for the options that --help leaves out."""

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.params += [make_config_option(), _make_help_all_option()]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options; the advanced ones under --help-all only."""
        with formatter.section("Options"):
            formatter.write_dl(self.list_help_records(ctx))

    def list_help_records(self, ctx: click.Context) -> list[tuple[str, str]]:
        """Return (option, help) of what is shown, the options that every command has last."""
        shown = [
            parameter
            for parameter in self.get_params(ctx)
            if isinstance(parameter, click.Option)
            and (SHOW_ALL in ctx.meta or not getattr(parameter, "is_advanced", False))
        ]
        shown.sort(key=lambda parameter: not parameter.expose_value)  # --config, --help-all, --version and --help
        return [record for parameter in shown if (record := parameter.get_help_record(ctx))]


class Group(UserErrors, click.Group):
    """A group whose commands are `Command`s.

    Attributes:
        purpose, extra: what its commands do and the extra of the package that holds what they import, for the message
            where something of it is missing.
    """

    command_class = Command

    def __init__(self, *arguments: Any, purpose: str = "", extra: str = "", **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.purpose, self.extra = purpose, extra

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ImportError as error:
            if not self.extra or (error.name or "").partition(".")[0] in OWN_PACKAGES:
                raise
            missing = f"{self.purpose} needs {error.name or error}, which is not installed"
            message = FlowTurboError(missing, remedy=f"pip install 'flowturbo[{self.extra}]'")
            click.echo(f"error: {message}", err=True)
            ctx.exit(1)


def _make_help_all_option() -> click.Option:
    def show(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            ctx.meta[SHOW_ALL] = True
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    return click.Option(
        ["--help-all"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help="Show all options and exit.",
    )


def echo_json(data: Any) -> None:
    """Print JSON: under --json, nothing else goes to stdout."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def check_output_path(path: Path | None) -> None:
    """Check before an hour of work that its result can be written, and make its folder.

    Raises:
        OutputError: the path is a folder or an engine directory's manifest, or its folder cannot be written.
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
    """Return whether stderr is a terminal, where progress may be drawn."""
    return sys.stderr is not None and sys.stderr.isatty()


def _prepare_streams() -> None:
    """Open /dev/null where stderr is closed: else the next file that is opened gets its number, and its messages."""
    try:
        os.fstat(2)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != 2:
            os.dup2(null, 2)
            os.close(null)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # open until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="surrogateescape")


def _show_warning(message: Warning | str, *details: Any, **options: Any) -> None:
    click.echo(f"warning: {message}", err=True)
