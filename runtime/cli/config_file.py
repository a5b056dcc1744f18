"""`--config FILE`: options of a command from a TOML or JSON file, as defaults of the command line."""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Any

import click

from runtime.system.errors import RequestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def make_config_option() -> click.Option:
    """Return the option --config, which sets the defaults of the command that it belongs to."""

    def load(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
        if path is not None and not ctx.resilient_parsing:
            try:
                ctx.default_map = read_config(path, ctx.command.params)
            except RequestError as error:
                raise click.UsageError(str(error), ctx) from error

    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=load,
        metavar="FILE",
        help="Read options from this TOML or JSON file: num = 4. The command line wins.",
    )


def read_config(path: Path, parameters: list[click.Parameter]) -> dict[str, Any]:
    """Return the values of a file by option name, as text that click converts like words of the command line.

    Raises:
        RequestError: the file cannot be read, a key is no option of the command, or a value is a table.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise RequestError(
            f"--config {path} cannot be read: {error}", allowed="a TOML file, or a JSON file that ends in .json"
        ) from error
    if not isinstance(table, dict):
        raise RequestError(f"--config {path} holds a list or a single value", allowed="options by name")
    parameters_by_name = {str(parameter.name): parameter for parameter in parameters if parameter.expose_value}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in parameters_by_name:
            allowed = [option.replace("_", "-") for option in parameters_by_name]
            nearest = difflib.get_close_matches(key.replace("_", "-"), allowed, n=1)
            raise RequestError(
                f"option {key!r} in {path}",
                allowed=", ".join(allowed),
                remedy=f"write {nearest[0]}" if nearest else "leave it out",
            )
        parameter, items = parameters_by_name[name], value if isinstance(value, list) else [value]
        if any(isinstance(item, list | dict) for item in items):
            raise RequestError(
                f"option {key!r} in {path} is a table", allowed="a text, a number, true, false, or a list"
            )
        if isinstance(parameter, click.Option) and parameter.is_flag:
            values[name] = value
        elif value is not None:
            words = [str(item) for item in items]
            values[name] = words if parameter.multiple or parameter.nargs != 1 else ",".join(words)
    return values
