"""What the calibration commands share: the model, how it is guided, and the command for the record."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runtime.system.option_fields import option, parse_numbers

if TYPE_CHECKING:
    from calibration.guidance_choice import Guidance
    from calibration.model import ModelSpec


def parse_flow_times(name: str, text: str) -> tuple[float, float]:
    """Return the two flow times of "0.3,1"."""
    start, end = parse_numbers(name, text, 2)
    return start, end


@dataclass(frozen=True)
class CalibrationGuidance:
    """How the calibrated sampler will be guided."""

    guidance: float | None = option(None, help="Guidance scale.", default_text="the directory's")
    guidance_channels: int | None = option(None, help="Latent channels that are guided.", advanced=True)
    guidance_interval: tuple[float, float] = option(
        (0.0, 1.0),
        help="Flow times A,B between which guidance acts.",
        default_text="0,1",
        parse=parse_flow_times,
        advanced=True,
    )

    def make_guidance(self) -> Guidance:
        """Return the guidance of the calibration."""
        from calibration.guidance_choice import Guidance

        return Guidance(self.guidance, self.guidance_channels, self.guidance_interval)


@dataclass(frozen=True)
class ModelOptions:
    """Which checkpoints are calibrated."""

    predictor: Path | None = option(None, help="Checkpoint of the SiT.", default_text="the demo's")
    refiner: Path | None = option(None, help="Checkpoint of its refiner.")
    heads: int | None = option(None, help="Attention heads, for a width that no released model has.", advanced=True)
    time_direction: Literal["noise-to-data", "data-to-noise"] | None = option(
        None, help="data-to-noise for REPA checkpoints.", advanced=True
    )
    resolution: int | None = option(
        None, help="Pixels a side, where the checkpoint's own is not wanted.", advanced=True
    )

    def make_spec(self, guidance: CalibrationGuidance) -> ModelSpec:
        """Return the model and its guidance."""
        from calibration.model import ModelSpec

        return ModelSpec(
            predictor=self.predictor,
            refiner=self.refiner,
            heads=self.heads,
            resolution=self.resolution,
            guidance=guidance.make_guidance(),
            time_direction=self.time_direction,
        )


def format_command() -> str:
    """What the user typed, for the record."""
    return " ".join(["flowturbo-calibrate", *sys.argv[1:]])
