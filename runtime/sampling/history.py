"""Assign slots of the history to slopes and draws, by who still reads them.

No output goes to a slot that is still read. So a plan that needs more than `HISTORY` slopes at once fails when it is
made, and does not give a wrong picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from runtime.sampling.plan import HISTORY, Evaluation, HistoryKey, NoiseDraw

SlotMap = dict[HistoryKey, int]


@dataclass(frozen=True)
class SlotAssignment:
    """The history during one evaluation.

    Attributes:
        slots: slot of every slope and draw that it reads.
        slope_slot: slot of its own slope.
        new_draws: draws that must be uploaded to their slots before it.
    """

    slots: Mapping[HistoryKey, int]
    slope_slot: int
    new_draws: tuple[NoiseDraw, ...] = ()


def find_free_slot(slot_maps: Iterable[Mapping[HistoryKey, int]], last_slot: int) -> int | None:
    """Return the next slot after `last_slot`, cyclically, that is free in all images; None if there is none."""
    used_slots = {slot for slot_map in slot_maps for slot in slot_map.values()}
    round_robin = ((last_slot + k) % HISTORY for k in range(1, HISTORY + 1))
    return next((slot for slot in round_robin if slot not in used_slots), None)


def assign_slots(plan: Sequence[Evaluation]) -> list[SlotAssignment]:
    """Assign slots to every evaluation of a plan.

    Raises:
        AssertionError: an evaluation reads a slope that does not exist yet, or too many slopes are needed at once.
    """
    last_use = {name: index for index, evaluation in enumerate(plan) for name in evaluation.list_dependencies()}
    slots: SlotMap = {}
    last_slot = -1
    assignments = []
    for index, evaluation in enumerate(plan):
        slots = {name: slot for name, slot in slots.items() if last_use[name] >= index}
        new_draws = tuple(
            name for name in evaluation.list_dependencies() if isinstance(name, NoiseDraw) and name not in slots
        )
        new_names: tuple[HistoryKey, ...] = (*new_draws, index)
        for name in new_names:
            slot = find_free_slot([slots], last_slot)
            if slot is None:
                raise AssertionError(f"evaluation {index} needs more than the {HISTORY} slots of the history")
            slots[name] = last_slot = slot
        if missing := evaluation.list_dependencies() - (slots.keys() - {index}):
            raise AssertionError(f"evaluation {index} reads {missing}, which is not in the history")
        assignments.append(SlotAssignment(dict(slots), slots[index], new_draws))
        if last_use.get(index, index) == index:
            del slots[index]
    return assignments
