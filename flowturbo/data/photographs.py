"""Photographs in class folders: ILSVRC layout (wnid folders, ImageNet indices) or any tree of named class folders.

`runtime/picture_files.py` reads them. Pixels are as stored: as in ADM's protocol, the orientation in EXIF is ignored.

Letters: B images, R resolution.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.picture_files import PICTURE_FORMATS, convert_to_rgb, is_skipped_name, list_pictures, open_picture
from runtime.system.errors import DataError, FlowTurboError
from runtime.system.progress import SILENT, Progress

Pixels = NDArray[np.uint8]

PIXEL_CACHE_BYTES = 2 << 30  # decoded pixels are kept in memory up to this size
MAX_UNCROPPED_ASPECT = 20
"""Sides of a picture whose ratio is above this are cropped before they are resized."""
_WNID = re.compile(r"n\d{8}")


@cache
def _load_imagenet_table() -> dict[str, tuple[int, str]]:
    """Return the index and the name of each wnid."""
    text = resources.files("flowturbo").joinpath("imagenet_classes.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t")
    return {row["wnid"]: (int(row["index"]), row["name"]) for row in rows}


def load_imagenet_indices() -> dict[str, int]:
    """Return the ImageNet index of each of the 1000 ILSVRC wnids."""
    return {wnid: index for wnid, (index, _) in _load_imagenet_table().items()}


def find_class_name(folder: str) -> str:
    """Return ImageNet's name of a wnid folder, e.g. "golden retriever", and the folder's own name of others."""
    return _load_imagenet_table().get(folder, (0, folder))[1]


@dataclass(frozen=True)
class Listing:
    """Files of a data set with their labels, in a fixed order (by label, then by file name).

    Attributes:
        root: the folder that was searched.
        paths, labels: one of each per photograph.
        names: folder name of each label.
        fraction, classes, seed: which part of the folder was taken.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    names: dict[int, str] = field(default_factory=dict)
    fraction: float = 1.0
    classes: tuple[str, ...] = ()
    seed: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def files_sha256(self) -> str:
        """Hash of the names of the photographs, in order."""
        names = "\n".join(path.relative_to(self.root).as_posix() for path in self.paths)
        return hashlib.sha256(names.encode()).hexdigest()

    def describe(self) -> dict[str, object]:
        """Return what a run records: enough to take the same photographs again, and to know that they are the same."""
        return {
            "root": str(self.root.resolve()),
            "photographs": len(self),
            "classes": {str(label): name for label, name in self.names.items()},
            "fraction": self.fraction,
            "fraction_seed": self.seed,
            "files_sha256": self.files_sha256,
        }


def list_photographs(root: Path, *, fraction: float = 1.0, classes: Sequence[str] = (), seed: int = 0) -> Listing:
    """List the photographs below `root/CLASS/…`.

    Labels are ImageNet's indices for folders named by wnids, 0, 1, … in the order of the numbers where all names are
    whole numbers, and 0, 1, … in the order of the names elsewhere.

    Args:
        root: folder of the class folders.
        fraction: share of every class to keep, at least one photograph, chosen by `seed`.
        classes: folder names or labels to keep, see `select_classes`; empty for all.
        seed: of the choice.

    Raises:
        DataError: no such folder, no class folders, no photographs, or an unknown class.
    """
    paths: list[Path] = []
    labels: list[int] = []
    empty_folders: list[str] = []
    names = select_classes(_list_class_folders(root), classes, root)
    for label, name in sorted(names.items()):
        files = list_pictures(root / name)
        selected = select_subset(len(files), fraction, seed, label)
        paths += [files[i] for i in selected]
        labels += [label] * len(selected)
        empty_folders += [] if files else [str(root / name)]
    if not paths:
        raise DataError(
            f"no photographs below {root}",
            allowed=f"files ending in {', '.join(sorted(PICTURE_FORMATS))} in one folder per class",
            remedy="name the folder that holds the class folders with --data",
        )
    if empty_folders:  # also what a folder looks like that may not be read
        warnings.warn(
            f"no photographs in {', '.join(empty_folders[:5])}{' …' if len(empty_folders) > 5 else ''}", stacklevel=2
        )
    return Listing(root, tuple(paths), tuple(labels), names, fraction, tuple(classes), seed)


