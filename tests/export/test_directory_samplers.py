"""Which samplers and which default a directory keeps when it is built again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from export.directory_samplers import SamplerSet, collect_samplers
from runtime.directory.manifest import merge_samplers, read_manifest, write_manifest
from runtime.sampling.calibrated import SAMPLER_SCHEMA, CalibratedSampler
from runtime.system.errors import RequestError


@pytest.fixture
def folder(tiny_engines: Path, tmp_path: Path) -> Path:
    """Engines with a saved sampler that is their default."""
    shutil.copytree(tiny_engines, tmp_path / "engines")
    manifest = read_manifest(tmp_path / "engines")
    sources = {"predictor": manifest.model.sources["predictor"]}
    saved = CalibratedSampler(SAMPLER_SCHEMA, "fast", "schedule", sources, grid=(0.0, 0.3, 1.0), schedule="H1P1")
    changed = merge_samplers(manifest, [saved])
    write_manifest(
        tmp_path / "engines",
        replace(changed, defaults=replace(changed.defaults, schedule="fast", solver=None, steps=None)),
    )
    return tmp_path / "engines"


def test_a_default_stays_with_its_sampler(folder: Path, tiny_engines: Path) -> None:
    keeping, fresh = collect_samplers(folder, [], None), read_manifest(tiny_engines)
    keeping.check_fits(fresh.model.sources)
    made = keeping.add_to(fresh)
    assert made.defaults.schedule == "fast" and [saved.name for saved in made.samplers] == ["fast"]


def test_an_earlier_models_default_goes_with_its_sampler(folder: Path, tiny_engines: Path) -> None:
    fresh = read_manifest(tiny_engines)
    other = replace(fresh, model=replace(fresh.model, sources={**fresh.model.sources, "predictor": "f" * 64}))
    keeping = collect_samplers(folder, [], None)
    keeping.check_fits(other.model.sources)
    made = keeping.add_to(other)
    assert made.samplers == () and made.defaults == fresh.defaults


def test_a_default_that_is_asked_for_must_fit(folder: Path) -> None:
    keeping = collect_samplers(folder, [], "fast")
    keeping.check_fits(read_manifest(folder).model.sources)
    with pytest.raises(RequestError, match="default schedule 'fast'"):
        keeping.check_fits({"predictor": "f" * 64})
    with pytest.raises(RequestError, match="default schedule 'slow'"):
        SamplerSet(default="slow").check_fits({"predictor": "f" * 64})
