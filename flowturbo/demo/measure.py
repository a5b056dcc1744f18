"""python -m flowturbo.demo.measure: how good the demo model's pictures are, in numbers.

A classifier that is trained on the training photographs names the breed of generated images and of validation
photographs. Its features also give:

- the kernel distance to the validation photographs, beside that of blurred class means and of training photographs,
  which are the worst and the best case;
- the spread over seeds;
- the distance to the nearest training photograph, beside that of validation photographs. A copy would be much nearer.

Letters: B images, R resolution, E features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from runtime.picture_files import convert_to_rgb, list_pictures, open_picture
from runtime.sampling.noise import sample_noise
from runtime.system.files import write_json

FeatureArray = NDArray[np.float64]


def _compute_distances(a: FeatureArray, b: FeatureArray) -> FeatureArray:
    """Return Euclidean distances of rows: [len(a), len(b)]."""
    square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.asarray(np.sqrt(np.maximum(square, 0)))


def measure_spread(values: FeatureArray, labels: NDArray[np.int64]) -> float:
    """Return the mean distance of two images of one class, averaged over classes.

    Args:
        values: [B, E] features of the images.
        labels: [B] their classes.
    """
    distances = []
    for label in np.unique(labels):
        class_values = values[labels == label]
        distances.append(
            _compute_distances(class_values, class_values).sum() / (len(class_values) * (len(class_values) - 1))
        )
    return float(np.mean(distances))


def _make_thumbnails(pixels: Pixels) -> FeatureArray:
    """Return the colours at 16 × 16: copies of a photograph are close there, and details do not matter."""
    small = [np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BOX), dtype=np.float64) for p in pixels]
    return np.stack(small).reshape(len(pixels), -1) / 255


def measure_images(
    classifier: Classifier, train: Photographs, val: Photographs, images: Pixels, labels: NDArray[np.int64]
) -> dict[str, object]:
    """Return all numbers for generated `images` [B, R, R, 3] of classes `labels` [B], as JSON data."""
    (train_pixels, train_labels), (val_pixels, val_labels) = (p.read_batch(range(len(p))) for p in (train, val))
    features, predicted = classify_images(classifier, images)
    val_features, val_predicted = classify_images(classifier, val_pixels)
    train_features, train_predicted = classify_images(classifier, train_pixels)
    class_means = {c: train_pixels[train_labels == c].mean(axis=0).round().astype(np.uint8) for c in np.unique(labels)}
    mean_features, _ = classify_images(classifier, np.stack([class_means[c] for c in labels]))
    accuracy, val_accuracy = float(np.mean(predicted == labels)), float(np.mean(val_predicted == val_labels))
    return {
        "images": len(images),
        "named_right": accuracy,
        "named_right_validation": val_accuracy,
        "named_right_training": float(np.mean(train_predicted == train_labels)),
        "ratio": accuracy / val_accuracy if val_accuracy else None,
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
    """Return the smallest and mean distance to the nearest training photograph, of generated and validation images."""
    nearest = {
        "generated": _compute_distances(generated, training).min(axis=1),
        "validation": _compute_distances(validation, training).min(axis=1),
    }
    return {name: {"mean": float(d.mean()), "smallest": float(d.min())} for name, d in nearest.items()}


def sample_images(
    predictor: Path, vae: str, labels: Sequence[int], first_seed: int, steps: int, guidance: float, channels: int
) -> Pixels:
    """Return images [B, R, R, 3] of `labels` [B] by guided Heun in PyTorch, with a seed each.

    Args:
        predictor: checkpoint of a SiT.
        vae: name or folder of its autoencoder.
        labels: class of each image.
        first_seed: of the first image; the next ones follow.
        steps: Heun steps.
        guidance: its scale.
        channels: latent channels that are guided.
    """
    model, autoencoder = load_network(predictor, "predictor").model, load_vae(vae)
    shape = (model.config.out_channels, model.config.latent_size, model.config.latent_size)
    parts = []
    for first in range(0, len(labels), 64):
        y = torch.tensor(labels[first : first + 64])
        noise = torch.from_numpy(sample_noise(range(first_seed + first, first_seed + first + len(y)), shape))
        parts.append(decode_latents(autoencoder, sample_heun(model, noise, y, steps, guidance, channels)))
    return np.concatenate(parts)


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
    """Return the PNGs [B, R, R, 3] that flowturbo-run wrote, and the classes [B] in their text chunks."""
    pixels, labels = [], []
    for path in (p for p in list_pictures(folder) if p.suffix == ".png" and "grid" not in p.name):
        image = open_picture(path)
        labels.append(int(image.info["class"]))
        pixels.append(np.asarray(convert_to_rgb(image)))
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
        pixels = sample_images(predictor, vae, labels.tolist(), seed, steps, guidance, guided_channels)
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