def _list_class_folders(root: Path) -> dict[int, str]:
    if not root.is_dir():
        raise DataError(f"no data folder {root}", allowed="a folder with one folder per class", remedy="check --data")
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not is_skipped_name(entry.name))
    if not folders:
        raise DataError(
            f"{root} has no class folders",
            allowed="one folder per class: ILSVRC wnids (n02099601/…) or any names",
            remedy="name the folder that holds the class folders with --data",
        )
    if all(re.fullmatch("[0-9]+", name) for name in folders):
        folders.sort(key=lambda name: (int(name), name))  # as text, 10 would come before 2
        different = [(label, name) for label, name in enumerate(folders) if label != int(name)]
        if different:
            warnings.warn(
                f"{root}: labels count from 0 in the order of the numbers, so they are not the folders' names: "
                f"folder {different[0][1]} has label {different[0][0]}",
                stacklevel=3,
            )
    if not any(_WNID.fullmatch(name) for name in folders):
        return dict(enumerate(folders))
    indices = load_imagenet_indices()
    unknown_folders = [name for name in folders if name not in indices]
    if unknown_folders:
        raise DataError(
            f"{root} mixes ImageNet folders with {', '.join(unknown_folders[:5])}",
            allowed="only wnids of ILSVRC 2012, or only other names",
            remedy="move the other folders out, or choose with --classes from a tree of one kind",
        )
    return {indices[name]: name for name in folders}


def select_classes(names: dict[int, str], classes: Sequence[str], root: Path) -> dict[int, str]:
    """Return those of the classes in `root` that are named, by folder or by label; all if none is named.

    A word with a slash at its end, as in `10/`, is a folder's name and never a label.

    Raises:
        DataError: no such class, or a word that is the name of one and the label of another.
    """
    if not classes:
        return names
    label_by_folder = {name: label for label, name in names.items()}
    selected: dict[int, str] = {}
    unknown = []
    for word in classes:
        by_folder = label_by_folder.get(word.removesuffix("/"))
        by_label = next((label for label in names if str(label) == word), None)
        if by_folder is not None and by_label is not None and by_folder != by_label:
            raise DataError(
                f"class {word} of {root} can be the folder {word} (label {by_folder}) or the label {word} (folder "
                f"{names[by_label]})",
                allowed="a word that means one class",
                remedy=f"name the folder with a slash at its end: {word}/ or {names[by_label]}/",
            )
        label = by_label if by_folder is None else by_folder
        if label is None:
            unknown.append(word)
        else:
            selected[label] = names[label]
    if unknown:
        raise DataError(
            f"no class {', '.join(unknown)} in {root}",
            allowed=", ".join(f"{label} ({name})" for label, name in sorted(names.items())[:20]),
            remedy="name folders or labels with --classes",
        )
    return selected


