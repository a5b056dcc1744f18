"""`verify` finds what was altered, and refuses a proof that is damaged or proves less than there is."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.proof import verify
from export.proof.verify import check_hashes
from runtime.directory.manifest import MANIFEST_FILE, PROOF_FILE, read_manifest
from runtime.directory.records import FileRecord
from runtime.system.errors import EngineError, FlowTurboError, ProofError

ENGINE = "32/fp32/predictor.onnx"


@pytest.fixture
def copy(tiny_engines: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_engines, tmp_path / "engines"))


def rewrite_manifest(folder: Path, changed: str) -> None:
    """Let the manifest agree with a file that was changed."""
    path = folder / MANIFEST_FILE
    data = json.loads(path.read_text(encoding="utf-8"))
    content = (folder / changed).read_bytes()
    for record in data["files"]:
        if record["path"] == changed:
            record.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    path.write_text(json.dumps(data), encoding="utf-8")


def change_proof(folder: Path, how: Callable[[dict[str, Any]], None]) -> None:
    with np.load(folder / PROOF_FILE) as archive:
        arrays = dict(archive)
    how(arrays)
    np.savez(folder / PROOF_FILE, **arrays)
    rewrite_manifest(folder, PROOF_FILE)


def refuse(folder: Path) -> FlowTurboError:
    with pytest.raises(FlowTurboError) as caught:
        check_hashes(folder, read_manifest(folder))
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("hashes", "said"),
    [
        ("{}", "is not among the files that were proved"),
        ("[]", "no JSON object"),
        ("", "no JSON object"),
        ("[" * 5000, "nested"),
    ],
)
def test_a_proof_names_every_file(copy: Path, hashes: str, said: str) -> None:
    change_proof(copy, lambda arrays: arrays.update(hashes=np.asarray(hashes)))
    assert said in refuse(copy).given


def test_a_rewritten_manifest_does_not_hide_altered_weights(copy: Path) -> None:
    path = copy / ENGINE
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    rewrite_manifest(copy, ENGINE)
    assert isinstance(refuse(copy), ProofError)


def test_a_proof_without_an_array(copy: Path) -> None:
    change_proof(copy, lambda arrays: arrays.pop("hashes"))
    assert "has no array hashes" in refuse(copy).given


def write_bad_header(path: Path) -> None:
    np.savez(path, a=np.zeros(3))
    path.write_bytes(path.read_bytes().replace(b"descr", b"de(cr"))


def write_bomb(path: Path) -> None:
    """A few megabytes that unpack to more than a proof may have."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w", force_zip64=True) as file,
    ):
        for _ in range(65):
            file.write(bytes(1 << 20))


def write_claim(path: Path) -> None:
    """An array whose header claims 4 exabytes."""
    np.savez(path, a=np.zeros((1, 4), np.float32))
    content = path.with_suffix(".npz").read_bytes()
    with zipfile.ZipFile(path) as archive:
        header = archive.read("a.npy").replace(b"(1, 4), }" + b" " * 18, b"(1000000000, 1000000000), }")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header)
    assert content


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no archive"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "middle": lambda path: path.write_bytes(path.read_bytes()[:5000] + bytes(3000) + path.read_bytes()[8000:]),
    "objects": lambda path: np.savez(path, hashes=np.asarray([{}, print], dtype=object)),
    "header": write_bad_header,
    "bomb": write_bomb,
    "claim": write_claim,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_proof_is_refused(copy: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "MAX_PROOF_BYTES", 64 << 20)
    DAMAGES[name](copy / PROOF_FILE)
    rewrite_manifest(copy, PROOF_FILE)
    error = refuse(copy)
    assert isinstance(error, EngineError) and "cannot be read" in error.given


def test_graphs_that_were_never_proved(copy: Path) -> None:
    """A file with its hash in the manifest alone."""
    manifest = read_manifest(copy)
    shutil.copy(copy / ENGINE, copy / "32/fp32/other.onnx")
    record = manifest.find_file(ENGINE)
    graph = replace(manifest.graphs[0], path="32/fp32/other.onnx", resolution=64)
    manifest = replace(
        manifest,
        files=(*manifest.files, FileRecord(graph.path, record.sha256, record.bytes)),
        graphs=(*manifest.graphs, graph),
    )
    with pytest.raises(ProofError, match=r"other\.onnx is not among"):
        check_hashes(copy, manifest)
