"""The benchmarks run; what they find on this machine is no test."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.training import Setting, measure_speed
from flowturbo.models.sit import SiTConfig


def test_the_training_benchmark_compares_the_loops(tmp_path: Path) -> None:
    setting = Setting(SiTConfig(1, 16, 2, 2, 4), 4, "cpu", "fp32", block=2, blocks=3)
    found = measure_speed(setting, tmp_path)
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert (tmp_path / "run" / "final.safetensors").exists()
