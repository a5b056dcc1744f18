"""Files that are whole or absent, hashes that are remembered, pictures, and classes as people write them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
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
from runtime.system.hashes import find_cache_folder, make_cache_folder, sha256_cached
from runtime.system.locks import lock_folder


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


def test_a_time_that_was_set_back_does_not_hide_a_change(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    before = path.stat()
    assert sha256_cached(path, tmp_path) == compute_sha256(path)
    time.sleep(0.02)  # the kernel's clock of files ticks every few milliseconds
    with open(path, "r+b") as file:
        file.write(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (before.st_mtime_ns, before.st_size, before.st_ino)
    assert sha256_cached(path, tmp_path) == compute_sha256(path)


def test_without_a_home_nothing_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for base in ("", "relative"):  # the specification says to ignore a relative one
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        monkeypatch.setattr(Path, "home", fail)
        assert find_cache_folder() is None
        assert make_cache_folder("evaluation") is None
        assert sha256_cached(path) == compute_sha256(path)
    assert os.listdir(tmp_path) == ["weights"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert make_cache_folder("evaluation") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert make_cache_folder("evaluation") == tmp_path / "flowturbo" / "evaluation"


def test_a_pipe_in_the_cache_is_no_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hashes.json")
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert sha256_cached(path, tmp_path) == compute_sha256(path)


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from runtime.system.locks import lock_folder\n"
    code += "with lock_folder(Path(sys.argv[1]), 'another run'): pass"

    def lock_elsewhere() -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)

    with lock_folder(tmp_path, "another run"):
        refused = lock_elsewhere()
        assert f"another run is writing into {tmp_path}" in refused.stderr and "Do: wait for it" in refused.stderr
    assert lock_elsewhere().returncode == 0
    assert not os.listdir(tmp_path)


def test_a_name_that_is_no_text_is_written_as_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff")
    write_json(tmp_path / "a.json", {"folder": name})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"folder": name}


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
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
     ("tabby", 281), ("tiger", 292), ("CHIHUAHUA", 151), ("golden_retriever", 207), ("Golden-Retriever", 207), ("tabby_cat", 281),
     ("n02099601", 207), ("N02099601", 207), ("n02123045", 281)],
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
     ("n99999999", "class 'n99999999'"), ("n02100583", "class 'n02100583'"), ("--207", "class '--207'"), ("_", "class '_'"),
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


def test_a_wordnet_id_needs_imagenets_classes() -> None:
    """Class 207 of another model is no golden retriever; and one whose classes are called by WordNet ids has them."""
    with pytest.raises(RequestError, match="class 'n02099601'"):
        resolve_class("n02099601", {207: "class 207"})
    assert resolve_class("n02099601", {0: "n02085620", 3: "n02099601"}) == 3


def test_names_with_hyphens_are_found_either_way() -> None:
    classes = {1: "black-and-tan coonhound", 2: "black_footed ferret"}
    for text in ("black-and-tan coonhound", "black and tan coonhound", "black_and_tan_coonhound"):
        assert resolve_class(text, classes) == 1
    assert resolve_class("black-footed ferret", classes) == resolve_class("black_footed ferret", classes) == 2
