"""The file that `flowturbo-calibrate sensitivity` writes and a build reads: what stays in 16 or 32 bits, and why.

A choice names parts: layers (`predictor/blocks.3.mlp.fc1`), a block's softmax (`predictor/blocks.3.attn.softmax`,
fp16 alone) and decoders (`decoder-ema`, fp16 alone).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.lowbit.ranges import CLIP_METHODS, Ranges
from runtime.system.errors import RequestError
from runtime.system.files import write_json
from runtime.system.json_codec import parse_versioned, to_json

CHOICE_SCHEMA = 1
DEFAULT_CLIP_METHOD = "mse"


@dataclass(frozen=True)
class PrecisionChoice:
    """The result of a search for the parts that stay wide.

    Attributes:
        precision: that it was searched for: int8 or fp16.
        model: sha256 of the checkpoints by role.
        calibration: sha256 of the ranges, for int8.
        method, equalised: which clips, and whether inputs are equalised; for int8.
        wide: parts that stay in the wider type.
        target: quality that was asked for, by name: psnr_db, latent_rms or fid_ratio.
        measured: numbers of the search, for the reader.
    """

    schema: int
    precision: str
    model: Mapping[str, str]
    wide: tuple[str, ...]
    calibration: str = ""
    method: str = DEFAULT_CLIP_METHOD
    equalised: bool = True
    target: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    flowturbo: str = ""
    command: str = ""

    @property
    def sha256(self) -> str:
        """Hash of the contents."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True).encode()).hexdigest()

    def check(self, precision: str, sources: Mapping[str, str], ranges: Ranges | None, choice_name: str) -> None:
        """Check that it fits a build.

        Raises:
            RequestError: made for another precision, model or calibration, or it names a layer that is not there.
        """
        search_hint = "search again: flowturbo-calibrate sensitivity"
        if precision != self.precision:
            raise RequestError(
                f"{choice_name} was searched for {self.precision}, the build is {precision}",
                remedy=f"--precision {self.precision}, or {search_hint}",
            )
        for role in dict.fromkeys((*self.model, "predictor", "refiner")):
            if sources.get(role, "none") != self.model.get(role, "none"):
                raise RequestError(f"{choice_name} was searched for another {role}", remedy=search_hint)
        if ranges is not None and ranges.sha256 != self.calibration:
            raise RequestError(
                f"{choice_name} was searched with another calibration",
                allowed=self.calibration[:12] + "…",
                remedy=search_hint,
            )
        unknown = sorted(set(self.wide) - set(ranges.layers)) if ranges is not None else []
        if unknown:
            raise RequestError(
                f"{choice_name} keeps layers that the calibration lacks: {', '.join(unknown)}", remedy=search_hint
            )


def write_choice(path: Path, choice: PrecisionChoice) -> None:
    """Write the file, with its hash."""
    write_json(path, {**to_json(choice), "sha256": choice.sha256})


def read_choice(path: Path) -> PrecisionChoice:
    """Read and check a choice.

    Raises:
        RequestError: no such file, no choice, or one that was altered.
    """
    maker_hint = "flowturbo-calibrate sensitivity makes one"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        sha256 = data.pop("sha256")
    except OSError as error:
        raise RequestError(f"no choice at {path}", remedy=f"check the path; {maker_hint}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RequestError(f"{path} is no choice: {error}", remedy=maker_hint) from error
    choice = parse_versioned(
        data, PrecisionChoice, CHOICE_SCHEMA, where=str(path), name="choice", remedy=maker_hint, error_type=RequestError
    )
    if sha256 != choice.sha256:
        raise RequestError(f"{path} was altered: its contents have another sha256 than it says", remedy=maker_hint)
    if choice.method not in CLIP_METHODS:
        raise RequestError(
            f"{path} has the method {choice.method!r}", allowed=", ".join(CLIP_METHODS), remedy=maker_hint
        )
    return choice
