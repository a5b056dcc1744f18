"""Stops a run whose loss is no number or explodes, before the step that would spoil the weights."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from flowturbo.training.training_state import checkpoints
from runtime.system.errors import TrainingError

WINDOW = 200
"""Losses whose median is the measure."""
FEWEST = 20
"""Losses that must have been seen before one can be called an explosion: the first ones fall quickly."""


class Watch:
    """Judges every loss before the optimiser's step, so the weights and every checkpoint are of good steps.

    A loss explodes when it is above `limit` × the median of the last `WINDOW` losses. It is asked of single steps, not
    of means, because a checkpoint may be written after any step.
    """

    def __init__(self, folder: Path, limit: float, losses: Iterable[float] = ()) -> None:
        """Takes the losses before a resume, so that a resumed run judges as an uninterrupted one; limit 0: never."""
        self.folder, self.limit = folder, limit
        self.losses = deque(losses, maxlen=WINDOW)

    def judge(self, step: int, loss: float, norm: float) -> None:
        """Raises TrainingError: naming the step, the loss and the last good checkpoint."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._stopped(f"step {step}: the loss is {loss} and the gradient norm {norm}", "finite numbers")
        usual = median(self.losses) if len(self.losses) >= FEWEST else math.inf
        if self.limit and loss > self.limit * usual:
            raise self._stopped(
                f"step {step}: the loss explodes: {loss:.4g}, with a median of {usual:.4g} over the last "
                f"{len(self.losses)} steps",
                f"up to {self.limit:g} times the median (--explode)",
            )
        self.losses.append(loss)

    def _stopped(self, what: str, allowed: str) -> TrainingError:
        found = checkpoints(self.folder)
        good = f"the last good checkpoint is {found[-1][1]}" if found else "there is no checkpoint yet"
        return TrainingError(
            f"{what}; {good}",
            allowed=allowed,
            remedy="lower --lr or --clip, or use --precision fp32, and go on with --resume",
        )
