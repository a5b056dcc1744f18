"""The wheel: built, its files compared with the sources, installed in a clean environment and used."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from click.testing import CliRunner

import flowturbo
from flowturbo import demo

ROOT = Path(__file__).parent.parent
PACKAGES = ("flowturbo", "export", "runtime", "calibration")
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc")
COMMANDS = {
    *(
        "flowturbo-train",
        "flowturbo-export",
        "flowturbo-run",
        "flowturbo-bench",
        "flowturbo-eval",
        "flowturbo-calibrate",
    )
}
EXTRAS = {"cpu", "openvino", "cuda", "tensorrt", "jetson", "rtx", "export", "train", "eval", "calibrate", "docs", "dev"}
MAX_DEMO_BYTES = 30e6


def sh(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=600)


def check_success(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools would otherwise reuse, and leave, a build folder among the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=JUNK)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    check_success(
        sh(sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", folder, source)
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel, its base dependencies and nothing else."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    check_success(sh(sys.executable, "-m", "venv", "--without-pip", folder))
    pins = ROOT / "constraints" / f"py{sys.version_info[0]}{sys.version_info[1]}.txt"
    pinned = ("-c", pins) if pins.exists() else ()
    check_success(
        sh(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-qq", wheel, *pinned)
    )
    return folder / "bin"


def list_shipped_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}


def metadata(wheel: Path) -> PathDistribution:
    info = next(path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(info)  # type: ignore[arg-type]  # a zipfile.Path does what is needed of a path


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    files = {
        str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()
    }
    assert list_shipped_files(wheel) == {name for name in files if "__pycache__" not in name}


def test_the_wheel_carries_the_demo_model_within_its_budget(wheel: Path) -> None:
    parts = (demo.PREDICTOR, demo.REFINER, *(vae / "diffusion_pytorch_model.safetensors" for vae in demo.VAES.values()))
    names = {str(part.relative_to(ROOT)) for part in parts}
    assert names <= list_shipped_files(wheel)
    with zipfile.ZipFile(wheel) as archive:
        weights = [info.file_size for info in archive.infolist() if info.filename.startswith("flowturbo/demo/")]
    assert sum(weights) <= MAX_DEMO_BYTES


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    about = metadata(wheel)
    assert about.version == flowturbo.__version__
    assert set(about.metadata.get_all("Provides-Extra") or ()) == EXTRAS
    assert about.metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    assert {point.name for point in about.entry_points if point.group == "console_scripts"} == COMMANDS
    assert {point.group for point in about.entry_points} == {"console_scripts"}


def test_the_base_install_is_light(wheel: Path) -> None:
    needs = [line for line in metadata(wheel).metadata.get_all("Requires-Dist") or () if "extra ==" not in line]
    assert {re.split(r"[<>=!~ ]", line)[0] for line in needs} == {"numpy", "click", "pillow", "rich"}


def test_every_command_exists_and_helps(wheel: Path) -> None:
    for point in metadata(wheel).entry_points:
        if point.group != "console_scripts":
            continue
        module, _, function = point.value.partition(":")
        main = getattr(importlib.import_module(module), function)
        result = CliRunner().invoke(main, ["--help"])
        assert result.exit_code == 0
        assert "Usage:" in result.output


def test_every_extra_named_in_a_message_exists() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for names in re.findall(r"flowturbo\[([a-z,]+)\]", path.read_text()):
                assert set(names.split(",")) <= EXTRAS, path


def test_the_clean_environment_is_clean(clean: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, flowturbo\n"
        "print(flowturbo.__file__, *(u.find_spec(name) for name in ('torch', 'onnxruntime', 'onnx')))"
    )
    home, *missing = check_success(sh(clean / "python", "-c", code, cwd=tmp_path)).split()
    assert Path(home).is_relative_to(clean.parent)
    assert missing == ["None"] * 3


@pytest.mark.parametrize(
    "command",
    [
        ("flowturbo-run", "--help"),
        ("flowturbo-bench", "--help"),
        ("flowturbo-export", "--help"),
        ("flowturbo-export", "doctor"),
    ],
)
def test_commands_of_the_base_install(command: tuple[str, ...], clean: Path, tmp_path: Path) -> None:
    assert check_success(sh(clean / command[0], *command[1:], cwd=tmp_path))


def test_the_base_install_runs_engines(clean: Path, tiny_engines: Path, tmp_path: Path) -> None:
    check_success(sh(clean / "flowturbo-export", "inspect", tiny_engines, cwd=tmp_path))
    check_success(
        sh(clean / "flowturbo-run", "--engine", tiny_engines, "--class", 1, "--backend", "fake", cwd=tmp_path)
    )
    assert (tmp_path / "out" / "class1-seed0.png").exists()
    quick = ("--backend", "fake", "--repeats", 1, "--html", "bench.html")
    assert "first picture" in check_success(sh(clean / "flowturbo-bench", tiny_engines, *quick, cwd=tmp_path))
    assert (tmp_path / "bench.html").exists()


def test_the_base_install_says_which_backend_is_missing(clean: Path, tiny_engines: Path, tmp_path: Path) -> None:
    run = sh(clean / "flowturbo-run", "--engine", tiny_engines, "--class", 1, cwd=tmp_path)
    assert run.returncode == 1
    assert "flowturbo-export doctor" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_public_names() -> None:
    assert sorted(flowturbo.__all__) == flowturbo.__all__
    assert set(flowturbo.__all__) <= set(dir(flowturbo))
    assert {*flowturbo._MODULE_BY_NAME, "__version__"} == set(flowturbo.__all__)
    for name in flowturbo.__all__:
        assert getattr(flowturbo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'pipeline_of_another'"):
        _ = flowturbo.pipeline_of_another
