"""What tests share across processes, and the list of slow tests."""

from __future__ import annotations

import ast
import multiprocessing
from pathlib import Path

import pytest
from made_once import make_once

ROOT = Path(__file__).parent.parent


class Factory:
    """The part of pytest's TempPathFactory that `make_once` needs."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def getbasetemp(self) -> Path:
        return self.base


def fill(folder: Path) -> None:
    with open(folder.parent / "count", "a") as file:
        file.write("x")
    (folder / "file").touch()


def ask(base: Path) -> None:
    folder = make_once(Factory(base), "name", fill)  # type: ignore[arg-type]
    assert (folder / "file").exists()


def test_processes_that_ask_at_once_share_what_the_first_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=ask, args=(tmp_path / f"popen-gw{i}",)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "made-once" / "count").read_text() == "x"


def test_what_failed_is_made_again_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        make_once(Factory(tmp_path), "name", fail)  # type: ignore[arg-type]
    folder = make_once(Factory(tmp_path), "name", fill)  # type: ignore[arg-type]
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert make_once(Factory(tmp_path), "name", fail) == folder  # type: ignore[arg-type]


def test_the_list_of_slow_tests_names_what_exists() -> None:
    lines = (ROOT / "tests" / "slow_tests.txt").read_text(encoding="utf-8").split()
    assert lines == sorted(set(lines))
    for line in lines:
        file, _, name = line.partition("::")
        functions = {
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert not name or name in functions, line
