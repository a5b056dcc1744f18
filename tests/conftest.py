"""What the tests share: reference arrays, checkpoints made of them, and engine directories built once a session."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when torch and huggingface_hub are imported, so they are set before that, and hold in every process of the tests.
os.environ["OMP_NUM_THREADS"] = "1"  # the networks are tiny: more threads only wait for one another
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden import HEADS, Golden, build_tiny_command, load_golden, write_checkpoints, write_vae
from hypothesis import HealthCheck, settings
from made_once import make_once

from export.build import build
from export.build_request import resolve_request
from export.cli.export import main as export_main
from export.directory_source import open_directory
from runtime.system import hardware

# The same examples every time, and no clock: a busy machine is no failure.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


SLOW_TESTS = Path(__file__).with_name("slow_tests.txt")
BUILT_DIRECTORIES = {"tiny_engines", "nosigma_engines", "openvino_engines"}
"""Fixtures that build engines: `--quick` leaves out what needs one."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="leave out what builds engines, trains, or is in slow_tests.txt"
    )
    parser.addoption(
        "--long", action="store_true", help="run the tests marked `long` as well: many repeats of one thing"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        _deselect(config, items, is_slow)
    if not config.getoption("--long"):
        _deselect(config, items, lambda item: item.get_closest_marker("long") is not None)


def is_slow(item: pytest.Item) -> bool:
    """Whether a test builds engines, or slow_tests.txt names its file, itself or a fixture that it uses."""
    fixtures = set(getattr(item, "fixturenames", ()))
    file, _, name = item.nodeid.partition("::")
    places = {file, *(f"{file}::{part}" for part in {name.partition("[")[0], *fixtures})}
    return bool(fixtures & BUILT_DIRECTORIES) or bool(places & set(SLOW_TESTS.read_text(encoding="utf-8").split()))


def _deselect(config: pytest.Config, items: list[pytest.Item], is_left_out: Callable[[pytest.Item], bool]) -> None:
    left_out = [item for item in items if is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session", autouse=True)
def _share_cores() -> Iterator[None]:
    """Workers that run side by side do not fight: each runs engines on its share of the cores unless a test says else."""
    share = max(1, hardware.count_physical_cores() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.backends.onnxruntime.count_physical_cores", lambda: share)
        yield


@pytest.fixture(autouse=True)
def _restore_torch_threads() -> Iterator[None]:
    """A test that gives torch more threads does not slow down those after it: two busy processes make it ten times."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _isolate_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or leaves anything in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with golden_s-predictor.pt, golden_s-refiner.pt and the same of golden_nosigma."""
    return make_once(tmp_path_factory, "checkpoints", write_checkpoints)


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
    return make_once(tmp_path_factory, "vaes", lambda folder: write_vae(folder / "small")) / "small"


@pytest.fixture(scope="session")
def tiny_engines(checkpoints: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory for CPU: golden_s with refiner and decoder at 32 px (latents of 16), at most 3 a batch.

    Shared: read it, copy it, but do not change it.
    """

    def make(folder: Path) -> None:
        command = build_tiny_command(checkpoints, vae, folder / "engines")
        result = CliRunner().invoke(export_main, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output

    return make_once(tmp_path_factory, "tiny", make) / "engines"


@pytest.fixture(scope="session")
def nosigma_engines(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small directory for CPU, at most 2 a batch: golden_nosigma, 64 px (latents of 8), no refiner and no decoder."""
    request = resolve_request(
        predictor=checkpoints / "golden_nosigma-predictor.pt",
        vaes=["none"],
        heads=HEADS["golden_nosigma"],
        targets=["cpu"],
        max_batch=2,
    )

    def make(folder: Path) -> None:
        build(request, folder / "engines")

    return make_once(tmp_path_factory, "nosigma", make) / "engines"


@pytest.fixture(scope="session")
def openvino_engines(nosigma_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for CPU and OpenVINO, both in fp32, from its ONNX files."""
    if importlib.util.find_spec("onnxruntime_ep_openvino") is None:
        pytest.skip("the OpenVINO plug-in is not made for this platform")
    if reason := hardware.find_openvino_problem():
        pytest.skip(reason)

    def make(folder: Path) -> None:
        build(open_directory(nosigma_engines, {"openvino": "fp32"}), folder / "engines")

    return make_once(tmp_path_factory, "openvino", make) / "engines"


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.Generator(np.random.Philox(7))
