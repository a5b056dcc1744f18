"""python -m flowturbo.demo.measure: what the demo model's pictures are worth, in numbers.

A classifier trained on the training photographs names the breed of generated images and of validation photographs.
Its features also give the kernel distance to the validation photographs (beside that of blurred class means, and of
training photographs, the best that could be hoped for), the spread over seeds, and the distance to the nearest
training photograph (beside that of validation photographs: a copy would be much nearer).

Letters: B images, R resolution, E features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from flowturbo.checkpoints import load_network
from flowturbo.data.photographs import Photographs, Pixels, list_photographs
from flowturbo.demo import VAES
from flowturbo.demo.classifier import Classifier, classify_images, load_or_train_classifier
from flowturbo.evaluation.quality.metrics import subset_kernel_distance
from flowturbo.models.vae import Vae, load_vae
from flowturbo.training.preview import decode_latents, sample_heun
from flowturbo.training.run_log import save_image_grid
from runtime.cli.command_base import Command, echo_json
from runtime.sampling.noise import sample_noise
from runtime.system.files import write_json

FeatureArray = NDArray[np.float64]
ImageSampler = Callable[[Sequence[int], Sequence[int]], Pixels]  # labels and seeds, one each per image -> [B, R, R, 3]


def _compute_distances(a: FeatureArray, b: FeatureArray) -> FeatureArray:
    """Euclidean distances of rows: [len(a), len(b)]."""
    square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.asarray(np.sqrt(np.maximum(square, 0)))


def measure_spread(values: FeatureArray, labels: NDArray[np.int64]) -> float:
    """Mean distance of two images of one class, averaged over classes."""
    distances = []
    for label in np.unique(labels):
        class_values = values[labels == label]
        distances.append(
            _compute_distances(class_values, class_values).sum() / (len(class_values) * (len(class_values) - 1))
        )
    return float(np.mean(distances))


def _make_thumbnails(pixels: Pixels) -> FeatureArray:
    """Colours at 16 × 16: where copies of a photograph would be close and details do not matter."""
    small = [np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BOX), dtype=np.float64) for p in pixels]
    return np.stack(small).reshape(len(pixels), -1) / 255


def _read_all(photographs: Photographs) -> tuple[Pixels, NDArray[np.int64]]:
    return photographs.read_batch(range(len(photographs)))


def _compute_class_means(pixels: Pixels, labels: NDArray[np.int64], image_labels: NDArray[np.int64]) -> Pixels:
    means = {label: pixels[labels == label].mean(axis=0).round().astype(np.uint8) for label in np.unique(labels)}
    return np.stack([means[label] for label in image_labels])


def measure_images(
    classifier: Classifier, train: Photographs, val: Photographs, images: Pixels, labels: NDArray[np.int64]
) -> dict[str, Any]:
    """All numbers for generated `images` [B, R, R, 3] of classes `labels` [B]."""
    (train_pixels, train_labels), (val_pixels, val_labels) = _read_all(train), _read_all(val)
    features, predicted = classify_images(classifier, images)
    val_features, val_predicted = classify_images(classifier, val_pixels)
    train_features, train_predicted = classify_images(classifier, train_pixels)
    mean_features, _ = classify_images(classifier, _compute_class_means(train_pixels, train_labels, labels))
    accuracy, val_accuracy = float(np.mean(predicted == labels)), float(np.mean(val_predicted == val_labels))
    return {
        "images": len(images),
        "named_right": accuracy,
        "named_right_validation": val_accuracy,
        "named_right_training": float(np.mean(train_predicted == train_labels)),
        "ratio": accuracy / val_accuracy,
        "named_right_by_class": {str(c): float(np.mean(predicted[labels == c] == c)) for c in np.unique(labels)},
        "kid": subset_kernel_distance(features, val_features),
        "kid_class_means": subset_kernel_distance(mean_features, val_features),
        "kid_training": subset_kernel_distance(train_features, val_features),
        "spread_features": {
            "generated": measure_spread(features, labels),
            "validation": measure_spread(val_features, val_labels),
        },
        "spread_thumbnails": {
            "generated": measure_spread(_make_thumbnails(images), labels),
            "validation": measure_spread(_make_thumbnails(val_pixels), val_labels),
        },
        "nearest_training_features": _measure_nearest(features, val_features, train_features),
        "nearest_training_thumbnails": _measure_nearest(
            _make_thumbnails(images), _make_thumbnails(val_pixels), _make_thumbnails(train_pixels)
        ),
    }


def _measure_nearest(
    generated: FeatureArray, validation: FeatureArray, training: FeatureArray
) -> dict[str, dict[str, float]]:
    """Smallest and mean distance to the nearest training photograph, of generated and of validation images."""
    nearest = {
        "generated": _compute_distances(generated, training).min(axis=1),
        "validation": _compute_distances(validation, training).min(axis=1),
    }
    return {name: {"mean": float(d.mean()), "smallest": float(d.min())} for name, d in nearest.items()}


def build_torch_sampler(predictor: Path, vae: str, steps: int, guidance: float, channels: int) -> ImageSampler:
    """Guided Heun in PyTorch."""
    model, autoencoder = load_network(predictor, "predictor").model, load_vae(vae)
    shape = (model.config.out_channels, model.config.latent_size, model.config.latent_size)

    def sample(labels: Sequence[int], seeds: Sequence[int]) -> Pixels:
        parts = []
        for first in range(0, len(seeds), 64):
            noise = torch.from_numpy(sample_noise(seeds[first : first + 64], shape))
            y = torch.tensor(labels[first : first + 64])
            parts.append(decode_latents(autoencoder, sample_heun(model, noise, y, steps, guidance, channels)))
        return np.concatenate(parts)

    return sample


@torch.no_grad()
def measure_reconstruction_psnr(vae: Vae, photographs: Photographs, count: int = 512) -> float:
    """Return the PSNR in dB, averaged over images, of photographs through the posterior's mean and back."""
    psnr_db = []
    for first in range(0, min(count, len(photographs)), 64):
        # Steps of 7, coprime to most sizes, so that a part of the set shows all classes.
        pixels, _ = photographs.read_batch([7 * i % len(photographs) for i in range(first, min(first + 64, count))])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        error = (vae.decode(vae.encode(images)[0]) - images).square().mean(dim=(1, 2, 3))
        psnr_db.append(-10 * error.log10())
    return float(torch.cat(psnr_db).mean())


