"""Everything random in training, keyed by the seed and the position of a sample in the stream of samples.

A step trains on G = batch size · accumulation · processes samples, and sample `row` of step `s` has position
p = s·G + row. What a sample shows (photograph, crop, flip, noise, t, label dropout) depends on (seed, p) alone, so a
resumed run, a run split over processes and a run split into smaller passes draw what one uninterrupted process draws.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

_ORDER_STREAM = 1 << 62  # keys of epoch orders lie above all positions


@dataclass(frozen=True)
class Microbatch:
    """The samples of one forward pass: a part of one step's.

    Attributes:
        positions: their positions.
        step_start: position of the step's first sample, which is the key of what all samples of a step share.
    """

    positions: range
    step_start: int


def list_microbatches(
    step: int, batch_size: int, accumulate: int, process: int = 0, processes: int = 1
) -> list[Microbatch]:
    """Return what one process computes in one step: `accumulate` shares of `batch_size` samples each."""
    step_start = step * batch_size * accumulate * processes
    starts = (step_start + (pass_index * processes + process) * batch_size for pass_index in range(accumulate))
    return [Microbatch(range(start, start + batch_size), step_start) for start in starts]


def prefetch(load: Callable[[Microbatch], T], microbatches: Iterable[Microbatch]) -> Generator[T, None, None]:
    """Yield `load` of each share in order; a thread loads the next one meanwhile."""
    pending: Future[T] | None = None
    with ThreadPoolExecutor(1) as thread:
        for microbatch in microbatches:
            ready, pending = pending, thread.submit(load, microbatch)
            if ready is not None:
                yield ready.result()
        if pending is not None:
            yield pending.result()


def make_generator(seed: int, position: int) -> np.random.Generator:
    """Return the random stream of one sample."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


@lru_cache(maxsize=2)
def _shuffle_epoch(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return make_generator(seed, _ORDER_STREAM + epoch).permutation(size)


def sample_indices(seed: int, positions: range, size: int) -> NDArray[np.int64]:
    """Return which item of a set of `size` each position shows: every epoch is a new permutation."""
    return np.asarray([_shuffle_epoch(seed, p // size, size)[p % size] for p in positions], dtype=np.int64)
