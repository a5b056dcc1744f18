"""Directories from before manifest schema 6: their files have the former names of the contract, and run as they are."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from export.cli.export import main as export_main
from export.proof.verify import PROOF_FILE, verify_directory
from runtime.directory.contract import FORMER_NAMES, build_trunk_spec, match_names, rename_former
from runtime.directory.manifest import FileRecord, read_manifest, write_manifest
from runtime.pipeline import Pipeline
from runtime.system.files import compute_sha256


def write_former_directory(source: Path, out: Path) -> Path:
    """Copy an engine directory and give its tensors, in ONNX files and proof, the names they had before schema 6."""
    shutil.copytree(source, out)
    manifest = read_manifest(out)
    for graph in manifest.graphs:
        model = onnx.load(str(out / graph.path), load_external_data=False)
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [FORMER_NAMES.get(name, name) for name in names]
        for value in (*model.graph.input, *model.graph.output):
            value.name = FORMER_NAMES.get(value.name, value.name)
        onnx.save(model, str(out / graph.path))
    with np.load(out / PROOF_FILE, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    hashes = {path: compute_sha256(out / path) for path in json.loads(str(arrays["hashes"]))}
    former = {"/".join([*key.split("/")[:-1], FORMER_NAMES.get(key.split("/")[-1], key.split("/")[-1])]): array
              for key, array in arrays.items()}  # fmt: skip
    buffer = io.BytesIO()
    np.savez(buffer, **{**former, "hashes": np.asarray(json.dumps(hashes))})
    (out / PROOF_FILE).write_bytes(buffer.getvalue())
    files = tuple(
        FileRecord(record.path, compute_sha256(out / record.path), (out / record.path).stat().st_size)
        for record in manifest.files
    )
    write_manifest(out, replace(manifest, schema=5, files=files))
    return out


@pytest.fixture(scope="module")
def former(tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_former_directory(tiny_engines, tmp_path_factory.mktemp("former") / "engines")


def test_a_file_is_matched_by_all_its_names_or_not_at_all() -> None:
    spec = build_trunk_spec(4, 8, 6, refiner=True)
    names = [*spec.inputs, *spec.outputs]
    assert match_names(spec, names) == {name: name for name in names}
    former_names = [FORMER_NAMES.get(name, name) for name in reversed(names)]
    assert match_names(spec, former_names) == {name: FORMER_NAMES.get(name, name) for name in names}
    assert match_names(spec, [*names[1:], "pair"]) is None
    assert [rename_former(name) for name in ("pair", "a", "mods")] == ["row_image", "point_coef", "mods"]


def test_its_pictures_are_the_same(former: Path, tiny_engines: Path) -> None:
    for options in ({"schedule": "H1P5R3"}, {"adaptive": "lte"}):
        latents = []
        for folder in (tiny_engines, former):
            with Pipeline.load(folder, provider="cpu", threads=1) as pipeline:
                latents.append(pipeline.run(pipeline.request([1, 2], guidance=2.0, **options)).latents)
        np.testing.assert_array_equal(*latents)


def test_it_is_proved_again(former: Path) -> None:
    records, skipped = verify_directory(former, read_manifest(former))
    assert records and not skipped


def test_its_onnx_files_become_engines(former: Path, tmp_path: Path) -> None:
    """TensorRT-RTX's parser reads the former names, and the engine has today's."""
    pytest.importorskip("tensorrt_rtx")
    words = ["build-engines", "--from", str(former), "--target", "rtx", "--precision", "fp32", "--out", str(tmp_path)]
    done = CliRunner().invoke(export_main, [*words[:-1], str(tmp_path / "engines")])
    assert done.exit_code == 0, done.output
    assert {engine.target for engine in read_manifest(tmp_path / "engines").engines} == {"cpu", "rtx"}
