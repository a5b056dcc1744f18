"""What the tests share: reference arrays, checkpoints made of them, and engine directories built once a session."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

# Read when torch and huggingface_hub are imported, so they are set before that, and hold in every process of the tests.
os.environ["OMP_NUM_THREADS"] = "1"  # the networks are tiny: more threads only wait for one another
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
from click.testing import CliRunner
from golden import HEADS, Golden, build_tiny_command, load_golden, write_checkpoints, write_vae
from hypothesis import HealthCheck, settings

from export.build import build
from export.build_request import resolve_request
from export.cli.export import main as export_main
from export.directory_source import open_directory
from runtime.system import hardware

# The same examples every time, and no clock: a busy machine is no failure.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def _isolate_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or leaves anything in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with golden_s-predictor.pt, golden_s-refiner.pt and the same of golden_nosigma."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def golden_s(checkpoints: Path) -> Golden:
    return load_golden("golden_s", checkpoints)


@pytest.fixture(scope="session")
def golden_nosigma(checkpoints: Path) -> Golden:
    return load_golden("golden_nosigma", checkpoints)


@pytest.fixture(scope="session", params=list(HEADS))
def golden(request: pytest.FixtureRequest) -> Golden:
    """Both reference archives, one after the other."""
    archive: Golden = request.getfixturevalue(request.param)
    return archive


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random AutoencoderKL with two pixels per latent."""
    return write_vae(tmp_path_factory.mktemp("vaes") / "small")


@pytest.fixture(scope="session")
def tiny_engines(checkpoints: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory for CPU: golden_s with refiner and decoder at 32 px (latents of 16), at most 3 a batch.

    Shared: read it, copy it, but do not change it.
    """
    out = tmp_path_factory.mktemp("tiny") / "engines"
    result = CliRunner().invoke(export_main, build_tiny_command(checkpoints, vae, out), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="session")
def nosigma_engines(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small directory for CPU, at most 2 a batch: golden_nosigma, 64 px (latents of 8), no refiner and no decoder."""
    out = tmp_path_factory.mktemp("nosigma") / "engines"
    request = resolve_request(
        predictor=checkpoints / "golden_nosigma-predictor.pt",
        vaes=["none"],
        heads=HEADS["golden_nosigma"],
        targets=["cpu"],
        max_batch=2,
    )
    build(request, out)
    return out


@pytest.fixture(scope="session")
def openvino_engines(nosigma_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for CPU and OpenVINO, both in fp32, from its ONNX files."""
    if importlib.util.find_spec("onnxruntime_ep_openvino") is None:
        pytest.skip("the OpenVINO plug-in is not made for this platform")
    if reason := hardware.find_openvino_problem():
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("openvino") / "engines"
    build(open_directory(nosigma_engines, {"openvino": "fp32"}), out)
    return out


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.Generator(np.random.Philox(7))
