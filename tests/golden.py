"""The reference arrays of tests/data, and small models written in every form that checkpoints come in."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowturbo.checkpoints import load_network
from flowturbo.models.sit import SiT
from runtime.sampling.guidance import BranchBatch, build_class_branches

DATA = Path(__file__).parent / "data"
HEADS = {"golden_s": 6, "golden_nosigma": 4}
GOLDEN_NAMES = tuple(HEADS)
LATENT_SIZES = {"golden_s": 16, "golden_nosigma": 8}
VAE_FACTOR = 2
"""Pixels per latent of `write_vae`'s autoencoder."""

StateDict = dict[str, torch.Tensor]


def measure_relative_difference(actual: Any, expected: Any) -> float:
    """Largest difference over the largest value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@dataclass(frozen=True)
class Golden:
    """One archive of reference arrays with its two networks as this package loads them."""

    name: str
    arrays: Mapping[str, NDArray[Any]]
    predictor: SiT
    refiner: SiT

    def read_tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    @property
    def null_label(self) -> int:
        return int(self.arrays["config"][5])

    @property
    def branches(self) -> BranchBatch:
        """Guided rows of the reference's batch: two images, each with its null row."""
        y, scale = self.arrays["y"], float(self.arrays["cfg_scale"])
        return build_class_branches([int(label) for label in y], [scale] * len(y), self.null_label, 4)

    def predict_guided(self, x: torch.Tensor, t: torch.Tensor | float, v: torch.Tensor | None = None) -> torch.Tensor:
        """2B rows of the predictor, or (with v, 2B rows) the refiner's change of them."""
        branches = self.branches
        row_image, labels = torch.from_numpy(branches.row_image).long(), torch.from_numpy(branches.labels).long()
        t = torch.full((len(x),), float(t)) if isinstance(t, float) else t
        network = self.predictor if v is None else self.refiner
        points = x[row_image] if v is None else torch.cat([x[row_image], v], dim=1)
        velocities = network(points, t[row_image], labels)
        return torch.einsum("cnm,mchw->nchw", torch.from_numpy(branches.mix), velocities)


def load_golden_arrays(name: str) -> dict[str, NDArray[Any]]:
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def load_golden_state(name: str, role: str) -> StateDict:
    """A network's weights in the official key layout."""
    arrays = load_golden_arrays(name)
    return {
        key.split("/", 1)[1]: torch.from_numpy(array) for key, array in arrays.items() if key.startswith(f"{role}/")
    }


def load_golden(name: str, folder: Path) -> Golden:
    return Golden(
        name,
        load_golden_arrays(name),
        load_network(folder / f"{name}-predictor.pt", "predictor", heads=HEADS[name]).model,
        load_network(folder / f"{name}-refiner.pt", "refiner", heads=HEADS[name]).model,
    )


def write_checkpoints(folder: Path) -> Path:
    """Every golden network as the `.pt` files that the authors publish."""
    for name in GOLDEN_NAMES:
        for role in ("predictor", "refiner"):
            torch.save(load_golden_state(name, role), folder / f"{name}-{role}.pt")
    return folder


def write_training_checkpoint(path: Path, ema: StateDict, model: StateDict) -> Path:
    """The form that SiT's training script writes: raw and averaged weights, optimiser, and its arguments."""
    arguments = argparse.Namespace(model="SiT-B/2", global_seed=0, results_dir="results", ckpt=None)
    torch.save({"model": model, "ema": ema, "opt": {"state": {}, "param_groups": []}, "args": arguments}, path)
    return path


def write_vae(folder: Path, *, channels: int = 4, seed: int = 0) -> Path:
    """A small random AutoencoderKL in diffusers' layout, two pixels per latent."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=32,
    )
    vae.save_pretrained(folder)
    return folder


def build_tiny_command(checkpoints: Path, vae: Path, out: Path) -> list[str]:
    """What a user types to build `tiny_engines`, after `flowturbo-export`."""
    options = {
        "--predictor": checkpoints / "golden_s-predictor.pt",
        "--refiner": checkpoints / "golden_s-refiner.pt",
        "--vae": vae,
        "--heads": HEADS["golden_s"],
        "--target": "cpu",
        "--max-batch": 3,
        "--out": out,
    }
    return ["build-engines", *(str(word) for option in options.items() for word in option)]
