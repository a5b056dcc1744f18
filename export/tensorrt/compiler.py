"""Builds TensorRT and TensorRT-RTX engines from ONNX files, each in a process of its own.

One process per engine because a builder can run out of memory, crash or hang: the others go on, cancelling is a kill,
peak memory is measured per engine, and Polygraphy chooses its flavour by an environment variable that it reads at
import. This half is the parent and imports neither; export/tensorrt/worker.py is the child.

    record = build_engine(EngineJob(onnx, out, "predictor", "rtx", "fp16", spec, profiles(4, static=False)))
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from runtime.backends.native.trt_api import (
    FLAVOUR_NAMES,
    RELEASE_TRAITS,
    EngineBuildInfo,
    Flavour,
    find_installed_version,
    format_install_hint,
    format_rebuild_command,
)
from runtime.directory.contract import GraphSpec, Profile, TensorSpec
from runtime.system import errors
from runtime.system.errors import BackendError, FlowTurboError, OutputError
from runtime.system.files import compute_sha256, write_atomically
from runtime.system.hardware import detect_gpus

_TICK_S = 0.5
_TAIL_LINES = 12
_NOTABLE_LINE = re.compile(
    r"\[[EW]\]|\[(ERROR|WARNING|INTERNAL_ERROR)\]|error|critical|Traceback|terminate", re.IGNORECASE
)
_SKIPPED_TACTIC = re.compile(r"skipping tactic", re.IGNORECASE)


@dataclass(frozen=True)
class EngineJob:
    """One engine to build.

    Attributes:
        onnx: the graph; its precision is the engine's, no builder flag changes it.
        out: where the engine goes; ends in `.engine`.
        graph: name in the contract (predictor, decoder-ema …).
        flavour: "tensorrt" (10.x, 11.x) or "rtx" (TensorRT-RTX).
        precision: fp32, fp16, bf16 or int8: what the parsed network is checked against.
        spec: inputs and outputs by the contract.
        profiles: sizes it is built for (`runtime.directory.contract.profiles`).
        workspace_bytes: most scratch memory a kernel may take; None for TensorRT's default, on a Jetson half of
            what is free.
        low_memory: choose kernels and build with little memory, for devices of 8 GB and less.
    """

    onnx: Path
    out: Path
    graph: str
    flavour: Flavour
    precision: str
    spec: GraphSpec
    profiles: tuple[Profile, ...]
    workspace_bytes: int | None = None
    low_memory: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "onnx": str(self.onnx.absolute()), "out": str(self.out)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineJob:
        return cls(
            **{
                **data,
                "onnx": Path(data["onnx"]),
                "out": Path(data["out"]),
                "spec": GraphSpec(_parse_specs(data["spec"]["inputs"]), _parse_specs(data["spec"]["outputs"])),
                "profiles": tuple(
                    Profile(_parse_sizes(p["images"]), _parse_sizes(p["rows"])) for p in data["profiles"]
                ),
            }
        )


def _parse_specs(data: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(spec["dtype"], tuple(spec["shape"])) for name, spec in data.items()}


def _parse_sizes(sizes: list[int]) -> tuple[int, int, int]:
    smallest, best, largest = sizes
    return smallest, best, largest


@dataclass(frozen=True)
class EngineBuild:
    """What was built; `to_json` is the engine's part of the manifest.

    Attributes:
        bytes, sha256: of the file.
        built: release, compute capabilities and GPU, for `runtime.backends.native.trt_api.refuse_foreign`.
        hardware: "portable" over `built.capabilities`, or "this GPU".
        seconds: from the start of the process to its end.
        peak_rss_bytes: largest memory of the build process.
        layers: layer type → element type → count, of the parsed network.
        engine_layers: element type → layers of the built engine, read back; empty where no driver is present.
        executed: whether this engine has run on a GPU. Without a driver nothing can be deserialised: False says
            "not executed", not "bad".
        notes: remarks for the user, such as tactics skipped for want of memory.
    """

    bytes: int
    sha256: str
    built: EngineBuildInfo
    hardware: str
    seconds: float
    peak_rss_bytes: int
    layers: Mapping[str, Mapping[str, int]]
    engine_layers: Mapping[str, int]
    executed: bool
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {**asdict(self), "built": self.built.to_json(), "notes": list(self.notes)}


@dataclass(frozen=True)
class BuildProgress:
    """Where a build is: TensorRT's own phase with `done` of `total` steps (0 of 0 before it says so).

    Prints as "12 s, Building engine 3/6, 0.4 GiB"; with a number format ("{at:.0f}") as its seconds alone.
    """

    graph: str
    elapsed_s: float
    rss_bytes: int
    phase: str = "starting"
    done: int = 0
    total: int = 0

    def __format__(self, spec: str) -> str:
        if spec:
            return format(self.elapsed_s, spec)
        steps = f" {self.done}/{self.total}" if self.total else ""
        return f"{self.elapsed_s:.0f} s, {self.phase}{steps}, {self.rss_bytes / 2**30:.1f} GiB"


Progress = Callable[[BuildProgress], None]


def check_builder(flavour: Flavour) -> str:
    """The builder's version, if this machine can build for a flavour; nothing heavy is imported.

    Raises:
        BackendError: the package is missing, or it needs a GPU and there is none.
    """
    version = find_installed_version(flavour)
    if version is None:
        raise BackendError(f"{FLAVOUR_NAMES[flavour]} is not installed", remedy=format_install_hint(flavour))
    if importlib.util.find_spec("polygraphy") is None:
        raise BackendError("Polygraphy, which drives the build, is not installed", remedy="pip install polygraphy")
    if not any(traits.can_build_without_gpu for (name, _), traits in RELEASE_TRAITS.items() if name == flavour):
        devices, reason = detect_gpus()
        if not devices:
            raise BackendError(
                f"{FLAVOUR_NAMES[flavour]} {version} times its kernels on a GPU while it builds; there is none "
                f"here: {reason}",
                remedy=f"build on the device itself: {format_rebuild_command(flavour)}",
            )
    return version


def build_engine(job: EngineJob, progress: Progress | None = None) -> EngineBuild:
    """Builds one engine in a child process and waits for it.

    An interrupt (Ctrl-C) kills the child and is raised again; whatever happens, `job.out` is whole or untouched.

    Args:
        job: what to build.
        progress: called about twice a second, for a bar or a line.

    Raises:
        BackendError: the package is missing, TensorRT refused the graph, or the process died (memory, crash); the
            message ends with what TensorRT logged.
        ProofError: the network does not compute in the precision that was asked for; names the layers.
        OutputError: the file cannot be written.
    """
    check_builder(job.flavour)
    if not job.out.parent.is_dir():
        raise OutputError(f"cannot write {job.out}: there is no such folder", remedy="make it first")
    with write_atomically(job.out) as aside, tempfile.TemporaryDirectory(prefix="flowturbo-build-") as folder:
        engine_build = _BuildProcess(replace(job, out=aside.absolute()), Path(folder), progress).run()
        return replace(engine_build, bytes=aside.stat().st_size, sha256=compute_sha256(aside))


class _BuildProcess:
    """One child process: its start, its progress, its end."""

    def __init__(self, job: EngineJob, folder: Path, progress: Progress | None) -> None:
        self.job, self.progress = job, progress
        self.job_file, self.result_file, self.log_file = folder / "job.json", folder / "result.json", folder / "log"
        self.started, self.peak_rss = time.monotonic(), 0
        self.last = BuildProgress(job.graph, 0.0, 0)

    def run(self) -> EngineBuild:
        self.job_file.write_text(json.dumps(self.job.to_json()), encoding="utf-8")
        with open(self.log_file, "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "export.tensorrt.worker", str(self.job_file), str(self.result_file)],
                stdin=subprocess.PIPE,  # closes when this process dies, by which the child knows
                stdout=subprocess.PIPE,
                stderr=log,
                env=_make_environment(self.job.flavour),
            )
        try:
            self._follow(process)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()
        return self._read_result(process.returncode)

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        """Reports progress until the child closes its end and is gone."""
        lines: queue.Queue[bytes | None] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=_TICK_S)
            except queue.Empty:
                line = b""
            self._report_progress(process.pid, line or b"")
            if line is None:
                break
        while process.poll() is None:
            time.sleep(0.01)

    def _report_progress(self, pid: int, line: bytes) -> None:
        rss, peak = read_rss_bytes(pid)
        self.peak_rss = max(self.peak_rss, peak)
        update = json.loads(line) if line else {}
        self.last = replace(self.last, elapsed_s=time.monotonic() - self.started, rss_bytes=rss, **update)
        if self.progress:
            self.progress(self.last)

    def _read_result(self, code: int) -> EngineBuild:
        log = self.log_file.read_text(encoding="utf-8", errors="replace")
        if not self.result_file.exists():
            raise self._make_crash_error(code, log)
        result = json.loads(self.result_file.read_text(encoding="utf-8"))
        if "error" in result:
            raise _parse_error(result["error"], log)
        skipped = len(_SKIPPED_TACTIC.findall(log))
        notes = [*result["notes"]]
        if skipped:
            notes.append(f"{skipped} tactics skipped for want of memory: the engine is valid, perhaps slower")
        return EngineBuild(
            bytes=0,
            sha256="",
            built=EngineBuildInfo.from_json(result["built"]),
            hardware=result["hardware"],
            seconds=round(time.monotonic() - self.started, 2),
            peak_rss_bytes=max(self.peak_rss, result["peak_rss_bytes"]),
            layers=result["layers"],
            engine_layers=result["engine_layers"],
            executed=result["executed"],
            notes=tuple(notes),
        )

    def _make_crash_error(self, code: int, log: str) -> BackendError:
        """The child left no word: killed by the system, or crashed."""
        ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        memory = f"it had reached {self.peak_rss / 2**30:.1f} GiB of memory"
        remedy = "look at the lines above; build the other graphs meanwhile, this one does not hinder them"
        if code == -signal.SIGKILL:
            remedy = "the system kills what takes too much memory: --low-memory, a smaller --max-batch, or free memory"
        return BackendError(f"the build of {self.job.graph} {ending}; {memory}{_format_log_tail(log)}", remedy=remedy)


def _read_lines(pipe: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    try:
        for line in pipe:
            lines.put(line)
    finally:
        lines.put(None)


def _make_environment(flavour: Flavour) -> dict[str, str]:
    """The child's environment: this very source, and Polygraphy's flavour."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    rtx_flag = "1" if flavour == "rtx" else "0"
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "POLYGRAPHY_USE_TENSORRT_RTX": rtx_flag}


def _parse_error(error: Mapping[str, str], log: str) -> FlowTurboError:
    """The child's error as its own class; one of TensorRT's comes with what it logged."""
    error_class = getattr(errors, error["kind"])
    log_tail = _format_log_tail(log) if error_class is BackendError else ""
    parsed_error: FlowTurboError = error_class(
        error["given"] + log_tail, allowed=error["allowed"], remedy=error["remedy"]
    )
    return parsed_error


def _format_log_tail(log: str) -> str:
    """The last notable lines of a build log, without repeats."""
    lines = [line.strip() for line in log.splitlines() if _NOTABLE_LINE.search(line)] or log.strip().splitlines()
    last_lines = list(dict.fromkeys(lines))[-_TAIL_LINES:]
    return ". The log ends:\n    " + "\n    ".join(last_lines) if last_lines else ""


def read_rss_bytes(pid: int | str) -> tuple[int, int]:
    """Memory of a process now and at its largest, zeros where the system does not say.

    From /proc rather than getrusage: a child's ru_maxrss starts at the size of the parent it was forked from.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0, 0
    sizes = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.MULTILINE))
    return int(sizes.get("VmRSS", 0)) * 1024, int(sizes.get("VmHWM", 0)) * 1024
