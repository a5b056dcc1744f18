"""Make the options of a command from frozen dataclasses, and give the command the dataclasses.

    @click.command(cls=Command)
    @options(PictureOptions, SamplerChoice)
    def main(pictures: PictureOptions, sampler: SamplerChoice) -> None: ...

Two dataclasses of a command may declare the same option: it is shown once, and both receive its value.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, overload

import click
from click.core import ParameterSource

from runtime.system.option_fields import METADATA_KEY, REQUIRED, OptionSpec

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class OptionField:
    """A field that is an option, or (`is_nested`) that has options as its own fields."""

    field: dataclasses.Field[Any]
    spec: OptionSpec
    type: Any
    is_nested: bool
    is_optional: bool


@dataclasses.dataclass(frozen=True)
class OptionDefaults(Generic[T]):
    """A dataclass of options, with the defaults that suit one command.

    Attributes:
        omit: fields that the command has no option for.
        only: the fields that it has options for; all where this is empty.
    """

    values: T
    omit: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.only:
            names = [field.name for field in dataclasses.fields(self.values)]  # type: ignore[arg-type]
            object.__setattr__(self, "omit", tuple(name for name in names if name not in self.only))


class DeclaredOption(click.Option):
    """An option that --help shows, or (`is_advanced`) that only --help-all shows."""

    def __init__(self, *arguments: Any, is_advanced: bool = False, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.is_advanced = is_advanced


OptionSource = type[T] | OptionDefaults[T]
Callback = Callable[..., None]


@overload
def options(a: OptionSource[A], /) -> Callable[[Callable[[A], None]], Callback]: ...
@overload
def options(a: OptionSource[A], b: OptionSource[B], /) -> Callable[[Callable[[A, B], None]], Callback]: ...
@overload
def options(
    a: OptionSource[A], b: OptionSource[B], c: OptionSource[C], /
) -> Callable[[Callable[[A, B, C], None]], Callback]: ...
@overload
def options(
    a: OptionSource[A], b: OptionSource[B], c: OptionSource[C], d: OptionSource[D], /
) -> Callable[[Callable[[A, B, C, D], None]], Callback]: ...
def options(*groups: Any) -> Any:
    """Give a command the options of some dataclasses; it is called with one instance of each."""

    def decorate(function: Callback) -> Callback:
        @functools.wraps(function)
        def call(**values: Any) -> None:
            function(*(_build(*_split_group(group), values) for group in groups))

        parameters: dict[str | None, click.Parameter] = {}
        for group in groups:
            for parameter in _make_parameters(*_split_group(group)):
                parameters.setdefault(parameter.name, parameter)
        others = getattr(function, "__click_params__", [])  # of decorators below this one; click reads them backwards
        call.__click_params__ = [*others, *reversed(parameters.values())]  # type: ignore[attr-defined]
        return call

    return decorate


def list_given_options() -> set[str]:
    """Return the names (`lr_schedule`) of the options that the user gave to the running command, or in --config."""
    context = click.get_current_context()
    return {
        name for name in context.params if context.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)
    }


def _split_group(group: Any) -> tuple[type[Any], Any, tuple[str, ...]]:
    """A dataclass, the instance that has its defaults if there is one, and the fields without an option."""
    return (type(group.values), group.values, group.omit) if isinstance(group, OptionDefaults) else (group, None, ())


def _list_declared(kind: type[Any], omit: tuple[str, ...] = ()) -> Iterator[tuple[str, OptionField]]:
    """The fields that are options: for each its name on the command line, its type and what it declares."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if METADATA_KEY in field.metadata and field.name not in omit:
            spec: OptionSpec = field.metadata[METADATA_KEY]
            name = spec.flags[0].partition("/")[0].lstrip("-").replace("-", "_") if spec.flags else field.name
            inner = _strip_optional(hints[field.name])
            is_nested = isinstance(inner, type) and dataclasses.is_dataclass(inner) and spec.parse is None
            yield name, OptionField(field, spec, inner, is_nested, is_optional=inner is not hints[field.name])


