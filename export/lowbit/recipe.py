"""How a build treats single layers: clips and equalisation of a calibration, parts that a choice keeps wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.lowbit.choice import DEFAULT_CLIP_METHOD, PrecisionChoice, read_choice
from export.lowbit.ranges import Ranges, read_ranges
from export.lowbit.rounding import ROUNDING_REVISION
from runtime.system.errors import RequestError

CHOICE_PRECISIONS = ("int8", "fp16")
"""Precisions that a choice can be for."""


@dataclass(frozen=True)
class Recipe:
    """The calibration and the choice of a build, where it has them."""

    ranges: Ranges | None = None
    choice: PrecisionChoice | None = None

    @property
    def wide(self) -> tuple[str, ...]:
        """Parts that stay in the wider type."""
        return () if self.choice is None else self.choice.wide

    @property
    def is_equalised(self) -> bool:
        return self.ranges is not None and (self.choice is None or self.choice.equalised)

    def select_clips(self, role: str, layers: Sequence[str] = ()) -> dict[str, float]:
        """Return the clip of every quantised layer of a network, by layer with its network in front.

        Raises:
            RequestError: there is no calibration, or it lacks some of `layers`.
        """
        if self.ranges is None:
            raise RequestError("int8 without a calibration", remedy="measure one: flowturbo-calibrate int8")
        self.ranges.check_layers(layers)
        method = DEFAULT_CLIP_METHOD if self.choice is None else self.choice.method
        return {
            layer: layer_ranges.select_clip(method, equalised=self.is_equalised)
            for layer, layer_ranges in self.ranges.layers.items()
            if layer.startswith(f"{role}/") and layer not in self.wide
        }

    def list_wide_parts(self, role: str) -> tuple[str, ...]:
        """Return the wide parts of one network, without it in front."""
        return tuple(part.partition("/")[2] for part in self.wide if part.startswith(f"{role}/"))

    @property
    def inputs(self) -> dict[str, str]:
        """What the build's key depends on, by name."""
        files = {"calibration": self.ranges, "choice": self.choice}
        hashes = {name: file.sha256 for name, file in files.items() if file is not None}
        return hashes | ({} if self.ranges is None else {"rounding": ROUNDING_REVISION})


EMPTY_RECIPE = Recipe()
"""Nothing is done to any layer."""


def read_recipe(
    calibration: Path | None, choice: Path | None, precisions: Mapping[str, str], sources: Mapping[str, str]
) -> Recipe:
    """Read and check the files of a build's recipe.

    Args:
        precisions: target → precision.
        sources: role → sha256 of the checkpoints.

    Raises:
        RequestError: a file is missing, damaged, or made for something else; or int8 has no calibration.
    """
    built_precisions = set(precisions.values())
    if "int8" in built_precisions and calibration is None:
        raise RequestError(
            "--precision int8 without a calibration",
            remedy="measure one: flowturbo-calibrate int8 --out ranges.npz, then --calibration ranges.npz",
        )
    if calibration is not None and "int8" not in built_precisions:
        raise RequestError(
            f"--calibration with precision {', '.join(sorted(built_precisions))}",
            allowed="--precision int8, which has clips",
            remedy="leave it out, or add --precision int8",
        )
    if choice is not None and not built_precisions & set(CHOICE_PRECISIONS):
        raise RequestError(
            f"--choice with precision {', '.join(sorted(built_precisions))}",
            allowed=f"--precision {' or '.join(CHOICE_PRECISIONS)}",
            remedy="leave it out, or name the precision that it was searched for",
        )
    ranges = None if calibration is None else read_ranges(calibration)
    if ranges is not None:
        ranges.check_model(sources, str(calibration))
    precision_choice = None if choice is None else read_choice(choice)
    if precision_choice is not None:
        precision_choice.check(
            " and ".join(sorted(built_precisions & set(CHOICE_PRECISIONS))), sources, ranges, str(choice)
        )
    return Recipe(ranges, precision_choice)
