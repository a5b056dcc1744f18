"""What a sampler is: a list of evaluations, each a network call with the linear combinations around it.

An engine forms its own evaluation point, runs the network and combines the result, so a sampling method is nothing
but coefficients. Slopes are named by the index of the evaluation that made them; `BASE` is the point the current
step started from and `NEW` the slope that this very evaluation makes.

Coefficients and times are float64 numbers, or arrays with one entry per image where images take their own steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Network = Literal["predictor", "refiner"]
BASE, NEW = "base", "new"
Combination = Mapping[str | int, Any]

HISTORY = 16
"""Slopes an engine can read: K of the contract. Older ones are overwritten."""


@dataclass(frozen=True)
class Evaluation:
    """One network evaluation: slope = network(Σ point, t), then x_next = Σ update.

    Attributes:
        network: which network is asked.
        t: flow time of the evaluation.
        point: where it is asked; over BASE and earlier slopes.
        update: the next point, over BASE, earlier slopes and NEW; it becomes the base of what follows. None for
            an intermediate stage, which leaves the base as it is.
        error: the embedded error estimate, over earlier slopes and NEW; None where the method has none.
        condition: for a refiner, the evaluation whose velocity it reads (v of the contract).
        add: for a refiner, the evaluation whose velocity its output is added to.
        block: letter or name shown in reports.
    """

    network: Network
    t: Any
    point: Combination
    update: Combination | None = None
    error: Combination | None = None
    condition: int | None = None
    add: int | None = None
    block: str = ""

    def reads(self) -> set[int]:
        """Indices of all earlier evaluations that this one needs."""
        combinations = [self.point, self.update or {}, self.error or {}]
        slopes = {key for combination in combinations for key in combination if isinstance(key, int)}
        return slopes | {index for index in (self.condition, self.add) if index is not None}


Plan = Sequence[Evaluation]
Predict = Callable[[Any, Any], Any]
Refine = Callable[[Any, Any, Any, Any], Any]
Callback = Callable[[dict[str, Any]], None]


def count(plan: Plan, network: Network) -> int:
    """NFE of one network; a guided evaluation counts once."""
    return sum(evaluation.network == network for evaluation in plan)


def check_history(plan: Plan) -> None:
    """Asserts the rules of the history: nothing is read after it was overwritten, nothing overwritten while read."""
    for index, evaluation in enumerate(plan):
        for read in evaluation.reads():
            if not index - HISTORY < read < index:
                raise AssertionError(f"evaluation {index} reads slope {read}, outside a history of {HISTORY}")


def combine(combination: Combination, base: Any, slopes: Mapping[int, Any], new: Any = None) -> Any:
    """Σ coefficient · tensor, for NumPy arrays, torch tensors or plain numbers."""
    total: Any = None
    for key, coefficient in combination.items():
        tensor = base if key == BASE else new if key == NEW else slopes[int(key)]
        term = coefficient * tensor
        total = term if total is None else total + term
    return total


def integrate(
    plan: Plan, x: Any, predict: Predict, refine: Refine | None = None, callback: Callback | None = None
) -> Any:
    """Runs a plan in plain array arithmetic: the reference that engines are compared with.

    Args:
        x: noise [B, C, H, W], or any array.
        predict: ``predict(x, t) -> rows``; the first B rows are the conditional velocities, further rows are other
            branches of guidance.
        refine: ``refine(x, t, v, add) -> rows`` with v and add the rows of earlier evaluations.
        callback: called after every evaluation with its index, t, point, slope and x.

    Returns:
        The last point, [B, C, H, W].
    """
    rows: dict[int, Any] = {}
    slopes: dict[int, Any] = {}
    for index, evaluation in enumerate(plan):
        point = combine(evaluation.point, x, slopes)
        if evaluation.network == "predictor":
            rows[index] = predict(point, evaluation.t)
        elif refine is not None and evaluation.condition is not None and evaluation.add is not None:
            rows[index] = refine(point, evaluation.t, rows[evaluation.condition], rows[evaluation.add])
        else:
            raise AssertionError(f"evaluation {index} needs a refiner and its two velocities")
        slopes[index] = rows[index][: len(x)] if getattr(x, "ndim", 0) else rows[index]
        if evaluation.update is not None:
            x = combine(evaluation.update, x, slopes, slopes[index])
        if callback:
            callback({"index": index, "t": evaluation.t, "point": point, "slope": slopes[index], "x": x})
    return x
