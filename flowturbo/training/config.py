"""Options of a training loop, as saved in a run's config.json."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from runtime.request import MAX_SEED
from runtime.system.errors import TrainingError


@dataclass(frozen=True)
class LoopConfig:
    """How long and how to train; what is trained is a task's business.

    Attributes:
        max_steps: optimiser steps in all, counted from the first start, not from a resume.
        batch_size: samples of one forward pass in one process.
        accumulate: forward passes of a process in one step, their gradients averaged. A step has
            batch_size · accumulate · processes samples, and how they are divided does not change what is computed.
        lr: peak learning rate, reached after `warmup` steps.
        schedule: of the learning rate after warm-up: it stays, or falls to 0 at the end like a cosine or a line.
        decay: under a constant schedule, the last steps over which it falls to 0 in a line. The length of such a run
            can be chosen late: resume with another `max_steps`.
        optimizer: "muon" gives the hidden matrices to Muon (orthogonalised momentum) and the rest to AdamW.
        beta2: AdamW's decay of squared gradients (the released code has 0.999; short runs want less).
        muon_lr: learning rate of Muon's matrices, before its own scaling to AdamW's update size.
        clip: largest norm of the gradient; 0 for any.
        explode: a loss above this many times the running median stops the run; 0 for never (`watch.py`).
        ema: decay of the averaged weights.
        precision: "bf16" runs the networks under autocast; weights, optimiser and losses stay float32.
        device: "auto" is the GPU where there is one.
        checkpoint_every, keep: steps between checkpoints, and how many of the last are kept.
        sample_every: steps between sample grids; 0 for none.
    """

    max_steps: int
    batch_size: int
    accumulate: int = 1
    lr: float = 1e-4
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = 0
    decay: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    beta2: float = 0.99
    muon_lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    explode: float = 10.0
    ema: float = 0.9999
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = 1000
    keep: int = 3
    sample_every: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulate", "checkpoint_every", "keep"):
            self._check(name, getattr(self, name) >= 1, "1 or more", "100")
        for name in ("warmup", "decay", "sample_every"):
            self._check(name, getattr(self, name) >= 0, "0 or more", "0")
        self._check("seed", 0 <= self.seed < MAX_SEED, "0 to 2^63 − 1", "0")
        for name in ("lr", "muon_lr"):
            self._check(name, 0 < getattr(self, name) < math.inf, "a number above 0", "1e-4")
        for name in ("weight_decay", "clip", "explode"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0, or a number above it", "1")
        self._check("beta2", 0 <= self.beta2 < 1, "at least 0 and below 1", "0.999")
        self._check("ema", 0 <= self.ema < 1, "at least 0 and below 1", "0.9999")

    def _check(self, name: str, is_valid: bool, allowed: str, example: str) -> None:
        if not is_valid:
            option = "--" + name.replace("_", "-")
            raise TrainingError(
                f"{option} is {getattr(self, name)}", allowed=allowed, remedy=f"e.g. {option} {example}"
            )

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def compute_lr_scale(self, step: int) -> float:
        """Share of the peak learning rate at `step`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return min(1.0, (self.max_steps - step) / self.decay) if self.decay else 1.0
        progress = (step - self.warmup) / max(1, self.max_steps - self.warmup)
        return 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
