"""Declare an option of a command once, as a field of a frozen dataclass.

`runtime.cli.dataclass_options` makes command line options of these fields. The dataclass is what travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, TypeVar

from runtime.system.errors import RequestError

T = TypeVar("T")
METADATA_KEY = "option"
REQUIRED: Any = MISSING
"""In place of a default: the option must be given."""


@dataclass(frozen=True)
class OptionSpec:
    """How a field looks on a command line.

    Attributes:
        flags: `--name`, or `--on/--off`; empty: the field's name with dashes.
        help: one sentence.
        choices: allowed words; None where the type says it (`Literal`).
        minimum, maximum: of a number, both included; `is_open` excludes the minimum.
        metavar: what stands for the value in --help.
        default_text: what --help says of the default where the value itself says nothing.
        parse: make the value of the text; called with the option's name and the text.
        type: a click type, where the annotation does not say what click should check.
        is_advanced: shown by --help-all only.
        is_argument: a word without a flag.
    """

    flags: tuple[str, ...] = ()
    help: str = ""
    choices: Sequence[str] | None = None
    minimum: float | None = None
    maximum: float | None = None
    is_open: bool = False
    metavar: str | None = None
    default_text: str = ""
    parse: Callable[[str, str], Any] | None = None
    type: Any = None
    is_advanced: bool = False
    is_argument: bool = False


def option(
    default: T,
    *flags: str,
    help: str,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    is_open: bool = False,
    metavar: str | None = None,
    default_text: str = "",
    parse: Callable[[str, str], Any] | None = None,
    type: Any = None,
    advanced: bool = False,
) -> T:
    """Return a field with a default, or `REQUIRED`; see `OptionSpec`. The annotation says what the option takes.

    `bool` is a flag, `tuple[X, ...]` an option that may be repeated, `Literal` a choice, and a dataclass the options
    of its own fields: of an optional one, None unless one of them is given.
    """
    return _declare(
        default,
        OptionSpec(flags, help, choices, minimum, maximum, is_open, metavar, default_text, parse, type, advanced),
    )


def argument(default: T, metavar: str | None = None) -> T:
    """Return a field for a word without a flag, or `tuple[X, ...]` for several; `REQUIRED` or a default."""
    return _declare(default, OptionSpec(metavar=metavar, is_argument=True))


def _declare(default: T, spec: OptionSpec) -> T:
    declared: T = field(default=default, kw_only=default is REQUIRED, metadata={METADATA_KEY: spec})
    return declared


def split_words(name: str, text: str) -> tuple[str, ...]:
    """Return the words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parse_numbers(name: str, text: str, count: int | None = None) -> list[float]:
    """Return numbers that are separated by commas.

    Raises:
        RequestError: something else, or not `count` of them.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or (count is not None and len(values) != count):
        raise RequestError(f"{name} {text!r}", allowed=f"{count or 'one or more'} numbers, separated by commas")
    return values
