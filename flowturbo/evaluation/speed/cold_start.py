"""The first picture of a fresh process (`cold_start_process`), part by part, and its memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowturbo.evaluation.load_options import LoadOptions
from flowturbo.evaluation.speed.memory import ProcessMemory
from runtime.request import RequestOptions
from runtime.system.errors import BackendError
from runtime.system.json_codec import from_json, to_json

TIMEOUT_SECONDS = 3600


@dataclass(frozen=True)
class ColdStart:
    """One start, milliseconds.

    Attributes:
        caches: "none" (an empty cache folder) or "kept" (the second start with the same folder). The files themselves
            are in the system's page cache in both: only root can drop that.
        process_ms: from the command to the interpreter's first line.
        import_ms: this package and what it needs.
        load_ms: reading and checking the directory, opening its engines; `engines_ms` are parts of it.
        compile_ms: None where the backend does not separate it; `compile_note` says which part includes it.
        first_image_ms, second_image_ms: one picture, encoded.
        total_ms: from the command to the first picture.
        loaded, ran: memory after loading, and after the second picture.
        weight_bytes: of the engines that were opened, from their manifest; None where it does not say.
    """

    engine: str
    resolution: int
    sampler: str
    caches: str
    process_ms: float
    import_ms: float
    load_ms: float
    engines_ms: Mapping[str, float]
    compile_ms: float | None
    compile_note: str
    first_image_ms: float
    second_image_ms: float
    total_ms: float
    loaded: ProcessMemory
    ran: ProcessMemory
    weight_bytes: int | None


def measure_cold_starts(
    label: str,
    folder: Path,
    resolution: int,
    load_options: LoadOptions,
    classes: Sequence[str],
    options: RequestOptions,
    *,
    decode: bool,
) -> list[ColdStart]:
    """Measure two starts of a fresh process with the same cache folder, empty before the first.

    Raises:
        BackendError: the process failed; with its own words.
    """
    job = {
        "engine": label,
        "folder": str(folder.absolute()),
        "load": {**load_options, "resolution": resolution},
        "request": {"classes": list(classes), "options": to_json(options), "decode": decode},
    }
    with tempfile.TemporaryDirectory(prefix="flowturbo-cold-") as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        starts = []
        for caches in ("none", "kept"):
            job_json = json.dumps({**job, "caches": caches, "spawned_ns": time.monotonic_ns()})
            command = [sys.executable, "-m", "flowturbo.evaluation.speed.cold_start_process", job_json]
            try:
                process = subprocess.run(
                    command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment, cwd=cache
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise _make_start_error(str(error)) from error
            if process.returncode:
                message = _extract_error_message(process.stderr) or f"it ended with code {process.returncode}"
                raise _make_start_error(message)
            try:
                starts.append(from_json(ColdStart, json.loads(process.stdout.splitlines()[-1]), "cold start"))
            except (IndexError, ValueError) as error:
                raise _make_start_error(f"it left no result: {error}") from error
        return starts


def _make_start_error(reason: str) -> BackendError:
    return BackendError(f"the first picture of a fresh process failed: {reason}")


def _extract_error_message(stderr: str) -> str:
    """Return the message at the end of a traceback in one line, without the exception's class."""
    message = re.split(r"\n(?=\S)", stderr.strip())[-1]
    return " ".join(re.sub(r"^[\w.]+: ", "", message).split())
