"""The demo model that ships with the package: a small SiT, its refiner and a VAE with two decoders.

How it was trained, and what its pictures look like, is in `docs/demo-model.md`.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
PREDICTOR = FOLDER / "predictor.safetensors"
REFINER = FOLDER / "refiner.safetensors"
VAES = {"ema": FOLDER / "vae-ema", "mse": FOLDER / "vae-mse"}
FEATURE_EXTRACTOR = FOLDER / "features.onnx"
"""Feature extractor for measuring the demo model: comparable with nothing but itself."""
REFERENCE = FOLDER / "reference.npz"
"""Statistics and features, by that extractor, of the validation photographs."""
SAMPLERS = FOLDER / "samplers"
"""Folder of samplers that were calibrated for the demo model."""
