"""Convert frozen dataclasses to and from JSON, strictly, and read versioned JSON files.

An unknown or missing key, or a value of another type, is an error.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from runtime.system.errors import FlowTurboError
from runtime.system.files import read_json

T = TypeVar("T")
JsonObject = Mapping[str, Any]
"""A JSON object that is stored and passed on as it is."""


class RecordError(ValueError):
    """JSON that does not fit its dataclass; the message names the place."""


def to_json(value: Any) -> Any:
    """Convert a dataclass to plain JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], data: Any, where: str = "") -> T:
    """Convert JSON data to a dataclass.

    Raises:
        RecordError: naming the key that is unknown, missing or of another type.
    """
    value: T = _convert(kind, data, where or kind.__name__)
    return value


def read_versioned(
    path: Path, kind: type[T], schema: int, *, name: str, remedy: str, error_type: type[FlowTurboError]
) -> T:
    """Read a JSON file of dataclass `kind` whose layout has a number in its key `schema`.

    Args:
        schema: the newest layout that this version knows.
        name: what such a file is called in messages, for example "report of flowturbo-bench".
        remedy: the command that makes one.
        error_type: what is raised.

    Raises:
        FlowTurboError: of `error_type`: the file is missing, damaged, something else, or of a newer schema.
    """
    try:
        data = read_json(path)
    except FileNotFoundError as error:
        raise error_type(f"there is no {name} at {path}", remedy=f"check the path; {remedy}") from error
    except (OSError, ValueError) as error:
        raise error_type(f"{path} cannot be read: {error}", allowed=f"a {name}", remedy=remedy) from error
    return parse_versioned(data, kind, schema, where=str(path), name=name, remedy=remedy, error_type=error_type)


def parse_versioned(
    data: Any,
    kind: type[T],
    schema: int,
    *,
    where: str,
    name: str,
    remedy: str,
    error_type: type[FlowTurboError],
) -> T:
    """Return `kind` from JSON data with a key `schema`; see `read_versioned`. `where` names the data in messages."""
    written = data.get("schema") if isinstance(data, dict) else None
    if isinstance(written, int) and written > schema:
        raise error_type(
            f"{where} has schema {written}, written by a newer flowturbo ({data.get('flowturbo', 'unknown')})",
            allowed=f"schema up to {schema}",
            remedy=f"pip install --upgrade flowturbo, or make it again: {remedy}",
        )
    try:
        return from_json(kind, data, name)
    except (RecordError, TypeError) as error:
        raise error_type(f"{where} is damaged, or no {name}: {error}", remedy=remedy) from error


def _convert(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _convert_record(kind, data, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        variants = [a for a in arguments if a is not type(None)]
        return None if data is None and len(variants) < len(arguments) else _convert(variants[0], data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is not None and issubclass(origin, Mapping) and isinstance(data, dict):
        key_kind, item_kind = arguments
        return {
            _convert_key(key_kind, key, where): _convert(item_kind, item, f"{where}.{key}")
            for key, item in data.items()
        }
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        try:
            return float(data)
        except OverflowError as error:
            raise RecordError(f"{where} is too large") from error
    if isinstance(data, float) and not math.isfinite(data):
        raise RecordError(f"{where} is {data}, not finite")
    if not isinstance(kind, type) or type(data) is not kind:
        raise RecordError(f"{where} is {data!r}, not {getattr(kind, '__name__', kind)}")
    return data


def _convert_record(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise RecordError(f"{where} is not an object")
    hints = get_type_hints(kind)
    fields_by_name = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(data) - set(fields_by_name)):
        raise RecordError(f"{where} has unknown keys: {', '.join(unknown)}")
    required = {
        n
        for n, f in fields_by_name.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(data)):
        raise RecordError(f"{where} lacks {', '.join(missing)}")
    return kind(**{name: _convert(hints[name], item, f"{where}.{name}") for name, item in data.items()})


def _convert_key(kind: Any, key: str, where: str) -> Any:
    try:
        return kind(key)
    except ValueError as error:
        raise RecordError(f"{where} has the key {key!r}, not {kind.__name__}") from error
