"""Sources of images: a folder, an .npz or an .npy. They are read chunk by chunk, never all in memory.

`runtime/picture_files.py` reads the files of a folder. Pixels are as stored: as in ADM, the orientation in EXIF is
ignored.

Letters: N images in all, B images of a chunk, P pixels a side.
"""

from __future__ import annotations

import math
import mmap
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from flowturbo.data.photographs import centre_crop
from runtime.picture_files import PICTURE_FORMATS, READER_VERSION, convert_to_rgb, list_pictures, open_picture
from runtime.system.array_store import hash_json
from runtime.system.errors import DataError

Pixels = NDArray[np.uint8]
Scores = NDArray[np.float64]
ByteStream = IO[bytes] | mmap.mmap

CHUNK_IMAGES = 64
"""Images of a chunk of a folder or an .npz."""
_MAX_DEFLATE_RATIO = 1100  # 1032 of what deflate packs at most; numpy writes no other method
_ARCHIVE_ERRORS = (OSError, zipfile.BadZipFile, zlib.error, RuntimeError)
GRID_NAME = "grid.png"
"""Sheet of pictures that flowturbo-run writes beside them."""


class ImageSource(Protocol):
    """Images by position.

    Attributes:
        count: N.
        chunk_size: images of a chunk; the last one may be shorter.
        key: name of the set; equal keys have equal images.
    """

    count: int
    chunk_size: int

    @property
    def key(self) -> str: ...

    def read(self, start: int) -> Pixels:
        """Return the chunk that begins at image `start`, uint8 [B, P, P, 3]."""

    def compute_scores(self, start: int, images: Pixels) -> dict[str, Scores]:
        """Return further numbers of a chunk's images by name, [B] each."""


