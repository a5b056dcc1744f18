"""How a calibration guides its samplers: as asked for, and with the defaults of the model filled in."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.directory.records import Defaults
from runtime.request import RequestOptions


@dataclass(frozen=True)
class Guidance:
    """How a calibration guides, as asked for: what the samplers will be deployed with.

    Attributes:
        scale: guidance scale; the model's default if None.
        channels: the first so many latent channels are guided; the model's default if None.
        interval: flow times in which it acts.
    """

    scale: float | None = None
    channels: int | None = None
    interval: tuple[float, float] = (0.0, 1.0)

    @property
    def options(self) -> RequestOptions:
        """Keyword arguments of `Pipeline.request`."""
        options: RequestOptions = {"guidance_interval": self.interval}
        if self.scale is not None:
            options["guidance"] = self.scale
        if self.channels is not None:
            options["guidance_channels"] = self.channels
        return options

    def resolve(self, defaults: Defaults) -> ResolvedGuidance:
        """Fill in the defaults of a model."""
        scale = defaults.guidance if self.scale is None else self.scale
        channels = defaults.guidance_channels if self.channels is None else self.channels
        return ResolvedGuidance(scale, channels, self.interval)


@dataclass(frozen=True)
class ResolvedGuidance:
    """A `Guidance` with the defaults of a model filled in; in JSON, what a calibrated sampler says of its guidance."""

    scale: float
    channels: int
    interval: tuple[float, float]
