"""Every script of examples/ runs, as a reader runs it: in a process of its own, on an engine directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 40
LAST_LINES = {
    "add_a_backend": "'predictor': 4",
    "class_mixtures_and_seeds": "mixtures.png: first row one seed in four classes",
    "compare_samplers": "ms per image",
    "generate": "seed1.png",
    "own_noise_and_latents": "distance from the noise that we began with",
    "progress_callback": "the next picture: (1, 32, 32, 3)",
}
"""What the last line of each script's output holds."""


def run_example(script: Path, folder: Path, *words: object) -> str:
    """Run a script in a folder and return what it printed."""
    command = [sys.executable, "-W", "error", str(script), *map(str, words)]
    run = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_all_examples_are_known() -> None:
    assert {script.stem for script in EXAMPLES} == set(LAST_LINES)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(script: Path, tiny_engines: Path, tmp_path: Path) -> None:
    assert LAST_LINES[script.stem] in run_example(script, tmp_path, tiny_engines).splitlines()[-1]
    assert len(script.read_text().splitlines()) <= MAX_LINES


def test_a_callback_stops_a_run_in_time(tiny_engines: Path, tmp_path: Path) -> None:
    assert "stopped: the budget is over" in run_example(
        ROOT / "examples" / "progress_callback.py", tmp_path, tiny_engines, 0
    )
