"""Frozen dataclasses to JSON and back, strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.system.errors import RequestError
from runtime.system.json_codec import RecordError, from_json, read_versioned, to_json


@dataclass(frozen=True)
class Inner:
    name: str
    size: float = 1.0


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner
    many: tuple[Inner, ...] = ()
    by_label: Mapping[int, str] = field(default_factory=dict)
    maybe: str | None = None
    free: Any = None
    flag: bool = False


names = st.text(max_size=8)
inners = st.builds(Inner, names, st.floats(allow_nan=False, allow_infinity=False))


@given(
    st.builds(
        Outer, st.integers(), inners, st.lists(inners, max_size=3).map(tuple), st.dictionaries(st.integers(), names, max_size=3),
        st.none() | names, st.none() | st.lists(st.integers(), max_size=2), st.booleans(),
    )
)  # fmt: skip
def test_what_is_written_is_read(value: Outer) -> None:
    assert from_json(Outer, json.loads(json.dumps(to_json(value)))) == value


GOOD = {"count": 3, "inner": {"name": "a"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1, "age": 2}, "Outer has unknown keys: age, colour"),
        ({"inner": {"name": "a", "nme": "b"}}, "Outer.inner has unknown keys: nme"),
        ({"inner": {}}, "Outer.inner lacks name"),
        ({"inner": None}, "Outer.inner is not an object"),
        ({"inner": []}, "Outer.inner is not an object"),
        ({"count": "3"}, "Outer.count is '3', not int"),
        ({"count": True}, "Outer.count is True, not int"),
        ({"count": 3.5}, "Outer.count is 3.5, not int"),
        ({"count": None}, "Outer.count is None, not int"),
        ({"flag": 1}, "Outer.flag is 1, not bool"),
        ({"maybe": 3}, "Outer.maybe is 3, not str"),
        ({"many": {"name": "a"}}, "Outer.many"),
        ({"many": [{"name": "a"}, {"name": 1}]}, "Outer.many[1].name is 1, not str"),
        ({"by_label": {"x": "y"}}, "Outer.by_label has the key 'x', not int"),
        ({"by_label": {"1": 2}}, "Outer.by_label.1 is 2, not str"),
        ({"by_label": []}, "Outer.by_label"),
        ({"inner": {"name": "a", "size": "big"}}, "Outer.inner.size is 'big', not float"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as caught:
        from_json(Outer, GOOD | change)
    assert message in str(caught.value)


def test_missing_keys_are_named() -> None:
    with pytest.raises(RecordError, match="Outer lacks count, inner"):
        from_json(Outer, {})


@pytest.mark.parametrize("data", [None, 3, "text", [], [GOOD]])
def test_what_is_no_object(data: Any) -> None:
    with pytest.raises(RecordError, match="not an object"):
        from_json(Outer, data)


def test_whole_numbers_serve_as_floats() -> None:
    assert from_json(Inner, {"name": "a", "size": 2}) == Inner("a", 2.0)


@dataclass(frozen=True)
class Versioned:
    schema: int
    size: int


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no test file at"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "is damaged, or no test file"),
        ('{"schema": 2}', "is damaged, or no test file: test file lacks size"),
        ('{"schema": 3, "size": 1, "flowturbo": "9.9"}', r"has schema 3, written by a newer flowturbo \(9.9\)"),
    ],
)
def test_a_versioned_file_that_cannot_be_used_is_one_message(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        read_versioned(path, Versioned, 2, name="test file", remedy="flowturbo-x makes one", error_type=RequestError)
    assert "flowturbo-x makes one" in caught.value.remedy


def test_a_versioned_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema": 1, "size": 5}')
    options = {"name": "test file", "remedy": "", "error_type": RequestError}
    assert read_versioned(tmp_path / "a.json", Versioned, 2, **options) == Versioned(1, 5)  # type: ignore[arg-type]
