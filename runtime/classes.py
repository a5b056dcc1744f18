"""Class labels as users write them: an ImageNet index or a name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from runtime.system.errors import RequestError

_LISTED = 20


def resolve_class(text: str | int, classes: Mapping[int, str]) -> int:
    """Index of a class the model knows.

    Args:
        text: an index, or a name in any case; a unique part of a name will do.

    Raises:
        RequestError: unknown or ambiguous; the message lists what the model knows.
    """
    wanted = str(text).strip().lower()
    if re.fullmatch(r"-?[0-9]+", wanted):
        if int(wanted) in classes:
            return int(wanted)
        raise RequestError(f"class {wanted}", allowed=_known(classes))
    exact = [label for label, name in classes.items() if wanted in _aliases(name)]
    found = exact or [label for label, name in classes.items() if wanted and wanted in name.lower()]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(f"{label} {classes[label]}" for label in found[:_LISTED])
        raise RequestError(f"class {text!r} could be {several}", remedy="name it by its index")
    near = difflib.get_close_matches(wanted, [name.lower() for name in classes.values()], n=1)
    raise RequestError(f"class {text!r}" + (f" (did you mean {near[0]!r}?)" if near else ""), allowed=_known(classes))


def resolve_mixture(text: str | int, classes: Mapping[int, str]) -> tuple[tuple[int, float], ...]:
    """Labels and weights of "207:0.6,250:0.4", or of one class; weights are scaled to sum to 1.

    Raises:
        RequestError: an unknown class, a weight that is no positive number, or a class named twice.
    """
    if ":" not in str(text):
        return ((resolve_class(text, classes), 1.0),)
    weighted: dict[int, float] = {}
    for part in str(text).split(","):
        name, _, weight = part.rpartition(":")
        if not name or not re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*", weight) or float(weight) <= 0:
            raise RequestError(f"mixture of classes {text!r}", allowed="CLASS:WEIGHT,CLASS:WEIGHT, weights above 0")
        label = resolve_class(name, classes)
        if label in weighted:
            raise RequestError(f"mixture of classes {text!r} names {classes[label]} twice", allowed="each class once")
        weighted[label] = float(weight)
    total = sum(weighted.values())
    return tuple((label, weight / total) for label, weight in weighted.items())


def _aliases(name: str) -> list[str]:
    return [name.lower(), *(part.strip().lower() for part in name.split(","))]


def _known(classes: Mapping[int, str]) -> str:
    listed = [f"{label} {name}" for label, name in sorted(classes.items())[:_LISTED]]
    more = len(classes) - len(listed)
    return ", ".join(listed) + (f" and {more} more (flowturbo-export inspect lists them)" if more > 0 else "")
