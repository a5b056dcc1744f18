"""Feature extractors: ONNX files with one image input, run by the project's backends. Needs no torch.

A new extractor is an ONNX file and one line of `EXTRACTORS`; any other file can be named on the command line.
Numbers of two extractors cannot be compared, so everything made with one has its hash.

Letters: B images, P pixels a side, E features, S spatial features, K classes.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowturbo import demo
from runtime.backends.base import BackendOptions, EngineFile, pad_batch, run_once
from runtime.backends.onnxruntime import PROVIDERS, OnnxRuntimeBackend
from runtime.directory.contract import Dim, GraphSpec, TensorSpec
from runtime.system.errors import BackendError, DataError, RequestError
from runtime.system.hashes import find_cache_folder, sha256_cached

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

METADATA_KEY = "flowturbo-features"
"""Metadata of ONNX files made by this project: a JSON object with the fields of `ExtractorInfo`."""
CALL_BATCH = 32
"""Images of one call."""


@dataclass(frozen=True)
class ExtractorInfo:
    """The input images of an extractor, and the names of its outputs.

    Attributes:
        name: for reports.
        resize: a key of `RESIZES`.
        low, high: values that 0 and 255 become.
        features: output [B, E], or [B, E, h, w] to be averaged; the first output if None.
        spatial, probabilities: outputs for sFID and the Inception Score, where there are some.
    """

    name: str
    resize: str = "bicubic"
    low: float = 0.0
    high: float = 1.0
    features: str | None = None
    spatial: str | None = None
    probabilities: str | None = None


@dataclass(frozen=True)
class ImageFeatures:
    """Float32 features [B, E], spatial features [B, S] and class probabilities [B, K] of images."""

    features: Floats
    spatial: Floats | None = None
    probabilities: Floats | None = None


@dataclass(frozen=True)
class ExtractorEntry:
    """A registered extractor: the path of its file, and the remedy where it is missing."""

    path: Callable[[], Path]
    remedy: str


EXTRACTORS = {
    "demo": ExtractorEntry(lambda: demo.FEATURE_EXTRACTOR, "reinstall the package, which carries it"),
    "inception": ExtractorEntry(
        lambda: (find_cache_folder() or Path("flowturbo-cache")) / "inception-2015-12-05.onnx",
        "convert the public weights once: flowturbo-eval inception --weights pt_inception-2015-12-05-6726825d.pth",
    ),
}

INCEPTION = "inception-2015-12-05"
"""Name of the Inception of published FIDs, and of the statistics in ADM's files."""

