"""The page that compares refiners; the measuring itself is the evaluation suite's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.refiners import RefinerResult, format_refiner_page, parse_refiner
from runtime.system.errors import RequestError


def line(refiner: str, schedule: str, rms: float, psnr: float, kid: float, guidance: float = 4) -> RefinerResult:
    values = {"latent_rms": rms, "psnr_db": psnr, "kid": kid}
    return RefinerResult(refiner, "released", schedule, guidance, values)


def test_the_best_of_each_schedule_is_marked() -> None:
    lines = [
        line("none", "H1P5", 0.2, 30, 0.05),
        line("a", "H1P5R3", 0.1, 33, 0.06),
        line("b", "H1P5R3", 0.15, 34, 0.07),
        line("a", "H2P8R2", 0.5, 20, 0.5),
        line("a", "H1P5R3", 0.3, 25, 0.1, guidance=1),
    ]
    text = format_refiner_page(lines, 256, "the command")
    assert "| none | released | H1P5 | 0.2000 | 30.0 | **0.0500** |" in text
    assert "| a | released | H1P5R3 | **0.1000** | 33.0 | 0.0600 |" in text
    assert "| b | released | H1P5R3 | 0.1500 | **34.0** | 0.0700 |" in text
    assert "| a | released | H2P8R2 | **0.5000** | **20.0** | **0.5000** |" in text
    assert text.index("## Guidance 4") < text.index("## Guidance 1")
    assert "the command" in text and "256 images" in text


def test_a_refiner_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.safetensors").touch()
    assert parse_refiner(f"clamped={tmp_path / 'r.safetensors'}") == ("clamped", tmp_path / "r.safetensors")
    for wrong in (str(tmp_path / "r.safetensors"), "clamped=nowhere"):
        with pytest.raises(RequestError, match="NAME=FILE"):
            parse_refiner(wrong)
