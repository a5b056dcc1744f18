"""The one reader of picture files: formats, sizes, colours, orientation, and which files are pictures."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import picture_files
from runtime.picture_files import convert_to_rgb, list_pictures, open_picture, read_picture
from runtime.system.errors import DataError

RED, WHITE = (200, 10, 20), (255, 255, 255)


def write_png_header(path: Path, width: int, height: int) -> None:
    """Write a PNG of one chunk of zeros that claims a size."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")
    )  # fmt: skip
    packed = (struct.pack(">I", len(b)) + t + b + struct.pack(">I", zlib.crc32(t + b)) for t, b in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def test_postscript_named_png_runs_no_program(tmp_path: Path) -> None:
    """Pillow goes by content and starts `gs`, here a stand-in that leaves a mark."""
    (tmp_path / "bin").mkdir()
    program, mark = tmp_path / "bin" / "gs", tmp_path / "mark"
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo 10.0; exit 0; }}\necho "$@" >> {mark}\nexit 1\n')
    program.chmod(0o755)
    picture = tmp_path / "holiday.png"
    picture.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(x) run\n")
    code = (
        "import sys; from pathlib import Path; from runtime.picture_files import read_picture\n"
        "from runtime.system.errors import DataError\n"
        "try: read_picture(Path(sys.argv[1]))\nexcept DataError as error: print(error)"
    )
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(picture)], capture_output=True, text=True, env=environment, timeout=60
    )
    assert "none of these formats" in run.stdout, run.stderr
    assert not mark.exists()


@pytest.mark.parametrize("suffix", ["gif", "tif", "eps", "pdf", "ppm", "ico"])
def test_other_formats_are_refused_by_content(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (32, 32), RED).save(tmp_path / f"a.{suffix}")
    (tmp_path / f"a.{suffix}").rename(tmp_path / "a.png")
    with pytest.raises(DataError, match="none of these formats") as caught:
        open_picture(tmp_path / "a.png")
    assert "JPEG, PNG, WebP or BMP" in caught.value.allowed
    assert caught.value.remedy


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "PNG"])
def test_the_formats_of_the_list_are_read(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (8, 6), RED).save(tmp_path / f"a.{suffix}")
    pixels = read_picture(tmp_path / f"a.{suffix}")
    assert pixels.shape == (6, 8, 3)
    assert np.abs(pixels.astype(int) - RED).max() < 12
    assert list_pictures(tmp_path) == [tmp_path / f"a.{suffix}"]


def test_a_png_named_jpg_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.jpg", format="PNG")
    assert read_picture(tmp_path / "a.jpg").tolist() == [[list(RED)] * 4] * 4


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    ramp = np.arange(64, dtype=np.uint16) * 1000
    Image.fromarray(np.tile(ramp, (4, 1))).save(tmp_path / "g.png")
    assert np.array_equal(read_picture(tmp_path / "g.png")[0, :, 1], ramp >> 8)
    for mode in ("I;16", "I;16B", "I"):
        image = Image.frombytes(mode, (64, 1), ramp.astype({"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode]).tobytes())
        assert np.array_equal(np.asarray(convert_to_rgb(image))[0, :, 2], ramp >> 8), mode


@pytest.mark.parametrize("values", [np.float32([[0, 0.5]]), np.int32([[0, 70000]]), np.int32([[-1, 5]])])
def test_values_of_unknown_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(DataError, match="what is white is not known") as caught:
        convert_to_rgb(Image.fromarray(values))
    assert caught.value.allowed and caught.value.remedy


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1), (*RED, 0))
    image.putpixel((1, 0), (*RED, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))
    expected = [list(WHITE), list(RED), [204, 204, 204]]
    image.save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png")[0].tolist() == expected
    Image.new("LA", (1, 1), (7, 0)).save(tmp_path / "b.png")
    assert read_picture(tmp_path / "b.png")[0, 0].tolist() == list(WHITE)
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, *RED])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "c.png", transparency=0)
    assert read_picture(tmp_path / "c.png")[0].tolist() == [list(WHITE), list(RED)]
    Image.new("RGB", (1, 1), RED).save(tmp_path / "d.png", transparency=RED)
    assert read_picture(tmp_path / "d.png")[0, 0].tolist() == list(WHITE)
    Image.fromarray(np.full((1, 1), 5000, np.uint16)).save(tmp_path / "e.png", transparency=5000)
    assert read_picture(tmp_path / "e.png")[0, 0].tolist() == list(WHITE)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_orientation_is_as_stored_unless_upright_is_asked_for(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").shape == (4, 8, 3)
    assert read_picture(tmp_path / "a.jpg", upright=True).shape == (8, 4, 3)
    Image.new("RGB", (8, 4)).save(tmp_path / "bad.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    for upright in (False, True):
        assert read_picture(tmp_path / "bad.jpg", upright=upright).shape == (4, 8, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(9000, 9000), (13300, 13300), (30000, 30000), (1, 2**31 - 1)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    write_png_header(tmp_path / "a.png", *size)
    with pytest.raises(DataError, match=r"pixels") as caught:
        open_picture(tmp_path / "a.png")
    assert "67 million pixels" in caught.value.allowed


def test_a_large_jpeg_is_decoded_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_files, "MAX_PICTURE_PIXELS", 64 * 64)
    Image.new("RGB", (256, 128), RED).save(tmp_path / "a.jpg")
    assert open_picture(tmp_path / "a.jpg").size == (64, 32)
    Image.new("RGB", (256, 128), RED).save(tmp_path / "p.jpg", progressive=True)
    with pytest.raises(DataError, match="256 × 128 pixels"):
        open_picture(tmp_path / "p.jpg")


@pytest.mark.parametrize(
    "contents", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"BM", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8 "]
)
def test_damaged_files_are_refused(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "a.png").write_bytes(contents)
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        open_picture(tmp_path / "a.png")


def test_a_cut_file_and_a_text_bomb_are_refused(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    bomb = b"k\0\0" + zlib.compress(bytes(100 << 20), 9)
    chunk = struct.pack(">I", len(bomb)) + b"zTXt" + bomb + struct.pack(">I", zlib.crc32(b"zTXt" + bomb))
    (tmp_path / "b.png").write_bytes(whole[:33] + chunk + whole[33:])
    for name in ("a.png", "b.png"):
        with pytest.raises(DataError, match="cannot be read"):
            open_picture(tmp_path / name)


def test_pipes_and_devices_are_no_pictures(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    assert list_pictures(tmp_path) == []
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match="no regular file"):
            open_picture(path)
    with pytest.raises(DataError, match="no such file"):
        open_picture(tmp_path / "absent.png")


def test_hidden_files_and_those_of_systems_are_not_listed(tmp_path: Path) -> None:
    root = tmp_path / ".hidden" / "data"  # above the folder, names do not count
    for name in (
        "b.png",
        "a/c.JPG",
        "._b.png",
        "__MACOSX/._b.png",
        "__MACOSX/x.png",
        "a/.thumbs/t.png",
        "@eaDir/t.jpg",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    assert list_pictures(root) == [root / "a/c.JPG", root / "b.png"]
