"""Class labels as users write them: an ImageNet index or a name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from runtime.system.errors import RequestError

_MAX_LISTED = 20
_CLASS_TABLE = Path(__file__).parent.parent / "flowturbo" / "imagenet_classes.tsv"


def resolve_class(text: str | int, classes: Mapping[int, str]) -> int:
    """Return the index of a class that the model knows.

    Args:
        text: an index; or a name or a unique part of one, in any case, with spaces, hyphens or underscores; or the
            WordNet id of an ImageNet class ("n02099601") where the model's class has ImageNet's index and name. With a
            slash at its end, as in "10/", it is a whole name and never an index. An `int` is always an index.

    Raises:
        RequestError: unknown or ambiguous; the message lists what the model knows.
    """
    query = str(text).strip().lower()
    named = [label for label, name in classes.items() if name.lower() == query.removesuffix("/")]
    if query.endswith("/") and len(named) == 1:
        return named[0]
    if re.fullmatch(r"-?[0-9]+", query):
        if isinstance(text, str) and named and int(query) in classes and int(query) not in named:
            raise RequestError(
                f"class {text!r} could be the index {query} ({classes[int(query)]}) "
                f"or the name {query} (index {named[0]})",
                allowed="a word that means one class",
                remedy=f"name it with a slash at its end: {query}/ or {classes[int(query)]}/",
            )
        if int(query) in classes:
            return int(query)
        if isinstance(text, str) and len(named) == 1:
            return named[0]
        raise RequestError(f"class {query}", allowed=_format_classes(classes))
    words = _normalise_name(query)
    names_by_label = {label: _normalise_name(name) for label, name in classes.items()}
    exact = [label for label, name in classes.items() if query in (name.lower(), *_split_synonyms(name.lower()))]
    exact = exact or [label for label, name in names_by_label.items() if words in (name, *_split_synonyms(name))]
    exact = exact if words else []
    matches = exact or [label for label, name in names_by_label.items() if words and words in name]
    if not matches and re.fullmatch(r"n[0-9]{8}", query):
        label, name = _read_wordnet_ids().get(query, (-1, ""))
        if label in classes and _normalise_name(name) in _split_synonyms(names_by_label[label]):
            return label
    if len(matches) == 1:
        return matches[0]
    if matches:
        candidates = ", ".join(f"{label} {classes[label]}" for label in matches[:_MAX_LISTED])
        raise RequestError(f"class {text!r} could be {candidates}", remedy="name it by its index")
    suggestions = difflib.get_close_matches(query, [name.lower() for name in classes.values()], n=1)
    raise RequestError(
        f"class {text!r}" + (f" (did you mean {suggestions[0]!r}?)" if suggestions else ""),
        allowed=_format_classes(classes),
    )


def _normalise_name(name: str) -> str:
    """Return a name in lower case, with single spaces for hyphens and underscores between its words."""
    return re.sub(r"(?<=[^\W_])[-_\s]+(?=[^\W_])", " ", name.lower())


def _split_synonyms(name: str) -> list[str]:
    return [part.strip() for part in name.split(",")]


@cache
def _read_wordnet_ids() -> dict[str, tuple[int, str]]:
    """Return index and name of ImageNet's classes by WordNet id; empty where the table is not installed."""
    try:
        lines = _CLASS_TABLE.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    rows = (line.split("\t") for line in lines[1:])
    return {wordnet_id: (int(index), name) for index, wordnet_id, name in rows}


def resolve_mixture(text: str | int, classes: Mapping[int, str]) -> tuple[tuple[int, float], ...]:
    """Parse the labels and weights of "207:0.6,250:0.4", or one class; weights are scaled to sum to 1.

    Raises:
        RequestError: an unknown class, a weight that is no positive number, or a class named twice.
    """
    if ":" not in str(text):
        return ((resolve_class(text, classes), 1.0),)
    weights: dict[int, float] = {}
    for part in str(text).split(","):
        name, _, weight = part.rpartition(":")
        if not name or not re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*", weight) or float(weight) <= 0:
            raise RequestError(f"mixture of classes {text!r}", allowed="CLASS:WEIGHT,CLASS:WEIGHT, weights above 0")
        label = resolve_class(name, classes)
        if label in weights:
            raise RequestError(f"mixture of classes {text!r} names {classes[label]} twice", allowed="each class once")
        weights[label] = float(weight)
    weight_sum = sum(weights.values())
    return tuple((label, weight / weight_sum) for label, weight in weights.items())


def _format_classes(classes: Mapping[int, str]) -> str:
    names = [f"{label} {name}" for label, name in sorted(classes.items())[:_MAX_LISTED]]
    num_hidden = len(classes) - len(names)
    return ", ".join(names) + (
        f" and {num_hidden} more (flowturbo-export inspect lists them)" if num_hidden > 0 else ""
    )
