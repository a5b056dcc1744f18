"""Pictures: arrays to PNG files with metadata, and grids of them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from runtime.system.files import write_atomically


def convert_to_uint8(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert decoder output [B, 3, H, W] in [0, 1] to [B, H, W, 3] in 0 … 255, rounded."""
    scaled = np.rint(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1))


def encode_png(image: NDArray[np.uint8], metadata: Mapping[str, object]) -> bytes:
    """Return one picture [H, W, 3] as a PNG file's contents, with `metadata` as text chunks."""
    text_chunks, file = PngInfo(), io.BytesIO()
    for key, value in metadata.items():
        text_chunks.add_text(key, str(value))
    Image.fromarray(image).save(file, format="PNG", pnginfo=text_chunks)
    return file.getvalue()


def save_png(path: Path, image: NDArray[np.uint8], metadata: Mapping[str, object]) -> None:
    """Write one picture with `metadata` as text chunks, whole or not at all."""
    with write_atomically(path) as temp_path:
        temp_path.write_bytes(encode_png(image, metadata))


def build_image_grid(images: Sequence[NDArray[np.uint8]], columns: int | None = None) -> NDArray[np.uint8]:
    """Build a grid of pictures of one size, white where none is left."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images[0].shape[:2]
    grid = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        grid[top : top + height, left : left + width] = image
    return grid
