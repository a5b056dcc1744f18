"""`doctor` on this machine, on an empty one, and on those it warns about."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from export import doctor
from runtime import backends
from runtime.system import hardware
from runtime.system.cuda_driver import Gpu

ROOT = Path(__file__).parents[2]
ADA = Gpu("RTX 4090", (8, 9), 24 << 30, False, "13.0")
ORIN = Gpu("Orin", (8, 7), 8 << 30, True, "12.6")


def rendered(report: dict[str, object]) -> str:
    console = Console(file=io.StringIO(), width=200)
    doctor.print_doctor_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_report_is_json_and_says_what_auto_is() -> None:
    report = doctor.collect_doctor_report()
    assert json.loads(json.dumps(report)) == report
    assert report["cpu"]["logical_cores"] >= 1
    text = rendered(report)
    assert report["target"]["name"] in text
    assert report["cpu"]["model"] in text
    assert "TensorRT-RTX" in text
    assert report["gpus"] or "no NVIDIA driver" in text


def with_machine(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, modules: set[str], providers: set[str]
) -> tuple[str, str]:
    monkeypatch.setattr(hardware, "detect_gpus", lambda: ((gpu,), "") if gpu else ((), "no NVIDIA driver"))
    monkeypatch.setattr(doctor, "_is_installed", lambda module: module in modules)
    monkeypatch.setattr(hardware, "is_tensorrt_installed", lambda target: hardware.TENSORRT_MODULES[target] in modules)
    monkeypatch.setattr(backends, "is_provider_installed", lambda provider: provider in providers)
    monkeypatch.setattr(hardware, "find_openvino_problem", lambda: "")
    return doctor.choose_target()


ALL = {"tensorrt", "tensorrt_rtx", "polygraphy"}
EVERY = {"cpu", "openvino", "cuda"}


@pytest.mark.parametrize(
    ("gpu", "modules", "providers", "target"),
    [
        (ADA, ALL, EVERY, "tensorrt"),
        (ADA, {"tensorrt_rtx", "polygraphy"}, EVERY, "rtx"),
        (ADA, {"tensorrt"}, EVERY, "cuda"),  # no Polygraphy: nothing to build with
        (ORIN, {"tensorrt_rtx", "polygraphy"}, {"cpu"}, "cpu"),  # RTX does not serve Orin
        (None, ALL, EVERY, "openvino"),
        (None, ALL, {"cpu", "cuda"}, "cpu"),
        (None, set(), set(), "cpu"),
    ],
)
def test_auto_is_the_fastest_that_can_run(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, modules: set[str], providers: set[str], target: str
) -> None:
    chosen, reason = with_machine(monkeypatch, gpu, modules, providers)
    assert chosen == target
    assert reason
    if not providers:
        assert "pip install 'flowturbo[cpu]'" in reason


def test_two_onnxruntimes_overwrite_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"}
    monkeypatch.setattr(doctor, "_find_version", versions.get)
    problems = doctor._find_problems(None)
    assert "overwrite each other" in problems[0]
    assert "pip uninstall" in problems[0]


def test_a_jetson_is_told_what_stands_in_its_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "_TEGRA_RELEASE", ROOT / "pyproject.toml")
    monkeypatch.setattr(doctor, "find_installed_version", lambda flavour: "11.4.0")
    package = tmp_path / "site-packages" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    problems = " ".join(doctor._find_problems(hardware.Jetson("Orin Nano", "36.4.3", "JetPack 6", "15W")))
    assert "comes from pip" in problems
    assert "apt-get install tensorrt" in problems
    assert "does not support JetPack 6" in problems
    assert "power mode 15W" in problems


def test_every_missing_extra_has_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_is_installed", lambda module: False)
    missing = doctor._list_missing_extras(())
    assert len(missing) == len(doctor._EXTRAS)
    assert all(entry["install"].startswith("pip install 'flowturbo[") for entry in missing)
    assert next(entry for entry in missing if "TensorRT engines" in entry["to"])["note"] == "no NVIDIA GPU here"


def test_it_runs_on_the_base_install() -> None:
    """In a process where nothing but the base dependencies can be imported."""
    script = """
import sys
BASE = {"numpy", "click", "rich", "PIL", "runtime", "export", "markdown_it", "mdurl", "pygments", "typing_extensions"}
class OnlyBase:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in BASE or top in sys.stdlib_module_names:
            return None
        raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, OnlyBase())
import importlib.util
find = importlib.util.find_spec
def absent(name, package=None):
    try:
        return find(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = absent
from rich.console import Console
from export.doctor import choose_target, collect_doctor_report, print_doctor_report
print_doctor_report(collect_doctor_report(), Console(width=150))
print(choose_target())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'flowturbo[cpu]'" in done.stdout
    assert "pip install 'flowturbo[export]'" in done.stdout
    assert "nothing that runs engines is installed" in done.stdout
