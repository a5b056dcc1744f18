"""The file that `flowturbo-calibrate int8` writes and a build reads: statistics of every quantisable layer's input.

One `.npz`: arrays per layer, and a record of the checkpoints and settings that they were measured with. It holds the
hash of its contents. NumPy alone reads it, since a build looks at it before anything heavy is imported.

Letters: C channels of a layer's input, T bins of flow time, M methods.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.system.array_store import load_arrays, save_arrays
from runtime.system.errors import RequestError
from runtime.system.json_codec import parse_versioned, to_json

RANGES_SCHEMA = 1
CLIP_METHODS = ("minmax", "percentile", "entropy", "mse")
"""How the clip of a layer's input is chosen: its largest value, the 99.99th percentile, least Kullback–Leibler
divergence of the histogram and its quantised self (Migacz 2017), least squared error of the quantised values."""
TIME_BINS = 10
"""Equal bins of flow time, each with its ranges."""
_RECORD, _HASH = "record", "sha256"
_ARRAY_NAMES = ("low", "high", "equaliser", "plain", "equalised", "plain_error", "equalised_error")

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LayerRanges:
    """Statistics of one layer's input.

    Attributes:
        low, high: [T, C] smallest and largest value; zero for a bin without an evaluation.
        equaliser: [C] divisors of the input and factors of the weight's columns; ones: no change.
        plain, equalised: [T + 1, M] clip by method, of the input as it is and divided by `equaliser`; per bin, and
            over all of them in the last row.
        plain_error, equalised_error: [M] squared error of the quantised layer's output over that of its output.
    """

    low: Floats
    high: Floats
    equaliser: Floats
    plain: Floats
    equalised: Floats
    plain_error: Floats
    equalised_error: Floats

    def select_clip(self, method: str, *, equalised: bool) -> float:
        """Return the largest value of the input; beyond it values are cut."""
        return float((self.equalised if equalised else self.plain)[-1, CLIP_METHODS.index(method)])


@dataclass(frozen=True)
class RangesRecord:
    """The origin of ranges.

    Attributes:
        model: sha256 of the checkpoints by role; ranges fit no other.
        settings: samples, seed, sampler, guidance, resolution, as resolved.
        times: flow times that were evaluated, by network.
        layers: names, in order.
        methods: columns of the clips.
        command, flowturbo: command line and version that measured them.
    """

    schema: int
    model: Mapping[str, str]
    settings: Mapping[str, Any]
    times: Mapping[str, tuple[float, ...]]
    layers: tuple[str, ...]
    methods: tuple[str, ...]
    flowturbo: str
    command: str = ""


@dataclass(frozen=True)
class Ranges:
    """A calibration, as in its file."""

    record: RangesRecord
    layers: Mapping[str, LayerRanges] = field(repr=False)

    @property
    def sha256(self) -> str:
        """Hash of the contents: every array with its name, and the record."""
        digest = hashlib.sha256(_serialise_record(self.record).encode())
        for name, array in _flatten_layers(self.layers).items():
            digest.update(f"{name}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def check_layers(self, layers: Sequence[str]) -> None:
        """Refuse a calibration without some of the layers: they would silently stay wide.

        Raises:
            RequestError: with their names.
        """
        if missing := [layer for layer in layers if layer not in self.layers]:
            raise RequestError(
                f"the calibration lacks {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}",
                allowed=f"one of all {len(layers)} layers",
                remedy="measure again: flowturbo-calibrate int8",
            )

    def check_model(self, sources: Mapping[str, str], calibration_name: str) -> None:
        """Refuse ranges of other checkpoints, or of a predictor alone where a refiner is built as well.

        Raises:
            RequestError: they do not fit `sources` (role → sha256).
        """
        for role in ("predictor", "refiner"):
            expected = sources.get(role, "none")
            if expected != "none" and self.record.model.get(role) != expected:
                measured_on = "another" if role in self.record.model else "no"
                raise RequestError(
                    f"{calibration_name} was measured on {measured_on} {role}",
                    allowed=f"a calibration of the {role} that is built (sha256 {expected[:12]}…)",
                    remedy="measure this model: flowturbo-calibrate int8, with the same --predictor and --refiner",
                )


def write_ranges(path: Path, ranges: Ranges) -> None:
    """Write the file, whole or not at all; the same contents give the same bytes."""
    arrays = _flatten_layers(ranges.layers)
    extra = {_RECORD: np.asarray(_serialise_record(ranges.record)), _HASH: np.asarray(ranges.sha256)}
    save_arrays(path, {**arrays, **extra}, compressed=True)


def read_ranges(path: Path) -> Ranges:
    """Read and check a calibration.

    Raises:
        RequestError: no such file, no calibration, one of a newer version, or one that was altered.
    """
    maker_hint = "flowturbo-calibrate int8 makes one"
    if not path.is_file():
        raise RequestError(f"no calibration at {path}", remedy=f"check the path; {maker_hint}")
    arrays = load_arrays(path)
    if arrays is None or _RECORD not in arrays or _HASH not in arrays:
        raise RequestError(f"{path} is no calibration, or a damaged one", allowed="a .npz file", remedy=maker_hint)
    try:
        data = json.loads(str(arrays[_RECORD]))
        _ = data["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise RequestError(f"{path} is no calibration: {error}", remedy=maker_hint) from error
    record = parse_versioned(
        data,
        RangesRecord,
        RANGES_SCHEMA,
        where=str(path),
        name="calibration",
        remedy=maker_hint,
        error_type=RequestError,
    )
    try:
        layers = {
            layer: LayerRanges(**{part: arrays[f"{layer}/{part}"] for part in _ARRAY_NAMES}) for layer in record.layers
        }
    except KeyError as error:
        raise RequestError(f"{path} lacks something: {error}", remedy=maker_hint) from error
    if record.methods != CLIP_METHODS:
        raise RequestError(
            f"{path} has methods {', '.join(record.methods)}", allowed=", ".join(CLIP_METHODS), remedy=maker_hint
        )
    ranges = Ranges(record, layers)
    if ranges.sha256 != str(arrays[_HASH]):
        raise RequestError(f"{path} was altered: its contents have another sha256 than it says", remedy=maker_hint)
    return ranges


def _flatten_layers(layers: Mapping[str, LayerRanges]) -> dict[str, NDArray[Any]]:
    return {
        f"{layer}/{part}": getattr(layer_ranges, part)
        for layer, layer_ranges in layers.items()
        for part in _ARRAY_NAMES
    }


def _serialise_record(record: RangesRecord) -> str:
    return json.dumps(to_json(record), sort_keys=True)
