"""Stops a run whose loss is no number or explodes, before the step that would spoil the weights."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from flowturbo.training.training_state import list_checkpoints
from runtime.system.errors import TrainingError

MEDIAN_WINDOW = 200
"""Losses whose median is the measure."""
MIN_LOSSES = 20
"""Losses that must have been seen before one can be called an explosion: the first ones fall quickly."""


class LossGuard:
    """Judges every loss before the optimiser's step, so the weights and every checkpoint are of good steps.

    A loss explodes when it is above `limit` × the median of the last `MEDIAN_WINDOW` losses. It is asked of single
    steps, not
    of means, because a checkpoint may be written after any step.
    """

    def __init__(self, folder: Path, limit: float, losses: Iterable[float] = ()) -> None:
        """Takes the losses before a resume, so that a resumed run judges as an uninterrupted one; limit 0: never."""
        self.folder, self.limit = folder, limit
        self.losses = deque(losses, maxlen=MEDIAN_WINDOW)

    def check_loss(self, step: int, loss: float, gradient_norm: float) -> None:
        """Raises TrainingError: naming the step, the loss and the last good checkpoint."""
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise self._build_error(
                f"step {step}: the loss is {loss} and the gradient norm {gradient_norm}", "finite numbers"
            )
        median_loss = median(self.losses) if len(self.losses) >= MIN_LOSSES else math.inf
        if self.limit and loss > self.limit * median_loss:
            raise self._build_error(
                f"step {step}: the loss explodes: {loss:.4g}, with a median of {median_loss:.4g} over the last "
                f"{len(self.losses)} steps",
                f"up to {self.limit:g} times the median (--explode)",
            )
        self.losses.append(loss)

    def _build_error(self, problem: str, allowed: str) -> TrainingError:
        entries = list_checkpoints(self.folder)
        advice = f"the last good checkpoint is {entries[-1][1]}" if entries else "there is no checkpoint yet"
        return TrainingError(
            f"{problem}; {advice}",
            allowed=allowed,
            remedy="lower --lr or --clip, or use --precision fp32, and go on with --resume",
        )
