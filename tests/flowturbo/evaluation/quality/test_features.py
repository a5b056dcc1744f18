"""Extractors: what an ONNX file computes is what the network computes, and images reach it as it wants them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_data import write_mean_colour

from flowturbo import demo
from flowturbo.demo.classifier import Classifier, classify_images
from flowturbo.demo.classifier_features import ABOUT, RESOLUTION, DemoFeatures
from flowturbo.evaluation.quality.convert_extractor import (
    INCEPTION_INFO,
    convert_inception,
    fuse_batch_norms,
    load_inception,
    save_extractor,
)
from flowturbo.evaluation.quality.features import open_extractor, resize_tf_bilinear
from flowturbo.models.inception import InceptionV3
from runtime.system.errors import CheckpointError, DataError, RequestError

PUBLIC_WEIGHTS = os.environ.get("FLOWTURBO_INCEPTION", "pt_inception-2015-12-05-6726825d.pth")


def pictures(count: int, side: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(side)).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def unsettled(module: torch.nn.Module) -> torch.nn.Module:
    """Random normalisation statistics, so that a lost or misplaced one shows."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            layer.weight.data.uniform_(0.8, 1.2)
    return module.eval()


def test_the_inception_file_computes_what_the_network_computes(tmp_path: Path) -> None:
    """Structure, pooling and key layout, with random weights; ADM's preprocessing is (pixel − 128) / 128 at 299."""
    torch.manual_seed(0)
    network = unsettled(InceptionV3())
    assert isinstance(network, InceptionV3)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    convert_inception(tmp_path / "weights.pth", tmp_path / "inception.onnx")
    images = pictures(2, 64)
    with open_extractor(str(tmp_path / "inception.onnx")) as extractor:
        assert (extractor.name, extractor.size) == (INCEPTION_INFO.name, 299)
        found = extractor.extract(images)
    with torch.no_grad():
        expected = network(torch.from_numpy((resize_tf_bilinear(images, 299) - 128) / 128))
    assert found.features.shape == (2, 2048)
    assert found.spatial is not None and found.spatial.shape == (2, 17 * 17 * 7)
    assert found.probabilities is not None and found.probabilities.shape == (2, 1008)
    for one, other in zip((found.features, found.spatial, found.probabilities), expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-5 * float(other.abs().max()))


@pytest.mark.skipif(not Path(PUBLIC_WEIGHTS).is_file(), reason="the public Inception weights are not here")
def test_the_public_weights_load_and_convert(tmp_path: Path) -> None:
    network = load_inception(Path(PUBLIC_WEIGHTS))
    images = pictures(4, 256)
    with torch.no_grad():
        expected, _, probabilities = network(torch.from_numpy((resize_tf_bilinear(images, 299) - 128) / 128))
    convert_inception(Path(PUBLIC_WEIGHTS), tmp_path / "inception.onnx")
    with open_extractor(str(tmp_path / "inception.onnx")) as extractor:
        found = extractor.extract(images)
    np.testing.assert_allclose(found.features, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities, probabilities.numpy(), rtol=1e-3, atol=1e-6)


def test_pooling_leaves_the_padding_out() -> None:
    """Torchvision's Inception counts it, and its last block does not pool by maximum: its FIDs are others."""
    network = InceptionV3()
    ones = torch.ones(1, 4, 5, 5)
    assert torch.equal(network.Mixed_7b.pool(ones), ones)
    ramp = torch.arange(25.0).reshape(1, 1, 5, 5)
    assert float(network.Mixed_7c.pool(ramp)[0, 0, 0, 0]) == 6.0


def test_other_weights_are_refused(tmp_path: Path) -> None:
    state = InceptionV3().state_dict()
    state.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"1 tensors differ.*Mixed_7c\.branch_pool"):
        load_inception(tmp_path / "other.pth")


