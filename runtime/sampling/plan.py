"""What a sampler is: evaluations, each a network call with the linear combinations around it.

An engine forms its own evaluation point, runs the network and combines the result, so a sampling method is nothing
but coefficients. Slopes are named by the index of their evaluation. `BASE` is the point at which the current step
started, `NEW` the slope of this very evaluation, and `NoiseDraw(k)` the k-th normal draw of a stochastic method.

A fixed sampler is a list of evaluations (a `Plan`). An adaptive one is a generator (`AdaptiveSteps`) that yields one
evaluation at a time and receives the error and the size of the velocity of each. Times and coefficients are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Network = Literal["predictor", "refiner"]
BASE, NEW = "base", "new"


@dataclass(frozen=True)
class NoiseDraw:
    """The k-th array of standard normal numbers that a stochastic sampler adds, counted from 0."""

    index: int


HistoryKey = int | NoiseDraw
"""An entry of the history: the slope of an evaluation, or a draw."""
TermKey = str | HistoryKey
Combination = Mapping[TermKey, float]

HISTORY = 16
"""Slots an engine can read: K of the contract."""


@dataclass(frozen=True)
class Evaluation:
    """One network evaluation: slope = network(Σ point, t), then x_next = Σ update.

    Attributes:
        network: which network is evaluated.
        t: flow time of the evaluation.
        point: where it is evaluated; over BASE, earlier slopes and draws.
        update: the next point, over BASE, earlier slopes, draws and NEW; it becomes the base of the next evaluation.
            None for an intermediate stage, which leaves the base as it is.
        error: the embedded error estimate, over earlier slopes and NEW; None where the method has none.
        condition: for a refiner, the evaluation of the velocity that it reads (v of the contract).
        add: for a refiner, the evaluation of the velocity that its output is added to.
        block: letter or name shown in reports.
        guided: whether guidance acts; outside its interval the unguided branch is not evaluated.
        scale: (absolute, relative) tolerance in which the error is measured.
        undo: the last step was rejected: this evaluation starts from the base before it.
        retained: earlier slopes that must stay after this evaluation although it does not read them.
    """

    network: Network
    t: float
    point: Combination
    update: Combination | None = None
    error: Combination | None = None
    condition: int | None = None
    add: int | None = None
    block: str = ""
    guided: bool = True
    scale: tuple[float, float] = (1.0, 0.0)
    undo: bool = False
    retained: tuple[int, ...] = ()

    def list_dependencies(self) -> set[HistoryKey]:
        """Return the earlier slopes and draws that must be in the history during this evaluation."""
        combinations = [self.point, self.update or {}, self.error or {}]
        dependencies = {key for combination in combinations for key in combination if not isinstance(key, str)}
        return dependencies | {index for index in (self.condition, self.add, *self.retained) if index is not None}


@dataclass(frozen=True)
class Feedback:
    """What an adaptive sampler receives for its evaluation, for one image.

    Attributes:
        error: rms(Σ error·slope / (atol + rtol·max(|base|, |x_next|))), `err` of the contract.
        slope_rms: rms of the slope, `slope_rms` of the contract.
    """

    error: float
    slope_rms: float


Plan = Sequence[Evaluation]
AdaptiveSteps = Generator[Evaluation, Feedback, "Combination | None"]
"""An adaptive sampler: yields evaluations and receives their feedback. It returns None where its last update is the end
point, or else the end point as a combination of BASE and of slopes and draws that the last evaluation read or made.
A slope can be read as long as every evaluation since has read it."""
Predict = Callable[[Any, Any], Any]
Refine = Callable[[Any, Any, Any, Any], Any]
Callback = Callable[[dict[str, Any]], None]


def count_evaluations(plan: Plan, network: Network) -> int:
    """Return the NFE of one network; a guided evaluation counts once."""
    return sum(evaluation.network == network for evaluation in plan)


def count_draws(plan: Plan) -> int:
    """Return how many normal draws per image a plan uses."""
    return 1 + max((key.index for e in plan for key in e.list_dependencies() if isinstance(key, NoiseDraw)), default=-1)


def combine(combination: Combination, base: Any, history: Mapping[HistoryKey, Any], new: Any = None) -> Any:
    """Return Σ coefficient · tensor, for NumPy arrays, torch tensors or plain numbers."""
    total: Any = None
    for key, coefficient in combination.items():
        tensor = history[key] if not isinstance(key, str) else base if key == BASE else new
        term = coefficient * tensor
        total = term if total is None else total + term
    return total


def integrate(
    steps: Plan | AdaptiveSteps,
    x: Any,
    predict: Predict,
    refine: Refine | None = None,
    callback: Callback | None = None,
    noise: Sequence[Any] = (),
) -> Any:
    """Run a sampler in plain array arithmetic: the reference that engines are compared with.

    Args:
        steps: a plan; or a generator, which then steers all of `x` as one image.
        x: noise [B, C, H, W], or any array.
        predict: ``predict(x, t) -> rows``; the first B rows are the conditional velocities, further rows are other
            branches of guidance.
        refine: ``refine(x, t, v, add) -> rows`` with v and add the rows of earlier evaluations.
        callback: called after every evaluation with its index, t, point, slope and x.
        noise: the draws of a stochastic plan, in order, each of x's shape.

    Returns:
        The last point, [B, C, H, W].
    """
    rows: dict[int, Any] = {}
    history: dict[HistoryKey, Any] = {NoiseDraw(k): array for k, array in enumerate(noise)}
    start = x
    evaluations = _EvaluationIterator(steps)
    index = 0
    while (evaluation := evaluations.next()) is not None:
        x, start = (start, start) if evaluation.undo else (x, x)
        point = combine(evaluation.point, x, history)
        if evaluation.network == "predictor":
            rows[index] = predict(point, evaluation.t)
        elif refine is not None and evaluation.condition is not None and evaluation.add is not None:
            rows[index] = refine(point, evaluation.t, rows[evaluation.condition], rows[evaluation.add])
        else:
            raise AssertionError(f"evaluation {index} needs a refiner and its two velocities")
        slope = history[index] = rows[index][: len(x)] if getattr(x, "ndim", 0) else rows[index]
        start = x
        x = x if evaluation.update is None else combine(evaluation.update, x, history, slope)
        if evaluations.is_adaptive:
            error = None if evaluation.error is None else combine(evaluation.error, start, history, slope)
            evaluations.send_feedback(_compute_feedback(evaluation, start, x, slope, error))
        if callback:
            callback({"index": index, "t": evaluation.t, "point": point, "slope": slope, "x": x})
        index += 1
    return x if evaluations.end is None else combine(evaluations.end, start, history)


class _EvaluationIterator:
    """Iterate over a plan or a generator."""

    def __init__(self, steps: Plan | AdaptiveSteps) -> None:
        self.is_adaptive = not isinstance(steps, Sequence)
        self.end: Combination | None = None
        self._iterator = iter(steps)
        self._feedback: Feedback | None = None

    def next(self) -> Evaluation | None:
        try:
            if self._feedback is not None and isinstance(self._iterator, Generator):
                return self._iterator.send(self._feedback)  # type: ignore[no-any-return]
            return next(self._iterator)
        except StopIteration as stop:
            self.end = stop.value
            return None

    def send_feedback(self, feedback: Feedback) -> None:
        self._feedback = feedback


def _compute_feedback(evaluation: Evaluation, base: Any, x_next: Any, slope: Any, error: Any) -> Feedback:
    """Compute the two norms that an engine gives, in the same arithmetic."""
    base, x_next, slope = (np.asarray(value, np.float64) for value in (base, x_next, slope))
    atol, rtol = evaluation.scale
    tolerance = atol + rtol * np.maximum(np.abs(base), np.abs(x_next))
    scaled_error = 0.0 if error is None else np.asarray(error, np.float64) / tolerance
    return Feedback(float(np.sqrt(np.mean(np.square(scaled_error)))), float(np.sqrt(np.mean(np.square(slope)))))
