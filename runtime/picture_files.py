"""Read picture files: the one reader of training, evaluation and `flowturbo-run --reverse`.

- Formats: those of `PICTURE_FORMATS`, and no others whatever a file holds. Pillow alone goes by content, and gives a
  `.png` that holds PostScript to Ghostscript.
- Size: at most `MAX_PICTURE_PIXELS`. A larger JPEG is decoded at a half, a quarter or an eighth of its size.
- Colours: 8-bit RGB. Alpha is composited on `ALPHA_BACKGROUND`. 16-bit values are divided by 256, as Pillow does
  for 16-bit colours. Values without a known range (32-bit, float) are refused.
- Orientation: pixels as stored, as ADM's protocol has them (Dhariwal & Nichol 2021): training and evaluation ignore
  the orientation in EXIF. `upright=True` turns a picture as a person expects to see it; `--reverse` does.
- Hidden files, `__MACOSX` and other folders that systems add are no pictures: `list_pictures` leaves them out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.system.errors import DataError

PICTURE_FORMATS = {".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
"""Format of each suffix. A file may hold another one of them: a PNG that is named .jpg is read."""
MAX_PICTURE_PIXELS = 1 << 26
"""67 megapixels: 200 MB as RGB. Several threads read at once."""
ALPHA_BACKGROUND = (255, 255, 255)
"""Transparent pixels show this colour: white, as pages and viewers mostly do."""
READER_VERSION = 2
"""Part of the names of caches. Raise it when the pixels of some picture change."""

_SYSTEM_NAMES = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_MAX_JPEG_REDUCTION = 8


def is_skipped_name(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or was added by a system: `._a.png`, `__MACOSX`."""
    return name.startswith(".") or name in _SYSTEM_NAMES


def list_pictures(root: Path) -> list[Path]:
    """Return the picture files below a folder by their suffixes, sorted; without those of `is_skipped_name`."""
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in PICTURE_FORMATS
        and not any(map(is_skipped_name, path.relative_to(root).parts))
        and path.is_file()
    )


def open_picture(path: Path, *, upright: bool = False) -> Image.Image:
    """Return a picture with its pixels loaded, in the file's own mode, and with its text in `info`.

    Args:
        upright: apply the orientation in EXIF.

    Raises:
        DataError: no regular file, none of the formats, damaged, or too large.
    """
    reason = ""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            reason = "it is no regular file" if path.exists() else "there is no such file"
        else:
            with Image.open(path, formats=sorted(set(PICTURE_FORMATS.values()))) as image:
                reason = _limit_size(image)
                if not reason:
                    image.load()
                    return (ImageOps.exif_transpose(image) or image) if upright else image
    except MemoryError:
        reason = "it needs more memory than there is"
    except UnidentifiedImageError:
        reason = "its contents are of none of these formats"
    except Exception as error:  # on damaged bytes decoders raise whatever they stumble on
        reason = str(error) or type(error).__name__
    raise DataError(
        f"{path} cannot be read: {reason}",
        allowed=f"a picture in JPEG, PNG, WebP or BMP, of at most {MAX_PICTURE_PIXELS / 1e6:.0f} million pixels",
        remedy="remove it, copy it again, or save it in one of these formats with an image editor",
    )


def _limit_size(image: Image.Image) -> str:
    """Let a large JPEG be decoded smaller; return what speaks against decoding."""
    width, height = image.size
    is_reducible = image.format in ("JPEG", "MPO") and not image.info.get("progressive")  # else all is in memory first
    reduction = 1
    while is_reducible and width * height > MAX_PICTURE_PIXELS * reduction**2 and reduction < _MAX_JPEG_REDUCTION:
        reduction *= 2
    if reduction > 1:
        image.draft(None, (max(1, width // reduction), max(1, height // reduction)))
    if image.width * image.height > MAX_PICTURE_PIXELS:
        return f"it has {width} × {height} pixels"
    return ""


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture as 8-bit RGB: alpha on `ALPHA_BACKGROUND`, 16-bit values divided by 256.

    Raises:
        DataError: its values have no known range.
    """
    transparency = image.info.get("transparency")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() <= 0xFFFF:
            raise _make_range_error(image, values)
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        if not isinstance(transparency, int):
            return grey.convert("RGB")
        image = grey.convert("RGBA")
        image.putalpha(Image.fromarray(np.where(values == transparency, 0, 255).astype(np.uint8)))
    elif image.mode == "F":
        raise _make_range_error(image, np.asarray(image))
    elif image.mode not in _ALPHA_MODES and transparency is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    alpha = image if image.mode == "RGBA" else image.convert("RGBA")
    picture = Image.new("RGB", alpha.size, ALPHA_BACKGROUND)
    picture.paste(alpha, mask=alpha.getchannel("A"))
    return picture


def _make_range_error(image: Image.Image, values: NDArray[np.generic]) -> DataError:
    span = f" from {values.min()} to {values.max()}" if values.size else ""
    return DataError(
        f"a picture of mode {image.mode} with values{span}: what is white is not known",
        allowed="pictures of 8 or 16 bits a channel",
        remedy="scale it to 0 … 255 and save it as an 8-bit PNG",
    )


def read_picture(path: Path, *, upright: bool = False) -> NDArray[np.uint8]:
    """Return the pixels [H, W, 3] of a picture file.

    Args:
        upright: apply the orientation in EXIF.

    Raises:
        DataError: it cannot be read.
    """
    return np.asarray(convert_to_rgb(open_picture(path, upright=upright)))