PIXEL_RANGES = {"0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0), "0..255": (0.0, 255.0)}
"""Range of pixel values for a file that does not name one."""


class Extractor:
    """An open extractor. Close it, or use it as a context manager.

    Attributes:
        info: its input images and outputs.
        size: pixels a side of its input.
        hash: short hash of everything that its numbers depend on: file, size, range, resize.
    """

    def __init__(
        self, path: Path, default_info: ExtractorInfo | None, input_size: int | None, options: BackendOptions
    ) -> None:
        spec, info = _read_graph(path)
        self.info = info or default_info or ExtractorInfo(path.stem)
        (tensor,) = spec.inputs.values()
        sides = {dim for dim in tensor.shape[2:] if isinstance(dim, int)}
        if len(sides) > 1 or (input_size is not None and sides - {input_size}):
            allowed = " × ".join(map(str, tensor.shape[2:]))
            raise RequestError(f"--input-size {input_size} for {path}", allowed=allowed)
        if not sides and input_size is None:
            raise RequestError(f"{path} takes images of any size", remedy="say which: --input-size N")
        self.size = sides.pop() if sides else int(input_size or 0)
        sha256 = sha256_cached(path)
        identity = [sha256, self.size, self.info.resize, self.info.low, self.info.high, self.info.features]
        self.hash = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self._features = self.info.features or next(iter(spec.outputs))
        self._spec, self._batch = spec, tensor.shape[0] if isinstance(tensor.shape[0], int) else None
        self._backend = OnnxRuntimeBackend(options)
        self._engine = self._backend.load(EngineFile(path, "features", "fp32", spec, sha256))

    @property
    def name(self) -> str:
        return self.info.name

    def extract(self, images: Pixels) -> ImageFeatures:
        """Return the features of 8-bit images [B, P, P, 3]."""
        info, call_batch = self.info, self._batch or CALL_BATCH
        parts = []
        for start in range(0, len(images), call_batch):
            pixels = RESIZES[info.resize](images[start : start + call_batch], self.size)
            scaled = (info.low + pixels * np.float32((info.high - info.low) / 255)).astype(np.float32)
            if self._batch:  # a fixed batch is filled up with the last image
                scaled = pad_batch(scaled, self._batch)
            outputs = run_once(self._backend, self._engine, self._spec, scaled)
            parts.append({key: values[: len(pixels)] for key, values in outputs.items()})
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        features = outputs[self._features]
        return ImageFeatures(
            features.mean(axis=(2, 3)) if features.ndim == 4 else features,
            outputs.get(self.info.spatial or ""),
            outputs.get(self.info.probabilities or ""),
        )

    def close(self) -> None:
        """Free the model; a second call does nothing."""
        self._engine.close()
        self._backend.close()

    def __enter__(self) -> Extractor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_extractor(
    name: str,
    *,
    input_size: int | None = None,
    input_range: str | None = None,
    provider: str = "cpu",
    threads: int | None = None,
) -> Extractor:
    """Open a registered extractor by name, or an ONNX file by path.

    Args:
        input_size, input_range: for a file that does not name them; a key of `PIXEL_RANGES`.
        provider: ONNX Runtime's; the CPU, on which numbers repeat, by default.

    Raises:
        RequestError: an unknown name, a size that the file does not take, or none where it is needed.
        DataError: the file is no ONNX file with one image input.
    """
    path, info = Path(name), None
    if name in EXTRACTORS:
        path = EXTRACTORS[name].path()
        if not path.is_file():
            raise RequestError(f"the extractor {name} is not here ({path})", remedy=EXTRACTORS[name].remedy)
    elif not path.is_file():
        raise RequestError(f"no extractor {name!r}", allowed=f"{', '.join(EXTRACTORS)}, or an ONNX file")
    else:
        low, high = PIXEL_RANGES[input_range or "0..1"]
        info = ExtractorInfo(path.stem, low=low, high=high)
    if provider not in PROVIDERS:
        raise BackendError(f"provider {provider!r}", allowed=", ".join(PROVIDERS))
    return Extractor(
        path, info, input_size, BackendOptions(provider=provider, threads=threads, cache=find_cache_folder())
    )


def _read_graph(path: Path) -> tuple[GraphSpec, ExtractorInfo | None]:
    """Read inputs and outputs of an ONNX file, and its metadata where it has some."""
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BackendError(
            "extractors run on onnxruntime, which is missing", remedy=PROVIDERS["cpu"].install
        ) from error
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise DataError(f"{path} is no ONNX file that can be read: {str(error).splitlines()[0]}") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    allowed = "one float32 input [B, 3, N, N] and float32 outputs whose sizes are known except B"
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].shape[1] != 3:
        input_shapes = ", ".join(f"{i.name} {i.shape}" for i in inputs)
        raise DataError(f"{path} has the inputs {input_shapes}", allowed=allowed)
    for value in (*inputs, *outputs):
        if value.type != "tensor(float)" or any(not isinstance(d, int) for d in value.shape[1:] if value in outputs):
            raise DataError(f"{path}: {value.name} is {value.type} {value.shape}", allowed=allowed)

    def parse_tensor(value: Any) -> TensorSpec:
        names: list[Dim] = [d if isinstance(d, int) else str(d) if i else "B" for i, d in enumerate(value.shape)]
        return TensorSpec("float32", tuple(names))

    spec = GraphSpec({i.name: parse_tensor(i) for i in inputs}, {o.name: parse_tensor(o) for o in outputs})
    metadata = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    try:
        return spec, None if metadata is None else ExtractorInfo(**json.loads(metadata))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}: its metadata {METADATA_KEY!r} is damaged ({error})", remedy="make it again"
        ) from error


def resize_bicubic(images: Pixels, size: int) -> Floats:
    """Resize by PIL's antialiased bicubic, in 8 bits: [B, P, P, 3] -> [B, 3, size, size]."""
    if images.shape[1:3] != (size, size):
        resized = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images]
        images = np.stack([np.asarray(image) for image in resized])
    return images.transpose(0, 3, 1, 2).astype(np.float32)


def resize_tf_bilinear(images: Pixels, size: int) -> Floats:
    """Resize by TensorFlow 1's ResizeBilinear: [B, P, P, 3] -> [B, 3, size, size].

    Corners at 0, no antialiasing, float32. Published FIDs use it; others shift them (Parmar et al. 2022).
    """
    pixels = images.transpose(0, 3, 1, 2).astype(np.float32)
    for axis in (2, 3):
        side = pixels.shape[axis]
        position = np.arange(size, dtype=np.float32) * np.float32(side / size)
        below = np.floor(position).astype(int)
        above, fraction = np.minimum(below + 1, side - 1), position - below.astype(np.float32)
        weights = fraction if axis == 3 else fraction[:, None]
        lower, upper = np.take(pixels, below, axis=axis), np.take(pixels, above, axis=axis)
        pixels = lower + (upper - lower) * weights
    return pixels


RESIZES: dict[str, Callable[[Pixels, int], Floats]] = {"bicubic": resize_bicubic, "tf-bilinear": resize_tf_bilinear}