def select_subset(count: int, fraction: float, seed: int, label: int) -> NDArray[np.int64]:
    """Return the indices of the items of a class that `--fraction` keeps: at least one, in order.

    Args:
        count: items of the class.
        fraction: share to keep.
        seed, label: what the choice depends on.

    Raises:
        DataError: a fraction that is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise DataError(f"--fraction is {fraction}", allowed="more than 0 and at most 1", remedy="e.g. --fraction 0.1")
    if fraction == 1 or not count:
        return np.arange(count)
    order = np.random.Generator(np.random.Philox(key=[seed, label])).permutation(count)
    return np.sort(order[: max(1, round(fraction * count))])


def centre_crop(image: Image.Image, resolution: int) -> Pixels:
    """Return ADM's crop [R, R, 3] (Dhariwal & Nichol 2021): halve by box filter, bicubic to size, centre.

    Sides of a ratio above `MAX_UNCROPPED_ASPECT` are cropped first: a line of pixels would become an image of
    gigabytes. The margin that is left is wider than the filters, so only the phase of the resampling differs.
    """
    short = min(image.size)
    if max(image.size) > MAX_UNCROPPED_ASPECT * short:
        width, height = (min(side, 2 * short + 16) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    image = convert_to_rgb(image)
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


class Photographs:
    """Decoded photographs of a listing, by index. They stay in memory if all of them fit in `cache_bytes`.

    A file that cannot be read is reported once and noted in `corrupt`, and the next readable one replaces it. So a bad
    file neither stops a run nor changes what the other positions of an epoch show.

    Attributes:
        listing: the files.
        resolution: R.
        labels: [number of photographs] class of each.
        corrupt: files that could not be read so far, and why.
    """

    def __init__(
        self,
        listing: Listing,
        resolution: int,
        cache_bytes: int = PIXEL_CACHE_BYTES,
        progress: Progress = SILENT,
    ) -> None:
        self.listing, self.resolution, self.progress = listing, resolution, progress
        self.labels = np.asarray(listing.labels, dtype=np.int64)
        self.corrupt: dict[Path, str] = {}
        self._pixel_cache: dict[int, Pixels] | None = {} if len(listing) * resolution**2 * 3 <= cache_bytes else None
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def __len__(self) -> int:
        return len(self.listing)

    def list_unreadable(self) -> dict[str, str]:
        """Return the files that could not be read, and why."""
        return {str(path): reason for path, reason in sorted(self.corrupt.items())}

    def read(self, index: int) -> Pixels | None:
        """Return the pixels [R, R, 3] of one photograph; None if its file is corrupt."""
        if self._pixel_cache is not None and index in self._pixel_cache:
            return self._pixel_cache[index]
        path = self.listing.paths[index]
        if path in self.corrupt:
            return None
        try:
            pixels = centre_crop(open_picture(path), self.resolution)
        except Exception as error:  # of one file, MemoryError too: its size is limited
            reason = error.given if isinstance(error, FlowTurboError) else str(error) or type(error).__name__
            self.corrupt[path] = reason.removeprefix(f"{path} cannot be read: ")
            self.progress.write(f"skipping {path}: {self.corrupt[path]}")
            return None
        if self._pixel_cache is not None:
            self._pixel_cache[index] = pixels
        return pixels

    def _read_or_next(self, index: int) -> tuple[Pixels, int]:
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            pixels = self.read(candidate)
            if pixels is not None:
                return pixels, int(self.labels[candidate])
        raise DataError(
            f"none of the {len(self)} photographs below {self.listing.root} can be read",
            allowed="JPEG, PNG, WebP or BMP files",
            remedy="check the files with an image viewer",
        )

    def read_batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Pixels, NDArray[np.int64]]:
        """Return pixels [B, R, R, 3] and labels [B].

        Raises:
            DataError: no photograph of the listing can be read.
        """
        images = list(self._threads.map(self._read_or_next, (int(i) for i in indices)))
        return np.stack([pixels for pixels, _ in images]), np.asarray([label for _, label in images], dtype=np.int64)

    def read_valid(self, indices: Sequence[int]) -> tuple[NDArray[np.int64], Pixels]:
        """Return those of `indices` that can be read, and their pixels [B, R, R, 3]."""
        pixels = list(self._threads.map(self.read, indices))
        valid = [(i, p) for i, p in zip(indices, pixels, strict=True) if p is not None]
        empty = np.zeros((0, self.resolution, self.resolution, 3), dtype=np.uint8)
        return np.asarray([i for i, _ in valid], dtype=np.int64), np.stack([p for _, p in valid]) if valid else empty


def normalise_pixels(pixels: Pixels) -> NDArray[np.float32]:
    """Return 8-bit pixels [B, R, R, 3] as float32 [B, 3, R, R] in −1 … 1, the range of the VAEs."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / 127.5 - 1


def to_pixels(images: NDArray[np.float32]) -> Pixels:
    """Return float images [B, 3, R, R] in −1 … 1 as 8-bit [B, R, R, 3], rounded and clipped."""
    scaled = np.clip(np.rint((images.transpose(0, 2, 3, 1) + 1) * 127.5), 0, 255)
    return np.ascontiguousarray(scaled.astype(np.uint8))
