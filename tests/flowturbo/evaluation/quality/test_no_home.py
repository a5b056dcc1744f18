"""A score needs no cache: where there is no home that can be written, it is made without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[4]


def test_a_score_without_a_home(tmp_path: Path) -> None:
    for seed, name in enumerate(("a.npz", "b.npz")):
        pictures = np.random.default_rng(seed).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
        np.savez(tmp_path / name, arr_0=pictures)
    words = [
        "score",
        "a.npz",
        "--reference",
        "b.npz",
        "--features",
        "demo",
        "--metrics",
        "fid",
        "--threads",
        "1",
        "--json",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}

    def score(*extra: str) -> subprocess.CompletedProcess[str]:
        code = "from flowturbo.cli.evaluate import main; main()"
        return subprocess.run(
            [sys.executable, "-c", code, *words, *extra],
            cwd=tmp_path,
            env=environment | {"HOME": "/proc/nowhere", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    result = score()
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["count"] == 6
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]
    refused = score("--shard", "0/2")
    assert (
        refused.returncode == 1
        and "a shard without a cache folder" in refused.stderr
        and "--cache DIR" in refused.stderr
    )
