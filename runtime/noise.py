"""Initial noise: one stream per image, so a picture depends on its seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def noise_of_seeds(seeds: Sequence[int], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Standard normal noise [len(seeds), *shape], the same for a seed on every machine and in every batch."""
    return np.stack(
        [np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32) for seed in seeds]
    )
