"""Engine directories of every manifest schema that ever landed open, generate and pass their proof as they did."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from export.proof.verify import verify_directory
from runtime.directory.manifest import MANIFEST_FILE, MANIFEST_SCHEMA, read_manifest
from runtime.pipeline import Pipeline
from runtime.system.errors import EngineError

OLD_ENGINES = Path(__file__).parents[2] / "data" / "old_engines"
"""A SiT of one block with a refiner, built by the last commit of each schema: b3941bb, d8844c5, 7fa7e09, b2fdc3e, 083078a.

The ONNX files of all five differ in line numbers of stack traces only, so one set is stored, and manifests name its hashes.
"""
SCHEMAS = sorted(int(path.stem.rpartition("-")[2]) for path in OLD_ENGINES.glob("manifest-*.json"))


@pytest.fixture(params=SCHEMAS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An engine directory as it was written under one schema."""
    with zipfile.ZipFile(OLD_ENGINES / "files.zip") as archive:
        archive.extractall(tmp_path)
    shutil.copy(OLD_ENGINES / f"manifest-{request.param}.json", tmp_path / MANIFEST_FILE)
    return tmp_path


def test_every_schema_before_todays_is_stored() -> None:
    assert SCHEMAS[:5] == [1, 2, 3, 4, 5]
    assert MANIFEST_SCHEMA - SCHEMAS[-1] <= 1, "store a directory of the schema that was replaced"


def test_old_directories_are_read(folder: Path) -> None:
    written = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    manifest = read_manifest(folder)
    assert manifest.schema == written["schema"]
    assert (manifest.resolutions, manifest.max_batch, manifest.key) == ((32,), 2, written["key"])
    assert {graph.graph for graph in manifest.graphs} == {
        "conditioning", "predictor", "refiner", "refiner_conditioning",
    }  # fmt: skip
    assert (manifest.samplers, manifest.gates, manifest.defaults.schedule) == ((), (), "H1P5R3")
    assert not any(graph.computes or graph.weights or graph.pairs_fit for graph in manifest.graphs)


def test_old_directories_pass_their_proof(folder: Path) -> None:
    records, skipped = verify_directory(folder, read_manifest(folder))
    assert not skipped
    assert {record.what for record in records} == {
        "conditioning", "predictor", "refiner", "refiner_conditioning", "trajectory",
    }  # fmt: skip
    assert all(record.relative_error < 1e-5 for record in records)


def test_old_directories_generate_the_same_latents(folder: Path) -> None:
    """What 083078a makes of them, whatever is read of the manifest and however the inputs are named now."""
    with Pipeline.load(folder, threads=1) as pipeline:
        latents = pipeline.run(pipeline.request([0, 1], seeds=[5, 6], schedule="H1P5R3")).latents
    np.testing.assert_allclose(latents, np.load(OLD_ENGINES / "latents.npy"), rtol=1e-5, atol=1e-5)


def test_a_newer_schema_is_refused(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(re.sub(r'"schema": \d+', f'"schema": {MANIFEST_SCHEMA + 1}', path.read_text(), count=1))
    with pytest.raises(EngineError) as caught:
        read_manifest(folder)
    assert f"schema {MANIFEST_SCHEMA + 1}, written by a newer flowturbo" in caught.value.given
    assert caught.value.allowed == f"schema up to {MANIFEST_SCHEMA}"
