"""The numbers that judge the demo model, and its weights in the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training_data import write_photographs

from flowturbo import demo
from flowturbo.checkpoints import load_network
from flowturbo.data.photographs import Photographs, list_photographs
from flowturbo.demo.classifier import classify_images, load_classifier, save_classifier, train_classifier
from flowturbo.demo.measure import measure_images, measure_spread
from flowturbo.models.vae import load_vae
from flowturbo.torch_sampler import GuidedNetworks, make_conditions
from flowturbo.training.preview import sample_heun


def test_spread_is_within_classes() -> None:
    values = np.asarray([[0.0], [3.0], [100.0], [101.0]])
    assert measure_spread(values, np.asarray([0, 0, 1, 1])) == pytest.approx(2.0)


def test_measuring_photographs_against_themselves(tmp_path: Path) -> None:
    photographs = Photographs(list_photographs(write_photographs(tmp_path / "data", ("a", "b"), 8, 64)), 64)
    save_classifier(train_classifier(photographs, epochs=1, batch_size=8), tmp_path / "c.safetensors")
    classifier = load_classifier(tmp_path / "c.safetensors")
    pixels, labels = photographs.read_batch(range(16))
    found = measure_images(classifier, photographs, photographs, pixels, labels)
    assert found["ratio"] == 1
    assert found["nearest_training_features"]["generated"]["smallest"] == pytest.approx(0, abs=1e-5)
    assert classify_images(classifier, pixels)[0].shape == (16, 192)


def test_guidance_of_one_is_no_guidance() -> None:
    model = load_network(demo.PREDICTOR, "predictor").model
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0.5]), torch.tensor([207])

    def predict(scale: float) -> torch.Tensor:
        conditions = make_conditions([207], [scale], model.config.classes)
        return GuidedNetworks({"predictor": model}, conditions, 4).evaluate("predictor", x, 0.5)[:1]

    with torch.no_grad():
        plain, mixed = model(x, t, y), predict(3.0)
        assert torch.equal(predict(1.0), plain)
        assert torch.allclose(mixed[:, 3:], plain[:, 3:], atol=1e-5)
        assert not torch.allclose(mixed[:, :3], plain[:, :3], atol=1e-5)


def test_the_demo_draws_pictures_that_depend_on_class_and_seed() -> None:
    model, vae = load_network(demo.PREDICTOR, "predictor").model, load_vae(str(demo.VAES["mse"]))
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 16, 16, generator=g).repeat_interleave(2, dim=0)
    latents = sample_heun(model, noise, torch.tensor([207, 229, 207, 229]), steps=4, scale=3.0)
    assert 0.5 < float(latents.std()) < 2
    with torch.no_grad():
        images = vae.decode(latents)
    assert images.shape == (4, 3, 64, 64)
    assert all(float((images[0] - images[i]).abs().mean()) > 0.02 for i in (1, 2))


def test_the_demo_parts_belong_together() -> None:
    predictor, refiner = (load_network(demo.PREDICTOR, "predictor"), load_network(demo.REFINER, "refiner"))
    assert refiner.model.config.depth == 1
    assert sorted(int(label) for label in predictor.metadata["classes"]) == sorted(
        int(label) for label in refiner.metadata["classes"]
    )
    assert predictor.metadata["classes"]["207"] == "golden retriever"
    vaes = [load_vae(str(folder)) for folder in demo.VAES.values()]
    for key, value in vaes[0].module.encoder.state_dict().items():
        assert torch.equal(value, vaes[1].module.encoder.state_dict()[key]), key
    assert len({vae.scaling for vae in vaes}) == 1
    total = sum(path.stat().st_size for path in demo.FOLDER.rglob("*.safetensors"))
    assert total < 30e6
