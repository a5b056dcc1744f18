"""Sources of images: a folder or an .npz. They are read chunk by chunk, never all in memory.

Letters: N images in all, B images of a chunk, P pixels a side.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from flowturbo.data.photographs import IMAGE_SUFFIXES, centre_crop
from flowturbo.evaluation.quality.array_cache import hash_json
from runtime.system.errors import DataError

Pixels = NDArray[np.uint8]
Scores = NDArray[np.float64]

CHUNK_IMAGES = 64
"""Images of a chunk of a folder or an .npz."""
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
            raise DataError(f"no folder {root}", allowed="a folder of images, an .npz, or an engine directory")
        files = sorted(
            f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.name != GRID_NAME and f.is_file()
        )
        if not files:
            raise DataError(f"no images below {root}", allowed=f"files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
        order = np.random.Generator(np.random.Philox(0)).permutation(len(files))
        self.root, self.files, self.count = root, [files[i] for i in order], len(files)
        self._is_cropped = resolution is not None
        if resolution is None:
            with _open_image(self.files[0]) as image:
                resolution, height = image.size
            if resolution != height:
                raise DataError(
                    f"{self.files[0]} is {resolution} × {height} pixels", remedy="crop to a square: --resolution N"
                )
        self.resolution = resolution

    @property
    def key(self) -> str:
        stats = [(str(f.relative_to(self.root)), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        return f"folder-{hash_json([str(self.root.resolve()), self.resolution, stats])}"

    def read(self, start: int) -> Pixels:
        images = []
        for path in self.files[start : start + self.chunk_size]:
            with _open_image(path) as image:
                is_resolution = image.size == (self.resolution, self.resolution)
                if not is_resolution and not self._is_cropped:
                    raise DataError(
                        f"{path} is {image.width} × {image.height} pixels, the first is {self.resolution} × "
                        f"{self.resolution}",
                        remedy="name one size for all: --resolution N",
                    )
                images.append(
                    np.asarray(image.convert("RGB")) if is_resolution else centre_crop(image, self.resolution)
                )
        return np.stack(images)

    def compute_scores(self, start: int, images: Pixels) -> dict[str, Scores]:
        return {}


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            image.load()
            yield image
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read: {error}", remedy="remove it, or copy it again") from error


class NpzImages:
    """The images `arr_0` [N, P, P, 3], uint8, of an .npz as ADM's scripts write it, streamed out of the archive.

    Raises:
        DataError: no such file or member, or images of another kind.
    """

    chunk_size = CHUNK_IMAGES

    def __init__(self, path: Path, member: str = "arr_0") -> None:
        self.path, self._member = path, member
        self._stream, self._next = open_member(path, member), 0
        shape, dtype = read_array_header(self._stream)
        if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or 0 in shape or dtype != np.uint8:
            raise DataError(f"{path}: {member} is {dtype} {list(shape)}", allowed="uint8 [N, P, P, 3] with N ≥ 1")
        self.count, self._image = shape[0], shape[1:]

    @property
    def key(self) -> str:
        stat = self.path.stat()
        return f"npz-{hash_json([str(self.path.resolve()), stat.st_size, stat.st_mtime_ns, self._member])}"

    def read(self, start: int) -> Pixels:
        if start < self._next:
            self._stream.close()
            self._stream, self._next = open_member(self.path, self._member), 0
            read_array_header(self._stream)
        image_bytes = int(np.prod(self._image))
        for _ in range(self._next, start, self.chunk_size):  # a compressed archive is read forwards only
            self._stream.read(image_bytes * self.chunk_size)
        count = min(self.chunk_size, self.count - start)
        data = self._stream.read(image_bytes * count)
        if len(data) < image_bytes * count:
            raise DataError(f"{self.path} ends in the middle of {self._member}", remedy="copy it again")
        self._next = start + self.chunk_size
        return np.frombuffer(data, np.uint8).reshape(count, *self._image)

    def compute_scores(self, start: int, images: Pixels) -> dict[str, Scores]:
        return {}


def list_members(path: Path) -> set[str]:
    """Return the names of the arrays in an .npz, without reading any.

    Raises:
        DataError: no such file, or no .npz.
    """
    if not path.exists():
        raise DataError(f"nothing at {path}", allowed="a folder of images, or an .npz", remedy="check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}", remedy="copy or download it again") from error


def open_member(path: Path, member: str) -> IO[bytes]:
    """Open a stream of one array's file in an .npz."""
    if member not in list_members(path):
        member_names = ", ".join(sorted(list_members(path))) or "nothing"
        raise DataError(
            f"{path} holds {member_names}, and no {member}", remedy="save the images as np.savez(FILE, arr_0=images)"
        )
    return zipfile.ZipFile(path).open(f"{member}.npy")


def read_array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the shape and type of the array that begins here."""
    version = np.lib.format.read_magic(stream)
    parse_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = parse_header(stream)
    if fortran:
        raise DataError("an array in Fortran order", remedy="save it again with np.ascontiguousarray")
    return shape, dtype
