"""Read what an ONNX file says of its constants, without the onnx package: their types, and the files they lie in.

The wire format of protobuf is keys (field number and kind) and values. Only messages that can hold a constant are
entered; the bytes of constants are skipped, so that a file of two gigabytes is read in milliseconds.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from runtime.directory.records import GraphRecord, format_rebuild_hint
from runtime.system.errors import EngineError
from runtime.system.files import check_regular

Message = Literal["model", "function", "graph", "node", "attribute", "sparse", "tensor", "entry"]
_CHILDREN: dict[tuple[Message, int], Message] = {
    ("model", 7): "graph",
    ("model", 25): "function",
    ("function", 7): "node",
    ("graph", 1): "node",
    ("graph", 5): "tensor",
    ("graph", 15): "sparse",
    ("node", 5): "attribute",
    ("attribute", 5): "tensor",
    ("attribute", 6): "graph",
    ("attribute", 10): "tensor",
    ("attribute", 11): "graph",
    ("attribute", 22): "sparse",
    ("attribute", 23): "sparse",
    ("sparse", 1): "tensor",
    ("sparse", 2): "tensor",
    ("tensor", 13): "entry",
}
"""Message and field number → the message in it (onnx.proto)."""
_MAX_DEPTH = 32
_TYPE_NAMES = {
    1: "fp32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "fp16", 11: "fp64", 16: "bf16",
    21: "uint4", 22: "int4",
}  # fmt: skip


@dataclass
class OnnxConstants:
    """The constants of a file.

    Attributes:
        locations: names of the files in which constants lie, as the file says them.
        elements: number of values by type; types without a name here are called by their number.
    """

    locations: set[str] = field(default_factory=set)
    elements: Counter[str] = field(default_factory=Counter)


def read_onnx_constants(path: Path) -> OnnxConstants:
    """Read the constants of an ONNX file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no ONNX file.
    """
    check_regular(path)
    constants = OnnxConstants()
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _read_message(data, 0, len(data), "model", constants, 0)
    return constants


def check_onnx_file(folder: Path, record: GraphRecord, *, check_types: bool = True) -> None:
    """Check that an ONNX file reads no weights but those that its record names, and has the types that it claims.

    Args:
        check_types: compare the precision as well, of the networks that are evaluated: a decoder in 16 bit may keep
            all of its constants in float32.

    Raises:
        EngineError: it does not, or it is no ONNX file.
    """
    path = folder / record.path
    try:
        constants = read_onnx_constants(path)
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read: {error}", remedy=format_rebuild_hint(folder)) from error
    listed = set() if record.data is None else {Path(record.data).name}
    if unlisted := sorted(constants.locations - listed):
        raise EngineError(
            f"{path} reads weights from {unlisted[0]!r}, for which the manifest has no hash",
            allowed=f"the file itself{f' and {next(iter(listed))}' if listed else ''}",
            remedy=format_rebuild_hint(folder),
        )
    if check_types and record.graph in ("predictor", "refiner"):
        precision, present = record.computes or record.precision, {t for t, n in constants.elements.items() if n}
        small, half = present & {"int8", "uint8", "int4", "uint4"}, present & {"fp16", "bf16"}
        if precision.startswith("int"):
            is_right = bool(small)
        else:
            is_right = not small and (not half if precision == "fp32" else precision in half)
        if not is_right:
            raise EngineError(
                f"{path} is not {precision}, as the manifest says: it holds {', '.join(sorted(present))}",
                remedy=format_rebuild_hint(folder),
            )


def _read_message(
    data: mmap.mmap, start: int, end: int, message: Message, constants: OnnxConstants, depth: int
) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("its graphs are nested too deep")
    texts: dict[int, str] = {}
    type_number, count = 0, 1
    for number, value, span in _iterate_fields(data, start, end):
        child = _CHILDREN.get((message, number))
        if child is not None and span is not None:
            _read_message(data, *span, child, constants, depth + 1)
        elif message == "entry" and span is not None:
            texts[number] = data[span[0] : span[1]].decode(errors="replace")
        elif message == "tensor" and number == 1:  # dims, packed or one by one
            for size in [value] if span is None else _iterate_varints(data, *span):
                count *= size
        elif message == "tensor" and number == 2:
            type_number = value
    if message == "entry" and texts.get(1) == "location":
        constants.locations.add(texts.get(2, ""))
    if message == "tensor":
        constants.elements[_TYPE_NAMES.get(type_number, str(type_number))] += count


def _iterate_fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, tuple[int, int] | None]]:
    """Yield (field number, value, None), or (field number, 0, (start, end)) where the value is bytes."""
    position = start
    while position < end:
        key, position = _read_varint(data, position, end)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, position = _read_varint(data, position, end)
            yield number, value, None
            continue
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, position = _read_varint(data, position, end)
        if kind not in (1, 2, 5) or size > end - position:
            raise ValueError("it is no ONNX file, or cut short")
        if kind == 2:
            yield number, 0, (position, position + size)
        position += size


def _iterate_varints(data: mmap.mmap, start: int, end: int) -> Iterator[int]:
    position = start
    while position < end:
        value, position = _read_varint(data, position, end)
        yield value


def _read_varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise ValueError("it is no ONNX file, or cut short")