def _strip_optional(hint: Any) -> Any:
    """X of `X | None`; str of a union of several types, which are told apart later."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    variants = [variant for variant in get_args(hint) if variant is not type(None)]
    return variants[0] if len(variants) == 1 else str


def _make_parameters(kind: type[Any], defaults: Any, omit: tuple[str, ...] = ()) -> Iterator[click.Parameter]:
    for name, declared in _list_declared(kind, omit):
        default = declared.field.default if defaults is None else getattr(defaults, declared.field.name)
        if declared.is_nested:
            yield from _make_parameters(declared.type, default if isinstance(default, declared.type) else None)
        else:
            yield _make_parameter(name, declared.type, declared.spec, default)


def _make_parameter(name: str, hint: Any, spec: OptionSpec, default: Any) -> click.Parameter:
    is_repeated = spec.parse is None and spec.type is None and get_origin(hint) is tuple
    kind = click.STRING if spec.parse is not None else _make_type(get_args(hint)[0] if is_repeated else hint, spec)
    if spec.is_argument:
        return click.Argument(
            [name], type=kind, nargs=-1 if is_repeated else 1, required=default is REQUIRED, metavar=spec.metavar
        )
    is_required = default is REQUIRED
    if is_required or (spec.parse is not None and not isinstance(default, str)):
        default = None  # there is none, or it is no text and the dataclass has it
    flags = spec.flags or ("--" + name.replace("_", "-"),)
    is_flag = hint is bool
    has_off = is_flag and any("/" in flag for flag in flags)
    default_text = f"  [default: {spec.default_text}]" if spec.default_text else ""
    return DeclaredOption(
        [*flags, name],
        type=None if is_flag else kind,
        is_flag=is_flag or None,  # click reads False as: may be given without its value, so --class=-3 was no value
        multiple=is_repeated,
        required=is_required,
        **({} if is_required else {"default": None if is_repeated and not default else default}),
        show_default=not spec.default_text
        and (has_off or not (default is None or default is False or default in ((), ""))),
        help=spec.help + default_text,
        metavar=spec.metavar,
        is_advanced=spec.is_advanced,
    )


def _make_type(hint: Any, spec: OptionSpec) -> Any:
    """What click checks of one value."""
    if spec.type is not None:
        return spec.type
    hint = _strip_optional(hint)
    if get_origin(hint) is Literal:
        return click.Choice([str(word) for word in get_args(hint)])
    if spec.choices is not None:
        return click.Choice(list(spec.choices))
    if hint is Path:
        return click.Path(path_type=Path)
    if hint in (int, float) and (spec.minimum, spec.maximum) != (None, None):
        range_type = click.IntRange if hint is int else click.FloatRange
        return range_type(spec.minimum, spec.maximum, min_open=spec.is_open)  # type: ignore[arg-type]
    return {int: click.INT, float: click.FLOAT, bool: click.BOOL}.get(hint, click.STRING)


def _build(kind: type[T], defaults: T | None, omit: tuple[str, ...], values: dict[str, Any]) -> T:
    """The dataclass of what click has read.

    Raises:
        FlowTurboError: a text cannot be parsed, or the dataclass refuses its values.
    """
    fields: dict[str, Any] = {}
    for name, declared in _list_declared(kind, omit):
        if declared.is_nested:
            names = {inner_name for inner_name, _ in _list_declared(declared.type)}
            if not declared.is_optional or names & list_given_options():
                inner_defaults = getattr(kind if defaults is None else defaults, declared.field.name, None)
                fields[declared.field.name] = _build(declared.type, inner_defaults, (), values)
            continue
        value = values[name]
        if declared.spec.parse is not None and isinstance(value, str):
            value = declared.spec.parse("--" + name.replace("_", "-"), value)
        if value is not None:
            fields[declared.field.name] = value
    return kind(**fields) if defaults is None else dataclasses.replace(defaults, **fields)  # type: ignore[type-var]
