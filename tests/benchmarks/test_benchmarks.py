"""The benchmarks run; what they find on this machine is no test."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks.quantization_page import write_page
from benchmarks.training import Setting, measure_speed
from flowturbo.models.sit import SiTConfig


def test_the_training_benchmark_compares_the_loops(tmp_path: Path) -> None:
    setting = Setting(SiTConfig(1, 16, 2, 2, 4), 4, "cpu", "fp32", block=2, blocks=3)
    found = measure_speed(setting, tmp_path)
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert (tmp_path / "run" / "final.safetensors").exists()


def test_the_page_of_low_precision_says_what_its_numbers_say(tmp_path: Path) -> None:
    """It is written by `python -m benchmarks.quantization`, and by `--again` from the numbers beside it."""
    docs = Path(__file__).parents[2] / "docs"
    numbers = json.loads((docs / "quantization.json").read_text(encoding="utf-8"))
    write_page(tmp_path / "page.md", numbers)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == (docs / "quantization.md").read_text(encoding="utf-8")
    gate = numbers["builds"]["int8"]["gate"]
    assert f"{gate['twin_ms'] / gate['evaluation_ms']:.2f} ×" in (tmp_path / "page.md").read_text(encoding="utf-8")