def test_tensorflow_s_resize_by_hand() -> None:
    """Corners at 0 and no antialiasing: output i reads position i · in / out."""
    row = np.asarray([0, 100, 200], np.uint8)
    image = np.tile(row[None, None, :, None], (1, 3, 1, 3))
    np.testing.assert_allclose(resize_tf_bilinear(image, 6)[0, 0, 0], [0, 50, 100, 150, 200, 200], atol=1e-4)
    np.testing.assert_allclose(resize_tf_bilinear(image, 2)[0, 0, 0], [0, 150], atol=1e-4)
    np.testing.assert_array_equal(resize_tf_bilinear(image, 3)[0, 0, 0], row)


def test_half_weights_keep_the_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = unsettled(Classifier([3, 5, 8]))
    assert isinstance(classifier, Classifier)
    images = pictures(5, RESOLUTION)
    expected, named = classify_images(classifier, images)
    save_extractor(DemoFeatures(classifier), tmp_path / "demo.onnx", ABOUT, RESOLUTION, half=True)
    assert (tmp_path / "demo.onnx").stat().st_size < 2.5e6
    with open_extractor(str(tmp_path / "demo.onnx")) as extractor:
        found = extractor.extract(images)
    np.testing.assert_allclose(found.features, expected, atol=2e-3 * np.abs(expected).max())
    assert found.spatial is not None and found.spatial.shape == (5, 112)
    assert found.probabilities is not None
    np.testing.assert_array_equal(np.asarray([3, 5, 8])[found.probabilities.argmax(axis=1)], named)


def test_the_shipped_extractor_opens() -> None:
    with open_extractor("demo") as extractor:
        assert (extractor.name, extractor.size) == ("demo", RESOLUTION)
        found = extractor.extract(pictures(3, RESOLUTION))
    assert found.probabilities is not None and found.spatial is not None
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-5)
    assert demo.FEATURE_EXTRACTOR.stat().st_size < 5e6


def test_any_file_with_one_image_input(tmp_path: Path) -> None:
    images = pictures(35, 16)
    mean = images.astype(np.float64).mean(axis=(1, 2)) / 255
    free, fixed = (
        write_mean_colour(tmp_path / "free.onnx"),
        write_mean_colour(tmp_path / "fixed.onnx", batch=4, side=16),
    )
    with open_extractor(str(free), input_size=16) as extractor:
        np.testing.assert_allclose(extractor.extract(images).features, mean, atol=1e-5)
        first = extractor.hash
    with open_extractor(str(free), input_size=16, input_range="-1..1") as extractor:
        np.testing.assert_allclose(extractor.extract(images).features, 2 * mean - 1, atol=1e-5)
        assert extractor.hash != first  # other numbers, so another name
    with open_extractor(str(fixed)) as extractor:  # a fixed batch of 4 is filled up
        np.testing.assert_allclose(extractor.extract(images).features, mean, atol=1e-5)


def test_what_cannot_be_an_extractor_says_why(tmp_path: Path) -> None:
    free, fixed = write_mean_colour(tmp_path / "free.onnx"), write_mean_colour(tmp_path / "fixed.onnx", side=16)
    with pytest.raises(RequestError, match="--input-size N"):
        open_extractor(str(free))
    with pytest.raises(RequestError, match="16 × 16"):
        open_extractor(str(fixed), input_size=32)
    with pytest.raises(RequestError, match="demo, inception, or an ONNX file"):
        open_extractor("nothing")
    with pytest.raises(RequestError, match="flowturbo-eval inception --weights"):
        open_extractor("inception")  # no test has it: each has its own cache folder
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(DataError, match="no ONNX file"):
        open_extractor(str(tmp_path / "text.onnx"))
    damaged = write_mean_colour(tmp_path / "damaged.onnx", side=16, about=json.dumps({"nam": "x"}))
    with pytest.raises(DataError, match="damaged"):
        open_extractor(str(damaged))


def test_folding_normalisation_changes_nothing() -> None:
    torch.manual_seed(1)
    network = unsettled(InceptionV3())
    x = torch.rand(1, 3, 20, 20)
    with torch.no_grad():
        before = network.Conv2d_1a_3x3(x)  # type: ignore[operator]
        after = fuse_batch_norms(network).Conv2d_1a_3x3(x)  # type: ignore[operator]
    assert torch.allclose(before, after, atol=1e-5)
