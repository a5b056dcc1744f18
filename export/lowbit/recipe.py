"""What a build does to single layers: clips and equalisation of a calibration, parts that a choice keeps wide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from export.lowbit.choice import DEFAULT_METHOD, Choice, read_choice
from export.lowbit.ranges import Ranges, read_ranges
from export.lowbit.rounding import REVISION
from runtime.system.errors import RequestError

CHOSEN = ("int8", "fp16")
"""Precisions that a choice can be for."""


@dataclass(frozen=True)
class Recipe:
    """Attributes: the calibration and the choice of a build, where it has them."""

    ranges: Ranges | None = None
    choice: Choice | None = None

    @property
    def wide(self) -> tuple[str, ...]:
        """Parts that stay in the wider type."""
        return () if self.choice is None else self.choice.wide

    @property
    def equalised(self) -> bool:
        return self.ranges is not None and (self.choice is None or self.choice.equalised)

    def clips(self, role: str) -> dict[str, float]:
        """Clip of every layer of a network that is quantised, by layer with its network in front."""
        assert self.ranges is not None
        method = DEFAULT_METHOD if self.choice is None else self.choice.method
        return {
            layer: one.clip(method, equalised=self.equalised)
            for layer, one in self.ranges.layers.items()
            if layer.startswith(f"{role}/") and layer not in self.wide
        }

    def wide_of(self, role: str) -> tuple[str, ...]:
        """Wide parts of one network, without it in front."""
        return tuple(part.partition("/")[2] for part in self.wide if part.startswith(f"{role}/"))

    @property
    def inputs(self) -> dict[str, str]:
        """What the build's key depends on."""
        named = {"calibration": self.ranges, "choice": self.choice}
        found = {name: what.sha256 for name, what in named.items() if what is not None}
        return found | ({} if self.ranges is None else {"rounding": REVISION})


PLAIN = Recipe()
"""Nothing is done to any layer."""


def read_recipe(
    calibration: Path | None, choice: Path | None, precisions: Mapping[str, str], sources: Mapping[str, str]
) -> Recipe:
    """The recipe of a build, its files read and checked.

    Args:
        precisions: target → precision.
        sources: role → sha256 of the checkpoints.

    Raises:
        RequestError: a file is missing, damaged, or made for something else; or int8 has no calibration.
    """
    found = set(precisions.values())
    if "int8" in found and calibration is None:
        raise RequestError(
            "--precision int8 without a calibration",
            remedy="measure one: flowturbo-calibrate int8 --out ranges.npz, then --calibration ranges.npz",
        )
    if calibration is not None and "int8" not in found:
        raise RequestError(
            f"--calibration with precision {', '.join(sorted(found))}",
            allowed="--precision int8, which has clips",
            remedy="leave it out, or add --precision int8",
        )
    if choice is not None and not found & set(CHOSEN):
        raise RequestError(
            f"--choice with precision {', '.join(sorted(found))}",
            allowed=f"--precision {' or '.join(CHOSEN)}",
            remedy="leave it out, or name the precision that it was searched for",
        )
    ranges = None if calibration is None else read_ranges(calibration)
    if ranges is not None:
        ranges.check_model(sources, str(calibration))
    chosen = None if choice is None else read_choice(choice)
    if chosen is not None:
        chosen.check(" and ".join(sorted(found & set(CHOSEN))), sources, ranges, str(choice))
    return Recipe(ranges, chosen)
