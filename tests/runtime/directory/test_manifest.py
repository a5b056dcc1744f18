"""The manifest is the only way in: what does not fit is refused with what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.proof.verify import verify_directory
from runtime.directory.manifest import MANIFEST_FILE, MANIFEST_SCHEMA, check_file, read_manifest, write_manifest
from runtime.pipeline import Pipeline
from runtime.system.errors import EngineError
from runtime.system.files import MAX_JSON_BYTES, compute_sha256


@pytest.fixture
def folder(tiny_engines: Path, tmp_path: Path) -> Path:
    """The manifest of a real directory, alone in a folder of its own."""
    shutil.copy(tiny_engines / MANIFEST_FILE, tmp_path / MANIFEST_FILE)
    return tmp_path


def change(folder: Path, how: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    how(data)
    (folder / MANIFEST_FILE).write_text(json.dumps(data), encoding="utf-8")


def refusal(folder: Path) -> EngineError:
    with pytest.raises(EngineError) as caught:
        read_manifest(folder)
    assert caught.value.remedy
    return caught.value


def test_reads_what_was_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
    write_manifest(folder, manifest)
    assert (folder / MANIFEST_FILE).read_text(encoding="utf-8") == text
    assert read_manifest(folder) == manifest


def test_an_unknown_key_is_named(folder: Path) -> None:
    change(folder, lambda data: data["model"].update(colour="red"))
    assert "manifest.model has unknown keys: colour" in refusal(folder).given


def test_a_missing_key_is_named(folder: Path) -> None:
    change(folder, lambda data: data["engines"][0].pop("path"))
    assert "manifest.engines[0] lacks path" in refusal(folder).given


WRONG_CLAIMS = ("fp16", "bf16", "int8", "int8-weights", "int4-weights")


def claim_precision(precision: str) -> Callable[[dict[str, Any]], None]:
    def change_engines(data: dict[str, Any]) -> None:
        for engine in data["engines"]:
            engine["precision"] = precision

    return change_engines


CONTRADICTIONS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (lambda data: data.update(resolutions=[]), "names no resolution"),
    (lambda data: data.update(engines=[]), "names no engine"),
    (lambda data: data["model"].update(classes={}), "knows no class"),
    (lambda data: data.update(max_batch=0), "max_batch 0"),
    (lambda data: data["model"].update(factor=0), "0 pixels per latent"),
    (lambda data: data["files"].pop(0), "gives no hash for"),
    (lambda data: data["defaults"].update(vae="sharper"), "unknown default VAE"),
    (lambda data: data.update(schema=-1), "schema -1"),
    (lambda data: data.update(max_batch=10**9), "max_batch 1000000000"),
    (lambda data: data.update(resolutions=[32, 32]), "names a resolution twice"),
    (lambda data: data.update(resolutions=[10**9]), "has the resolutions 1000000000"),
    (lambda data: data["model"].update(channels=10**6), "1000000 latent channels"),
    (lambda data: data["model"]["modulations"].update(predictor=0), "gives a network no modulations"),
    (lambda data: data["model"].update(null_label=10**12), "null label 1000000000000"),
    (lambda data: data["model"]["classes"].update({"-5": "below"}), "knows classes below 0"),
    (lambda data: data.update(notes=["x" * 20_000]), "has a note of more than"),
    (lambda data: data["engines"].extend(data["engines"] * 2000), "more than 10000 records"),
    (lambda data: data["proofs"][0].update(relative_error=99.0), "misses its own tolerance"),
    *((claim_precision(claim), f" {claim}, and its graph fp32") for claim in WRONG_CLAIMS),
]


@pytest.mark.parametrize(("how", "said"), CONTRADICTIONS, ids=[said for _, said in CONTRADICTIONS])
def test_a_manifest_that_contradicts_itself(folder: Path, how: Callable[[dict[str, Any]], None], said: str) -> None:
    change(folder, how)
    assert said in refusal(folder).given


def test_a_manifest_from_the_future(folder: Path) -> None:
    change(folder, lambda data: data.update(schema=MANIFEST_SCHEMA + 1, flowturbo="9.0", new_idea=1))
    error = refusal(folder)
    assert "9.0" in error.given
    assert f"up to {MANIFEST_SCHEMA}" in error.allowed
    assert "upgrade" in error.remedy


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.999])
def test_a_cut_manifest(folder: Path, fraction: float) -> None:
    whole = (folder / MANIFEST_FILE).read_bytes()
    (folder / MANIFEST_FILE).write_bytes(whole[: int(len(whole.rstrip()) * fraction)])
    assert "damaged" in refusal(folder).given


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"null", b"[]", b'"text"', b"{}", b"3"])
def test_what_is_no_manifest(folder: Path, content: bytes) -> None:
    (folder / MANIFEST_FILE).write_bytes(content)
    assert "damaged" in refusal(folder).given


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    assert "no engine directory" in refusal(tmp_path / "nowhere").given
    assert "not a finished engine directory" in refusal(tmp_path).given


@pytest.mark.parametrize(
    "path", ["../secret.onnx", "/etc/passwd", "a/../../b", "a/..", "..", "C:\\x", "a\\..\\..\\b", "~/x"]
)
def test_a_path_that_leaves_the_directory(folder: Path, path: str) -> None:
    change(folder, lambda data: data["files"][0].update(path=path))
    error = refusal(folder)
    assert repr(path) in error.given and "outside" in error.given
    assert error.allowed == "relative names inside the directory"


@pytest.mark.parametrize("path", ["", ".", "a" * 256 + ".onnx", "a/" * 3000 + "b", "a\0b", "\ud800.onnx"])
def test_a_path_that_no_file_can_have(folder: Path, path: str) -> None:
    change(folder, lambda data: data["files"][0].update(path=path))
    assert "which" in refusal(folder).given


def make_hub_layout(engines: Path, hub: Path) -> Path:
    """Store a directory as the Hugging Face cache does: files by hash, and a snapshot of relative links."""
    snapshot = hub / "snapshots" / "0123abcd"
    (hub / "blobs").mkdir(parents=True)
    for path in (path for path in engines.rglob("*") if path.is_file()):
        blob = hub / "blobs" / compute_sha256(path)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(engines)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_directory_of_links_works(tiny_engines: Path, tmp_path: Path) -> None:
    snapshot = make_hub_layout(tiny_engines, tmp_path / "hub")
    assert read_manifest(snapshot) == read_manifest(tiny_engines)
    with Pipeline.load(tiny_engines, threads=1) as real, Pipeline.load(snapshot, threads=1) as linked:
        np.testing.assert_array_equal(linked.generate([1]), real.generate([1]))
    records, skipped = verify_directory(snapshot, read_manifest(snapshot))
    assert records and not skipped


def test_a_link_leads_to_the_file_that_was_hashed(tiny_engines: Path, tmp_path: Path) -> None:
    snapshot = make_hub_layout(tiny_engines, tmp_path / "hub")
    record = read_manifest(snapshot).find_file("32/fp32/predictor.onnx")
    blob = (snapshot / record.path).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineError, match="altered or damaged"):
        Pipeline.load(snapshot, threads=1)
    blob.unlink()
    with pytest.raises(EngineError, match="is a link to a file that is missing"):
        check_file(snapshot, record)


def test_what_is_no_file_is_not_read(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    whole = path.read_text(encoding="utf-8")
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()):
        path.unlink()
        make(path)
        error = refusal(folder)
        assert "no regular file" in error.given
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_text(whole)
    with open(path, "r+b") as file:
        file.truncate(1 << 40)
    assert f"more than {MAX_JSON_BYTES}" in refusal(folder).given


@pytest.mark.parametrize(
    "content",
    ['{"a": ' + "[" * 1000 + "]" * 1000 + "}", "[" * 100_000, '{"a": ' * 80 + "1" + "}" * 80],
    ids=["1000 deep", "cut", "80 deep"],
)
def test_a_nested_manifest(folder: Path, content: str) -> None:
    (folder / MANIFEST_FILE).write_text(content)
    assert "nested" in refusal(folder).given


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 400, "1e999", "-Infinity", "NaN"])
def test_numbers_that_are_none(folder: Path, number: str) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(re.sub(r'"guidance": [0-9.]+', f'"guidance": {number}', path.read_text(), count=1))
    assert "damaged" in refusal(folder).given


def test_a_file_must_be_the_one_that_was_written(tiny_engines: Path, tmp_path: Path) -> None:
    copy = tmp_path / "engines"
    shutil.copytree(tiny_engines, copy)
    record = read_manifest(copy).files[0]
    path = copy / record.path
    whole = path.read_bytes()
    assert check_file(copy, record) == path
    path.write_bytes(whole[:-1])
    with pytest.raises(EngineError, match=f"{len(whole) - 1} bytes"):
        check_file(copy, record)
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(EngineError, match="altered or damaged"):
        check_file(copy, record)
    assert check_file(copy, record, check_hash=False) == path
    path.unlink()
    with pytest.raises(EngineError, match="missing"):
        check_file(copy, record)


def test_a_file_that_the_manifest_does_not_name_is_not_trusted(tiny_engines: Path) -> None:
    with pytest.raises(EngineError, match="not in the manifest"):
        read_manifest(tiny_engines).find_file("32/fp32/other.onnx")