def read_run_images(folder: Path) -> tuple[Pixels, NDArray[np.int64]]:
    """PNGs that flowturbo-run wrote, with the classes that it wrote into their text chunks."""
    pixels, labels = [], []
    for path in sorted(p for p in folder.rglob("*.png") if "grid" not in p.name):
        with Image.open(path) as image:
            labels.append(int(image.info["class"]))
            pixels.append(np.asarray(image.convert("RGB")))
    return np.stack(pixels), np.asarray(labels, dtype=np.int64)


@click.command(cls=Command)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder with train/ and val/.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="For the classifier, a grid and the numbers."
)
@click.option("--predictor", type=click.Path(path_type=Path), help="Checkpoint to sample from in PyTorch.")
@click.option("--images", type=click.Path(path_type=Path), help="Or a folder that flowturbo-run wrote.")
@click.option("--vae", default=str(VAES["ema"]), help="The demo's by default.")
@click.option("--num", default=32, show_default=True, help="Images per class.")
@click.option("--seed", default=0, show_default=True)
@click.option("--steps", default=16, show_default=True, help="Heun steps.")
@click.option("--guidance", default=3.0, show_default=True)
@click.option("--guided-channels", default=3, show_default=True, help="3 as the runtime does, 4 for all.")
@click.option("--epochs", default=14, show_default=True, help="Of the classifier, trained once and kept in --out.")
def main(
    data: Path,
    out: Path,
    predictor: Path | None,
    images: Path | None,
    vae: str,
    num: int,
    seed: int,
    steps: int,
    guidance: float,
    guided_channels: int,
    epochs: int,
) -> None:
    """Measure generated images against the validation photographs."""
    train, val = (Photographs(list_photographs(data / part), 64) for part in ("train", "val"))
    classifier = load_or_train_classifier(out / "classifier.safetensors", train, epochs)
    if images is not None:
        pixels, labels = read_run_images(images)
    elif predictor is not None:
        labels = np.repeat(np.asarray(classifier.classes, dtype=np.int64), num)
        sample = build_torch_sampler(predictor, vae, steps, guidance, guided_channels)
        pixels = sample(labels.tolist(), range(seed, seed + len(labels)))
        save_image_grid(
            pixels.reshape(-1, num, *pixels.shape[1:])[:, :8].reshape(-1, *pixels.shape[1:]), out / "grid.png", 8
        )
    else:
        raise click.UsageError("name --predictor or --images")
    results = measure_images(classifier, train, val, pixels, labels)
    results["vae_psnr_db_validation"] = measure_reconstruction_psnr(load_vae(vae), val)
    settings = {
        "guidance": guidance,
        "guided_channels": guided_channels,
        "steps": steps,
        "predictor": str(predictor),
        "seed": seed,
    }
    write_json(out / "measure.json", {"predictor": str(predictor), **settings, **results})
    echo_json(results)


if __name__ == "__main__":
    main()
