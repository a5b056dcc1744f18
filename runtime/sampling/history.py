"""Where slopes and draws lie in the history: slots are given out by who still needs what.

An output never lands in a slot that is still needed, and nothing is read after it was given away; so a plan that
needs more than `HISTORY` slopes at once is found out when it is made, not by a wrong picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from runtime.sampling.plan import HISTORY, Draw, Evaluation, Name

Held = dict[Name, int]


@dataclass(frozen=True)
class Placed:
    """The history during one evaluation.

    Attributes:
        held: slot of everything that it reads.
        slope: slot that its own slope goes to.
        drawn: draws that have to be put into their slots before it.
    """

    held: Mapping[Name, int]
    slope: int
    drawn: tuple[Draw, ...] = ()


def free_slot(held: Iterable[Mapping[Name, int]], last: int) -> int | None:
    """The next slot after `last`, going round, in which no image holds anything; None if there is none."""
    taken = {slot for names in held for slot in names.values()}
    round_robin = ((last + k) % HISTORY for k in range(1, HISTORY + 1))
    return next((slot for slot in round_robin if slot not in taken), None)


def place(plan: Sequence[Evaluation]) -> list[Placed]:
    """Slots for every evaluation of a plan.

    Raises:
        AssertionError: an evaluation reads what has not been made, or more is needed at once than the history holds.
    """
    last_use = {name: index for index, evaluation in enumerate(plan) for name in evaluation.reads()}
    held: Held = {}
    last = -1
    placed = []
    for index, evaluation in enumerate(plan):
        held = {name: slot for name, slot in held.items() if last_use[name] >= index}
        drawn = tuple(name for name in evaluation.reads() if isinstance(name, Draw) and name not in held)
        wanted: tuple[Name, ...] = (*drawn, index)
        for name in wanted:
            slot = free_slot([held], last)
            if slot is None:
                raise AssertionError(f"evaluation {index} needs more than the {HISTORY} slots of the history")
            held[name] = last = slot
        if missing := evaluation.reads() - (held.keys() - {index}):
            raise AssertionError(f"evaluation {index} reads {missing}, which is not in the history")
        placed.append(Placed(dict(held), held[index], drawn))
        if last_use.get(index, index) == index:
            del held[index]
    return placed
