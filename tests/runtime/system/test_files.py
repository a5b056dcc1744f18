"""Files that are whole or absent, hashes that are remembered, pictures, and classes as people write them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.classes import resolve_class
from runtime.images import build_image_grid, convert_to_uint8, save_png
from runtime.system.errors import OutputError, RequestError
from runtime.system.files import (
    check_output_file,
    compute_sha256,
    make_folder,
    report_write_errors,
    write_atomically,
    write_json,
)
from runtime.system.hashes import sha256_cached


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with write_atomically(path) as aside:
        aside.write_text("half")
        assert not path.exists()
        aside.write_text("whole")
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with write_atomically(path) as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(OutputError if error is OSError else error):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "full").touch()
    for path in (tmp_path / "nowhere" / "a.json", tmp_path / "folder", Path("."), Path("/proc/a.json")):
        with pytest.raises(OutputError) as caught:
            write_json(path, {})
        assert str(path) in caught.value.given
        assert caught.value.remedy
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "nan.json", {"a": float("nan")})  # no JSON that others cannot read
    assert os.listdir(tmp_path) == ["folder"]


def test_folders(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(tmp_path / "a").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot make the folder"):
        make_folder(tmp_path / "file")


def test_a_hash_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path, cache = tmp_path / "weights", tmp_path / "cache"
    path.write_bytes(b"one")
    first = sha256_cached(path, cache)
    assert first == compute_sha256(path)
    known = json.loads((cache / "hashes.json").read_text())
    assert list(known.values()) == [first]
    (cache / "hashes.json").write_text(json.dumps(dict.fromkeys(known, "remembered")))
    assert sha256_cached(path, cache) == "remembered"
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert sha256_cached(path, cache) == compute_sha256(path)
    copy = tmp_path / "copy"
    copy.write_bytes(b"two")
    assert sha256_cached(copy, cache) == compute_sha256(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1}'])
def test_a_damaged_cache_is_no_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "hashes.json").write_text(content)
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert sha256_cached(path, tmp_path) == compute_sha256(path)
    assert sha256_cached(path, tmp_path) == compute_sha256(path)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert sha256_cached(tmp_path / "file", tmp_path / "file") == compute_sha256(tmp_path / "file")


def test_a_result_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_output_file(tmp_path / "new" / "a.json", suffixes=(".json",), reserved=[tmp_path / "file"])
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())
    for path in (tmp_path, tmp_path / "new" / ".." / "file"):
        with pytest.raises(OutputError) as refused:
            check_output_file(path, option="--out", reserved=[tmp_path / "file"])
        assert refused.value.given == f"--out cannot write {path}"
        assert (refused.value.allowed, refused.value.remedy) == ("a file of its own", "name another file")
    with pytest.raises(OutputError, match=r"ends in \.png, \.svg"):
        check_output_file(tmp_path / "a.json", suffixes=(".png", ".svg"))
    with pytest.raises(OutputError, match="cannot make the folder"):
        check_output_file(tmp_path / "file" / "a.json")
    with pytest.raises(OutputError, match=r"cannot write into|cannot make"):
        check_output_file(Path("/proc/self/a.json"))


def test_pictures_are_rounded_and_turned() -> None:
    images = np.zeros((1, 3, 1, 4), np.float32)
    images[0, :, 0] = [[0, 0.5, 1, 2], [-1, 1 / 255, 0.499 / 255, 0.501 / 255], [0.25, 0.75, 0.1, 0.9]]
    assert convert_to_uint8(images)[0, 0].tolist() == [[0, 0, 64], [128, 1, 191], [255, 0, 26], [255, 1, 230]]


def test_a_picture_carries_its_facts(tmp_path: Path) -> None:
    picture = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    save_png(tmp_path / "a.png", picture, {"seed": 7, "class": "Schäferhund"})
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), picture)
        assert (image.info["seed"], image.info["class"]) == ("7", "Schäferhund")


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(1, None, (2, 3)), (3, None, (4, 6)), (5, None, (4, 9)), (5, 5, (2, 15))]
)
def test_grids(count: int, columns: int | None, shape: tuple[int, int]) -> None:
    sheet = build_image_grid([np.full((2, 3, 3), i, np.uint8) for i in range(count)], columns)
    assert sheet.shape == (*shape, 3)
    assert {int(value) for value in np.unique(sheet)} == {
        *range(count),
        *([255] if shape[0] * shape[1] > 6 * count else []),
    }


CLASSES = {
    151: "Chihuahua",
    207: "golden retriever",
    208: "Labrador retriever",
    281: "tabby, tabby cat",
    282: "tiger cat",
    292: "tiger, Panthera tigris",
}


@pytest.mark.parametrize(
    ("text", "label"),
    [(207, 207), ("207", 207), (" 207 ", 207), ("golden retriever", 207), ("Golden Retriever", 207), ("golden", 207), ("tabby cat", 281),
     ("tabby", 281), ("tiger", 292), ("CHIHUAHUA", 151)],
)  # fmt: skip
def test_classes_as_people_write_them(text: str | int, label: int) -> None:
    assert resolve_class(text, CLASSES) == label


def test_a_word_that_is_an_index_and_another_classs_name_is_never_guessed() -> None:
    classes = dict(enumerate(["0", "1", "10", "11", "2"]))  # folders that were sorted as text
    with pytest.raises(RequestError, match=r"index 2 \(10\) or the name 2 \(index 4\)") as caught:
        resolve_class("2", classes)
    assert caught.value.allowed
    assert "2/ or 10/" in caught.value.remedy
    assert [resolve_class(word, classes) for word in ("2/", "10/", "10", "1", 2)] == [4, 2, 2, 1, 2]


@pytest.mark.parametrize(
    ("text", "given"),
    [("retriever", "207 golden retriever, 208 Labrador retriever"), ("3", "class 3"), ("-207", "class -207"), ("cat", "281 tabby"),
     ("chihuaha", "did you mean 'chihuahua'"), ("", "class ''"), ("2O7", "class '2O7'"), ("٢٠٧", "class '٢٠٧'"), ("1e2", "class '1e2'")],
)  # fmt: skip
def test_classes_that_are_none(text: str, given: str) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_class(text, CLASSES)
    assert given in caught.value.given
    assert "207 golden retriever" in caught.value.allowed or "index" in caught.value.remedy


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left" })'), "No space left"),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data.pkl"), "could not be written"),
        (OSError("no number"), "no number"),
    ],
)
def test_every_librarys_failed_write_is_an_output_error(tmp_path: Path, error: Exception, reason: str) -> None:
    with pytest.raises(OutputError) as caught, write_atomically(tmp_path / "a"):
        raise error
    assert str(tmp_path / "a") in caught.value.given
    assert reason in caught.value.given
    assert "free space" in caught.value.remedy


def test_a_full_device_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device"), report_write_errors(Path("/dev/full")):
        Path("/dev/full").write_bytes(b"x")
