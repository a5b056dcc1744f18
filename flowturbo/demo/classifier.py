"""A small classifier of the demo's ten breeds at 64 pixels, with which the demo model is measured.

Its accuracy and its features are comparable with nothing but themselves.

Letters: B images, R resolution, K classes, E features.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowturbo.data.photographs import Photographs, Pixels, normalise_pixels
from flowturbo.training.random_draws import sample_indices
from runtime.system.errors import CheckpointError, RequestError
from runtime.system.files import make_folder, write_atomically

FEATURE_WIDTH = 192


def _build_conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = _build_conv(inputs, outputs, 2)
        self.body = nn.Sequential(_build_conv(outputs, outputs), _build_conv(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        out: Tensor = x + self.body(x)
        return out


class Classifier(nn.Module):
    """A small residual network.

    Attributes:
        classes: ImageNet index of each of its K outputs.
    """

    def __init__(self, classes: Sequence[int]) -> None:
        super().__init__()
        self.classes = tuple(int(c) for c in classes)
        self.body = nn.Sequential(
            _build_conv(3, 24, 2), _ResidualBlock(24, 48), _ResidualBlock(48, 96), _ResidualBlock(96, FEATURE_WIDTH)
        )
        self.head = nn.Linear(FEATURE_WIDTH, len(self.classes))

    def extract_features(self, images: Tensor) -> Tensor:
        """Return the features [B, E] of images [B, 3, R, R]."""
        pooled: Tensor = self.body(images).mean(dim=(2, 3))
        return pooled

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, R, R] -> [B, K]
        out: Tensor = self.head(F.dropout(self.extract_features(images), 0.2, self.training))
        return out


def train_classifier(photographs: Photographs, epochs: int = 14, batch_size: int = 64, seed: int = 0) -> Classifier:
    """Train a classifier on shifted, mirrored, colour-changed photographs with a one-cycle learning rate."""
    torch.manual_seed(seed)
    classes = np.unique(photographs.labels)
    model = Classifier(classes.tolist())
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * len(photographs) // batch_size
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.2)
    g = np.random.Generator(np.random.Philox(seed))
    for step in range(steps):
        positions = range(step * batch_size, (step + 1) * batch_size)
        pixels, labels = photographs.read_batch(sample_indices(seed, positions, len(photographs)))
        images = _augment(torch.from_numpy(normalise_pixels(pixels)), g)
        target = torch.from_numpy(np.searchsorted(classes, labels))
        loss = F.cross_entropy(model(images), target, label_smoothing=0.1)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
    return model.eval()


def _augment(images: Tensor, g: np.random.Generator) -> Tensor:
    """Mirror, zoom in, cut out, brighten or darken images: one zoom per batch, the rest per image."""
    count, side = len(images), images.shape[3]
    images = torch.where(torch.from_numpy(g.random((count, 1, 1, 1)) < 0.5), images, images.flip(3))
    zoomed_side = int(side * (1 + 0.35 * g.random()))
    images = F.interpolate(images, size=zoomed_side, mode="bilinear", align_corners=False)
    out = torch.empty(count, 3, side, side).to(memory_format=torch.channels_last)
    for index in range(count):
        top, left = g.integers(0, zoomed_side - side + 1, size=2)
        out[index] = images[index, :, top : top + side, left : left + side]
        hole = g.integers(0, side - side // 4, size=2)
        out[index, :, hole[0] : hole[0] + side // 4, hole[1] : hole[1] + side // 4] = 0
    contrast = torch.from_numpy(g.uniform(0.7, 1.3, (count, 1, 1, 1)).astype(np.float32))
    brightness = torch.from_numpy(g.uniform(-0.3, 0.3, (count, 1, 1, 1)).astype(np.float32))
    return out * contrast + brightness


@torch.no_grad()
def classify_images(
    model: Classifier, pixels: Pixels, batch_size: int = 256
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return features [B, E] of images [B, R, R, 3], and the ImageNet indices [B] that the classifier gives."""
    features, predictions = [], []
    for first in range(0, len(pixels), batch_size):
        images = torch.from_numpy(normalise_pixels(pixels[first : first + batch_size]))
        batch_features = model.extract_features(images.contiguous(memory_format=torch.channels_last))
        features.append(batch_features.double().numpy())
        predictions.append(model.head(batch_features).argmax(dim=1).numpy())
    return np.concatenate(features), np.asarray(model.classes, dtype=np.int64)[np.concatenate(predictions)]


def save_classifier(model: Classifier, path: Path) -> None:
    """Write a classifier with its classes, whole or not at all."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    with write_atomically(path) as aside:
        save_file(state, aside, metadata={"classes": json.dumps(model.classes)})


def load_classifier(path: Path) -> Classifier:
    """Read a classifier.

    Raises:
        CheckpointError: the file is something else.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "classes" not in metadata:
            raise CheckpointError(f"{path} is not the demo's classifier", remedy="remove it; measure trains a new one")
        model = Classifier(json.loads(metadata["classes"]))
        model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 - not a dict
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()


def load_or_train_classifier(path: Path | None, photographs: Photographs | None, epochs: int) -> Classifier:
    """Read a classifier, or train one on photographs of the training split and write it, if `path` names a file.

    Raises:
        RequestError: there is no file, and no photographs to train on.
        CheckpointError: the file is something else.
    """
    if path is not None and path.exists():
        return load_classifier(path)
    if photographs is None:
        raise RequestError(
            "no photographs to train the classifier on", remedy="name --data, or --classifier with one that was trained"
        )
    if path is not None:
        make_folder(path.absolute().parent)  # before the minutes of training
    start_time = time.monotonic()
    model = train_classifier(photographs, epochs)
    click.echo(f"trained the classifier in {time.monotonic() - start_time:.0f} s", err=True)
    if path is not None:
        save_classifier(model, path)
    return model
