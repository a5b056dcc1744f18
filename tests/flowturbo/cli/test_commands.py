"""`python -m flowturbo` names the commands that there are."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import click
import pytest

from flowturbo.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[3]


def test_every_command_is_listed() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "flowturbo"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0
    scripts = dict(
        line.split(" = ")
        for line in (ROOT / "pyproject.toml")
        .read_text(encoding="utf-8")
        .partition("[project.scripts]\n")[2]
        .splitlines()
        if line.startswith("flowturbo-")
    )
    assert {name: f'"{module}:main"' for name, (module, _) in COMMANDS.items()} == scripts
    for name, (module, summary) in COMMANDS.items():
        assert name in result.stdout and module in result.stdout and summary in result.stdout
        assert isinstance(importlib.import_module(module).main, click.Command)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_module_runs_as_it_is_listed(name: str) -> None:
    words = [sys.executable, "-m", COMMANDS[name][0], "--help"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0 and "Usage:" in result.stdout


@pytest.mark.parametrize(
    ("word", "remedy"), [("run", "flowturbo-run …"), ("flowturbo-eval", "flowturbo-eval …"), ("paint", "lists")]
)
def test_a_word_is_answered_with_the_command(word: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word, "--help"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: python -m flowturbo {word}") and "Allowed: flowturbo-run" in said and remedy in said


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("flowturbo ")
