"""The manifest is the only way in: what does not fit is refused with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.directory.manifest import MANIFEST_FILE, MANIFEST_SCHEMA, check_file, read_manifest, write_manifest
from runtime.system.errors import EngineError


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


CONTRADICTIONS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (lambda data: data.update(resolutions=[]), "names no resolution"),
    (lambda data: data.update(engines=[]), "names no engine"),
    (lambda data: data["model"].update(classes={}), "knows no class"),
    (lambda data: data.update(max_batch=0), "max_batch 0"),
    (lambda data: data["model"].update(factor=0), "0 pixels per latent"),
    (lambda data: data["files"].pop(0), "gives no hash for"),
    (lambda data: data["defaults"].update(vae="sharper"), "unknown default VAE"),
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


@pytest.mark.parametrize("path", ["../secret.onnx", "/etc/passwd", "a/../../b"])
def test_a_path_that_leaves_the_directory(folder: Path, path: str) -> None:
    change(folder, lambda data: data["files"][0].update(path=path))
    assert path in refusal(folder).given


def test_a_link_that_leaves_the_directory(tiny_engines: Path, tmp_path: Path) -> None:
    copy = tmp_path / "engines"
    shutil.copytree(tiny_engines, copy)
    inside = copy / read_manifest(copy).files[0].path
    inside.unlink()
    inside.symlink_to(tmp_path / "elsewhere.onnx")
    assert "outside" in refusal(copy).given


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
