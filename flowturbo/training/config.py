"""Options of a training loop, as saved in a run's config.json."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from runtime.errors import TrainingError


@dataclass(frozen=True)
class LoopConfig:
    """How long and how to train; what is trained is a task's business.

    Attributes:
        max_steps: optimiser steps in all, counted from the first start, not from a resume.
        batch_size: samples of one step.
        lr: peak learning rate, reached after `warmup` steps.
        schedule: of the learning rate after warm-up: it stays, or falls to 0 at the end like a cosine or a line.
        decay: under a constant schedule, the last steps over which it falls to 0 in a line. The length of such a run
            can be chosen late: resume with another `max_steps`.
        optimizer: "muon" gives the hidden matrices to Muon (orthogonalised momentum) and the rest to AdamW.
        muon_lr: learning rate of Muon's matrices, before its own scaling to AdamW's update size.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights.
        precision: "bf16" runs the networks under autocast.
        checkpoint_every, keep: steps between checkpoints, and how many of the last are kept.
        sample_every: steps between sample grids; 0 for none.
    """

    max_steps: int
    batch_size: int
    lr: float = 1e-4
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = 0
    decay: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.9999
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = 1000
    keep: int = 3
    sample_every: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise TrainingError(
                    f"{_option(name)} is {getattr(self, name)}", allowed="1 or more", remedy=f"e.g. {_option(name)} 100"
                )
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise TrainingError(f"--lr is {self.lr}", allowed="a number above 0", remedy="e.g. --lr 1e-4")
        if not 0 <= self.ema < 1:
            raise TrainingError(f"--ema is {self.ema}", allowed="at least 0 and below 1", remedy="e.g. --ema 0.9999")
        if self.seed < 0:
            raise TrainingError(f"--seed is {self.seed}", allowed="0 or more", remedy="e.g. --seed 0")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lr_scale(self, step: int) -> float:
        """Share of the peak learning rate at `step`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return min(1.0, (self.max_steps - step) / self.decay) if self.decay else 1.0
        done = (step - self.warmup) / max(1, self.max_steps - self.warmup)
        return 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
