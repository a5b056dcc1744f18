"""Small photographs and a cache of their latents, for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from flowturbo.data.latents import CachedLatents, build_cache
from flowturbo.data.photographs import Photographs, list_photographs
from flowturbo.models.vae import Vae, wrap_vae
from flowturbo.training.vae_task import VaeConfig, build_vae


def write_photographs(root: Path, names: tuple[str, ...], count: int = 4, side: int = 24) -> Path:
    g = np.random.Generator(np.random.Philox(0))
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = g.integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def small_vae() -> Vae:
    torch.manual_seed(0)
    return wrap_vae(build_vae(VaeConfig(channels=(8, 8, 8), groups=4), 16))


def make_cache(root: Path, folder: Path, **options: Any) -> CachedLatents:
    build_cache(folder, Photographs(list_photographs(root, **options), 16), small_vae(), "test", shard=3)
    return CachedLatents(folder)