class FolderImages:
    """All image files below a folder, centre-cropped as ADM does where a resolution is given.

    Their order is shuffled, always in the same way: files are mostly sorted by class, and then a split of the
    Inception Score, or a part of the set, would hold a few classes only.

    Raises:
        DataError: no folder, no images; while reading: a damaged image, or images of several sizes and no resolution.
    """

    chunk_size = CHUNK_IMAGES

    def __init__(self, root: Path, resolution: int | None = None) -> None:
        if not root.is_dir():
            raise DataError(
                f"no folder {root}",
                allowed="a folder of images, an .npz or .npy, or an engine directory",
                remedy="check the path",
            )
        files = [path for path in list_pictures(root) if path.name != GRID_NAME]
        if not files:
            raise DataError(
                f"no images below {root}",
                allowed=f"files ending in {', '.join(sorted(PICTURE_FORMATS))}",
                remedy="name the folder that holds them; hidden files do not count",
            )
        order = np.random.Generator(np.random.Philox(0)).permutation(len(files))
        self.root, self.files, self.count = root, [files[i] for i in order], len(files)
        self._is_cropped = resolution is not None
        if resolution is None:
            resolution, height = open_picture(self.files[0]).size
            if resolution != height:
                raise DataError(
                    f"{self.files[0]} is {resolution} × {height} pixels",
                    allowed="square images of one size",
                    remedy="crop to a square: --resolution N",
                )
        self.resolution = resolution

    @property
    def key(self) -> str:
        stats = [(str(f.relative_to(self.root)), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        key: list[object] = [str(self.root.resolve()), self.resolution, stats]
        if any(path.suffix.lower() not in (".jpg", ".jpeg") for path in self.files):
            key.append(READER_VERSION)  # only these have alpha or 16 bits; features of JPEGs from before stay valid
        return f"folder-{hash_json(key)}"

    def read(self, start: int) -> Pixels:
        images = []
        for path in self.files[start : start + self.chunk_size]:
            image = open_picture(path)
            is_resolution = image.size == (self.resolution, self.resolution)
            if not is_resolution and not self._is_cropped:
                raise DataError(
                    f"{path} is {image.width} × {image.height} pixels, the first is {self.resolution} × "
                    f"{self.resolution}",
                    allowed="images of one size",
                    remedy="name one size for all: --resolution N",
                )
            try:
                images.append(
                    np.asarray(convert_to_rgb(image)) if is_resolution else centre_crop(image, self.resolution)
                )
            except DataError as error:
                raise DataError(f"{path}: {error.given}", allowed=error.allowed, remedy=error.remedy) from error
        return np.stack(images)

    def compute_scores(self, start: int, images: Pixels) -> dict[str, Scores]:
        return {}


class NpzImages:
    """The images `arr_0` [N, P, P, 3], uint8, of an .npz as ADM's scripts write it, or of an .npy; streamed.

    Raises:
        DataError: no such file or member, or images of another kind.
    """

    chunk_size = CHUNK_IMAGES

    def __init__(self, path: Path, member: str = "arr_0") -> None:
        self.path, self._member = path, member
        self._next = 0
        self._stream, shape, dtype = open_array(path, member)
        if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or 0 in shape or dtype != np.uint8:
            self._stream.close()
            remedy = "save the images as np.save(FILE, images)"
            if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
                remedy = "put the channels last: images.transpose(0, 2, 3, 1)"
            elif dtype.kind == "f":
                remedy = "convert them: (images * 255).round().astype(np.uint8) for values from 0 to 1"
            raise DataError(
                f"{path}: {member} is {dtype} {list(shape)}", allowed="uint8 [N, P, P, 3] with N ≥ 1", remedy=remedy
            )
        self.count, self._image = shape[0], shape[1:]

    @property
    def key(self) -> str:
        stat = self.path.stat()
        return f"npz-{hash_json([str(self.path.resolve()), stat.st_size, stat.st_mtime_ns, self._member])}"

    def read(self, start: int) -> Pixels:
        if start < self._next:
            self._stream.close()
            self._stream, self._next = open_array(self.path, self._member)[0], 0
        image_bytes = int(np.prod(self._image))
        count = min(self.chunk_size, self.count - start)
        try:
            for _ in range(self._next, start, self.chunk_size):  # a compressed archive is read forwards only
                self._stream.read(image_bytes * self.chunk_size)
            data = self._stream.read(image_bytes * count)
        except (*_ARCHIVE_ERRORS, EOFError) as error:
            raise DataError(
                f"{self.path} cannot be read: {error}", allowed="a whole file", remedy="copy or download it again"
            ) from error
        if len(data) < image_bytes * count:
            raise DataError(
                f"{self.path} ends in the middle of {self._member}", allowed="a whole file", remedy="copy it again"
            )
        self._next = start + self.chunk_size
        return np.frombuffer(data, np.uint8).reshape(count, *self._image)

    def compute_scores(self, start: int, images: Pixels) -> dict[str, Scores]:
        return {}


def list_members(path: Path) -> set[str]:
    """Return the names of the arrays in an .npz, without reading any. An .npy is taken as an .npz of `arr_0` alone.

    Raises:
        DataError: no such file, or neither of the two.
    """
    if not path.exists():
        raise DataError(f"nothing at {path}", allowed="a folder of images, an .npz or an .npy", remedy="check the path")
    if not path.is_file():
        raise DataError(f"{path} is no file", allowed="an .npz or an .npy", remedy="check the path")
    try:
        if _is_npy(path):
            return {"arr_0"}
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except _ARCHIVE_ERRORS as error:
        raise DataError(
            f"{path} cannot be read as .npz: {error}", allowed="an .npz or an .npy", remedy="copy or download it again"
        ) from error


def open_array(path: Path, member: str) -> tuple[ByteStream, tuple[int, ...], np.dtype[Any]]:
    """Open a stream of the values of one array in an .npz or .npy; return it with the array's shape and type.

    Raises:
        DataError: no such array, a header that is damaged, or one that promises more than the file can hold.
    """
    if member not in list_members(path):
        member_names = ", ".join(sorted(list_members(path))) or "nothing"
        raise DataError(
            f"{path} holds {member_names}, and no {member}",
            allowed=f"an .npz with {member}",
            remedy="save the images as np.savez(FILE, arr_0=images)",
        )
    remedy = "copy or download it again"
    with ExitStack() as on_error:
        try:
            stream, array_bytes = _open_stream(path, member)
            on_error.callback(stream.close)
            file = cast(IO[bytes], stream)  # what NumPy needs of one, a map has
            is_version_1 = np.lib.format.read_magic(file) == (1, 0)
            parse_header = np.lib.format.read_array_header_1_0 if is_version_1 else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = parse_header(file)
        except (*_ARCHIVE_ERRORS, KeyError, ValueError, EOFError) as error:
            raise DataError(f"{path}: {member} cannot be read: {error}", allowed="an array", remedy=remedy) from error
        if is_fortran:
            raise DataError(
                f"{path}: {member} is an array in Fortran order",
                allowed="arrays in C order",
                remedy="save it again with np.ascontiguousarray",
            )
        if dtype.hasobject:
            raise DataError(
                f"{path}: {member} holds Python objects", allowed="numbers", remedy="save an array of numbers"
            )
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > array_bytes:
            raise DataError(
                f"{path}: {member} of shape {list(shape)} is larger than the file: it ends in the middle of it",
                allowed="a whole file",
                remedy=remedy,
            )
        on_error.pop_all()
    return stream, shape, dtype


def _open_stream(path: Path, member: str) -> tuple[ByteStream, int]:
    """Open the file of an array; return it with the bytes that it can have at most."""
    file_bytes = path.stat().st_size
    if _is_npy(path):
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), file_bytes
    with zipfile.ZipFile(path) as archive:  # the stream keeps the file open
        info = archive.getinfo(f"{member}.npy")
        return archive.open(info), min(info.file_size, file_bytes * _MAX_DEFLATE_RATIO)


def _is_npy(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
