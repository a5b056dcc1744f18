"""Build TensorRT and TensorRT-RTX engines from ONNX files, each in a separate process.

A builder can run out of memory, crash or hang. With one process per engine the others go on, a build is cancelled by a
kill, and peak memory is measured per engine. Polygraphy also chooses its flavour by an environment variable that it
reads at import. This half is the parent and imports neither; export/tensorrt/worker.py is the child.

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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
from runtime.system.errors import BackendError, OutputError
from runtime.system.files import write_atomically
from runtime.system.hardware import detect_gpus
from runtime.system.progress import SILENT, Progress

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
        precision: fp32, fp16, bf16 or int8: the parsed network is checked against it.
        spec: inputs and outputs by the contract.
        profiles: sizes it is built for (`runtime.directory.contract.build_profiles`).
        workspace_bytes: most scratch memory of a kernel; None for TensorRT's default, on a Jetson half of the free.
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

    def to_json(self) -> dict[str, object]:
        """Return the job as JSON data."""
        return {**asdict(self), "onnx": str(self.onnx.absolute()), "out": str(self.out)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineJob:
        """Return the job that `to_json` described."""
        inputs, outputs = (
            {name: TensorSpec(tensor["dtype"], tuple(tensor["shape"])) for name, tensor in data["spec"][kind].items()}
            for kind in ("inputs", "outputs")
        )
        parsed = {
            "onnx": Path(data["onnx"]),
            "out": Path(data["out"]),
            "spec": GraphSpec(inputs, outputs),
            "profiles": tuple(Profile(tuple(p["images"]), tuple(p["rows"])) for p in data["profiles"]),
        }
        return cls(**{**data, **parsed})


@dataclass(frozen=True)
class EngineBuild:
    """A finished engine; `to_json` is its part of the manifest.

    Attributes:
        bytes, sha256: of the file.
        built: release, compute capabilities and GPU, for `runtime.backends.native.trt_api.check_engine_origin`.
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

    def to_json(self) -> dict[str, object]:
        """Return the record as JSON data."""
        return {**asdict(self), "built": self.built.to_json(), "notes": list(self.notes)}


def check_builder(flavour: Flavour) -> str:
    """Return the builder's version, if this machine can build for a flavour; nothing heavy is imported.

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


def build_engine(job: EngineJob, progress: Progress = SILENT, label: str = "") -> EngineBuild:
    """Build one engine in a child process and wait for it.

    An interrupt (Ctrl-C) kills the child and is raised again; whatever happens, `job.out` is whole or untouched.

    Args:
        job: the engine.
        progress: gets a stage about twice a second, with seconds, TensorRT's phase and its steps, and memory:
            "building predictor (12 s, Building engine 3/6, 0.4 GiB)".
        label: begins each stage in place of "building GRAPH".

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
        aside_job = replace(job, out=aside.absolute())
        return _BuildProcess(aside_job, Path(folder), progress, label or f"building {job.graph}").run()


class _BuildProcess:
    """One child process: its start, its progress, its end."""

    def __init__(self, job: EngineJob, folder: Path, progress: Progress, label: str) -> None:
        self.job, self.progress, self.label = job, progress, label
        self.job_file, self.result_file, self.log_file = folder / "job.json", folder / "result.json", folder / "log"
        self.started, self.peak_rss = time.monotonic(), 0

    def run(self) -> EngineBuild:
        self.job_file.write_text(json.dumps(self.job.to_json()), encoding="utf-8")
        root = str(Path(__file__).resolve().parents[2])  # the child runs this very source
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "POLYGRAPHY_USE_TENSORRT_RTX": "1" if self.job.flavour == "rtx" else "0",
        }
        with open(self.log_file, "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "export.tensorrt.worker", str(self.job_file), str(self.result_file)],
                stdin=subprocess.PIPE,  # closes when this process dies, by which the child knows
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
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
        """Show progress until the child closes its end and is gone."""
        lines: queue.Queue[bytes | None] = queue.Queue()

        def read_lines() -> None:
            try:
                for line in process.stdout or ():
                    lines.put(line)
            finally:
                lines.put(None)

        threading.Thread(target=read_lines, daemon=True).start()
        line: bytes | None = b""
        phase, steps = "starting", ""
        while line is not None:
            try:
                line = lines.get(timeout=_TICK_S)
            except queue.Empty:
                line = b""
            if line:
                report = json.loads(line)
                phase, steps = report["phase"], f" {report['done']}/{report['total']}" if report["total"] else ""
            rss, peak = read_rss_bytes(process.pid)
            self.peak_rss = max(self.peak_rss, peak)
            elapsed_s = time.monotonic() - self.started
            self.progress.stage(f"{self.label} ({elapsed_s:.0f} s, {phase}{steps}, {rss / 2**30:.1f} GiB)")
        while process.poll() is None:
            time.sleep(0.01)

    def _read_result(self, code: int) -> EngineBuild:
        log = self.log_file.read_text(encoding="utf-8", errors="replace")
        if not self.result_file.exists():  # killed by the system, or crashed
            ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            memory = f"it had reached {self.peak_rss / 2**30:.1f} GiB of memory"
            remedy = "look at the lines above; build the other graphs meanwhile, this one does not hinder them"
            if code == -signal.SIGKILL:
                remedy = (
                    "the system kills what takes too much memory: --low-memory, a smaller --max-batch, or free memory"
                )
            raise BackendError(
                f"the build of {self.job.graph} {ending}; {memory}{_format_log_tail(log)}", remedy=remedy
            )
        result = json.loads(self.result_file.read_text(encoding="utf-8"))
        if "error" in result:
            error = result["error"]
            error_class = getattr(errors, error["kind"])
            log_tail = _format_log_tail(log) if error_class is BackendError else ""
            raise error_class(error["given"] + log_tail, allowed=error["allowed"], remedy=error["remedy"])
        skipped = len(_SKIPPED_TACTIC.findall(log))
        notes = (
            [f"{skipped} tactics skipped for want of memory: the engine is valid, perhaps slower"] if skipped else []
        )
        built = EngineBuildInfo.from_json(result["built"])
        build = EngineBuild(**{**result, "built": built, "notes": (*result["notes"], *notes)})
        return replace(
            build,
            seconds=round(time.monotonic() - self.started, 2),
            peak_rss_bytes=max(self.peak_rss, build.peak_rss_bytes),
        )


def _format_log_tail(log: str) -> str:
    """The last notable lines of a build log, each once."""
    lines = [line.strip() for line in log.splitlines() if _NOTABLE_LINE.search(line)] or log.strip().splitlines()
    last_lines = list(dict.fromkeys(lines))[-_TAIL_LINES:]
    return ". The log ends:\n    " + "\n    ".join(last_lines) if last_lines else ""


def read_rss_bytes(pid: int | str) -> tuple[int, int]:
    """Return the memory of a process now and at its largest, in bytes; zeros where the system does not say.

    It comes from /proc rather than getrusage: a child's ru_maxrss starts at the size of the parent it was forked from.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0, 0
    sizes = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.MULTILINE))
    return int(sizes.get("VmRSS", 0)) * 1024, int(sizes.get("VmHWM", 0)) * 1024
