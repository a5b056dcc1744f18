"""Training FlowTurbo's velocity refiner: distils one Euler step of its predictor (arXiv 2409.18128, algorithm 1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowturbo.checkpoints import save_network
from flowturbo.data import Pixels
from flowturbo.flow import refiner_loss
from flowturbo.latents import Latents
from flowturbo.models.sit import SiT
from flowturbo.training.draws import generator
from flowturbo.training.loop import Losses
from flowturbo.training.sit import FlowConfig, check_fits, draw, provenance

_STEP_STREAM = 1 << 61  # draws that a whole batch shares; above all positions


@dataclass(frozen=True)
class RefinerConfig:
    """Attributes:
    max_dt: step sizes are uniform in 0 … max_dt, one draw per batch.
    reference_behaviour: lets t + dt reach 1 + max_dt as the released code does, instead of t ≤ 1 − dt.
    """

    max_dt: float = 0.12
    label_dropout: float = 0.1
    reference_behaviour: bool = False


class RefinerTask:
    """Distillation of a predictor's slope one step ahead into a one-block network."""

    def __init__(
        self,
        refiner: SiT,
        teacher: SiT,
        latents: Latents,
        config: RefinerConfig,
        seed: int,
        compile: bool = False,
    ) -> None:
        check_fits(refiner, latents)
        self.refiner, self.latents, self.config, self.seed = refiner, latents, config, seed
        self.teacher = teacher.eval().requires_grad_(False)
        self.teach = torch.compile(self.teacher) if compile else self.teacher
        self._flow = FlowConfig(config.label_dropout)

    @property
    def network(self) -> nn.Module:
        return self.refiner

    def describe(self) -> dict[str, Any]:
        return {
            "task": "refiner",
            "model": self.refiner.config.to_json(),
            "teacher": self.teacher.config.to_json(),
            "refiner": asdict(self.config),
            "data": str(self.latents.folder),
            "provenance": provenance(self.latents),
            "latents": asdict(self.latents.manifest),
        }

    def losses(self, where: range) -> Losses:
        batch = draw(self.latents, self._flow, self.refiner.config.classes, self.seed, where)
        dt = float(generator(self.seed, _STEP_STREAM + where.start).random()) * self.config.max_dt
        t = batch.t if self.config.reference_behaviour else batch.t.clamp(max=1 - dt)
        loss = refiner_loss(
            self.refiner, self.teach, batch.data, batch.noise, t, dt, batch.labels, batch.dropped
        ).mean()
        return {"loss": loss}

    def pictures(self, ema: nn.Module) -> tuple[Pixels, int] | None:
        return None

    def finish(self, ema: nn.Module, out: Path) -> Path:
        """Saves the averaged weights as `out/final.safetensors`."""
        assert isinstance(ema, SiT)
        save_network(out / "final.safetensors", ema, role="refiner", extra=provenance(self.latents))
        return out / "final.safetensors"
