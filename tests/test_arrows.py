"""Imports point one way only, runtime ← flowturbo ← export ← calibration, and what generates needs no torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
ORDER = ("runtime", "flowturbo", "export", "calibration")
"""Each may import itself and those to its left."""
HEAVY = ("torch", "onnx", "onnxscript", "diffusers", "transformers")
"""Never in the runtime, directly or through anything."""

FOLDERS: dict[str, tuple[set[str], ...]] = {
    "runtime": ({"system"}, {"sampling"}, {"directory"}, {"backends"}, {"execution"}, {""}, {"cli"}),
    "export": ({"tensorrt"}, {"graphs"}, {"lowbit", "", "proof"}, {"cli"}),
    "calibration": ({""}, {"samplers"}, {"lowbit"}, {"cli"}),
}
"""Folders of a package from the bottom up, "" for the files at its top. Each may import its own level and those below."""
NEEDS_TORCH = {"flowturbo.evaluation.quality.convert_extractor", "flowturbo.evaluation.speed.torch_baseline"}
"""The modules of flowturbo.evaluation that a machine without torch cannot import."""

REFUSE = f"""
import importlib.machinery, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        raise ImportError(spec.name + " is refused by this test")

    def exec_module(self, module): ...

sys.meta_path.insert(0, Refuse())
"""


def list_imports(source: str) -> Iterator[str]:
    """Top-level names of everything that a module imports, wherever it does so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value.partition(".")[0]


def find_forbidden_imports(package: str, source: str) -> set[str]:
    forbidden = {*ORDER[ORDER.index(package) + 1 :], "tests", *(HEAVY if package == "runtime" else ())}
    return forbidden & set(list_imports(source))


def list_folder_imports(package: str, source: str) -> Iterator[str]:
    """Folders of its own package that a module imports from, "" for the package's top; types alone do not count."""
    tree = ast.parse(source)
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {id(node) for guard in guards for statement in guard.body for node in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1:
                yield parts[1] if (ROOT / package / parts[1]).is_dir() else ""


def find_upward_imports(package: str, folder: str, source: str) -> set[str]:
    """Folders above `folder` that a module there imports from."""
    levels = FOLDERS[package]
    level = next(i for i, names in enumerate(levels) if folder in names)
    return set(list_folder_imports(package, source)) & set().union(*levels[level + 1 :])


def fresh(code: str, *, refuse: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs code in an interpreter of its own, in which importing what is heavy raises."""
    program = (REFUSE if refuse else "") + code
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)


def check_success(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in files
        if (found := find_forbidden_imports(package, path.read_text()))
    }
    assert not wrong


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_point_down_inside_a_package(package: str) -> None:
    folders = {path.name for path in (ROOT / package).iterdir() if list(path.glob("*.py"))}
    assert folders == set().union(*FOLDERS[package]) - {""}, "a folder without a place in the order"
    wrong = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        place = path.relative_to(ROOT / package).parts
        if found := find_upward_imports(package, place[0] if len(place) > 1 else "", path.read_text()):
            wrong[str(path.relative_to(ROOT))] = found
    assert not wrong


@pytest.mark.parametrize(
    ("folder", "source", "found"),
    [
        ("system", "from runtime.sampling.plan import Plan", {"sampling"}),
        ("backends", "import runtime.execution.tiling", {"execution"}),
        ("execution", "def f():\n    from runtime import pipeline, images", {""}),
        ("", "from runtime.cli import run\nfrom runtime.system import files", {"cli"}),
        ("cli", "from runtime.pipeline import Pipeline", set()),
        ("system", "if TYPE_CHECKING:\n    from runtime.pipeline import Pipeline", set()),
    ],
)
def test_an_import_upwards_is_seen(folder: str, source: str, found: set[str]) -> None:
    assert find_upward_imports("runtime", folder, source) == found


@pytest.mark.parametrize(
    ("package", "source", "found"),
    [
        ("runtime", "def f():\n    import torch.nn", {"torch"}),
        ("runtime", "from flowturbo.data.photographs import x", {"flowturbo"}),
        ("runtime", "importlib.import_module('onnx.helper')", {"onnx"}),
        ("runtime", "if TYPE_CHECKING:\n    from export import build", {"export"}),
        ("flowturbo", "import torch, export.cli.export", {"export"}),
        ("export", "from calibration import int8", {"calibration"}),
    ],
)
def test_an_import_against_the_arrows_is_seen(package: str, source: str, found: set[str]) -> None:
    assert find_forbidden_imports(package, source) == found


@pytest.mark.parametrize(
    "module",
    [
        "runtime.pipeline",
        "runtime.cli.run",
        "flowturbo.cli.bench",
        "flowturbo",
        "flowturbo.demo",
        "flowturbo.cli.evaluate",
        "export.cli.export",
    ],
)
def test_imports_without_torch(module: str) -> None:
    check_success(fresh(f"import {module}"))


def test_evaluation_imports_without_torch() -> None:
    """All of it but for what converts or runs torch networks, in one interpreter."""
    files = (ROOT / "flowturbo" / "evaluation").rglob("*.py")
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    assert modules > NEEDS_TORCH
    check_success(fresh("\n".join(f"import {module}" for module in sorted(modules - NEEDS_TORCH))))
    for module in NEEDS_TORCH:
        assert "is refused by this test" in fresh(f"import {module}").stderr


def test_the_refusal_refuses() -> None:
    run = fresh("import flowturbo.checkpoints")
    assert run.returncode == 1
    assert "torch is refused by this test" in run.stderr


def test_importing_the_public_api_imports_nothing_heavy() -> None:
    heavy = (*HEAVY, "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "matplotlib", "scipy", "requests")
    code = f"from flowturbo import Pipeline\nimport sys\nprint([name for name in {heavy!r} if name in sys.modules])"
    assert check_success(fresh(code, refuse=False)).strip() == "[]"


def test_generates_without_torch(tiny_engines: Path, tmp_path: Path) -> None:
    arguments = ["--engine", str(tiny_engines), "--class", "1", "--out", str(tmp_path)]
    check_success(fresh(f"from runtime.cli.run import main\nmain({arguments})"))
    assert (tmp_path / "class1-seed0.png").stat().st_size > 0


def test_the_public_pipeline_generates_without_torch(tiny_engines: Path) -> None:
    code = (
        "from flowturbo import Pipeline\n"
        f"with Pipeline.load({str(tiny_engines)!r}) as pipeline:\n"
        "    print(pipeline.generate([1, 2], schedule='H1P1').shape)"
    )
    assert check_success(fresh(code)).strip() == "(2, 32, 32, 3)"


def test_pictures_are_judged_without_torch(tmp_path: Path) -> None:
    """By the demo's extractor against the demo's reference: what a fresh machine can do."""
    g = np.random.Generator(np.random.Philox(0))
    for i in range(5):
        Image.fromarray(g.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(tmp_path / f"{i}.png")
    words = ["score", str(tmp_path), "--reference", "demo", "--cache", str(tmp_path / "cache"), "--json"]
    found = json.loads(check_success(fresh(f"from flowturbo.cli.evaluate import main\nmain({words})")))
    assert set(found["metrics"]) == {"fid", "sfid", "inception_score", "precision", "recall", "kid"}


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_directory_is_read_and_proved_again_without_torch(command: str, tiny_engines: Path) -> None:
    check_success(fresh(f"from export.cli.export import main\nmain([{command!r}, {str(tiny_engines)!r}])"))


def test_doctor_runs_without_torch() -> None:
    check_success(fresh("from export.cli.export import main\nmain(['doctor', '--json'])"))
