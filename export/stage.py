"""The folder a build works in, beside the one it is for: resumable, and never mistaken for a finished one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.directory.manifest import MANIFEST_FILE, PROOF_FILE
from runtime.directory.records import EngineRecord, GraphRecord
from runtime.system.errors import OutputError
from runtime.system.files import make_folder, write_json
from runtime.system.json_codec import from_json, to_json

_STATE_FILE = "stage.json"
_BUILD_SUFFIXES = (".onnx", ".data", ".engine")


class BuildStage:
    """Unfinished work of one build key. Finished graphs and engines are remembered: an interrupted build goes on."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._key = folder, key
        self.graphs: list[GraphRecord] = []
        self.engines: list[EngineRecord] = []
        if not self._load():
            shutil.rmtree(folder, ignore_errors=True)
            make_folder(folder)

    def _load(self) -> bool:
        with suppress(OSError, ValueError, KeyError):
            state = json.loads((self.folder / _STATE_FILE).read_text(encoding="utf-8"))
            if state["key"] == self._key:
                graphs = [from_json(GraphRecord, graph) for graph in state["graphs"]]
                engines = [from_json(EngineRecord, engine) for engine in state["engines"]]
                self.graphs = [graph for graph in graphs if (self.folder / graph.path).is_file()]
                self.engines = [engine for engine in engines if (self.folder / engine.path).is_file()]
                return True
        return False

    def list_finished_graphs(self, resolution: int, precision: str) -> set[str]:
        """Graphs that an earlier, interrupted run has finished."""
        return {g.graph for g in self.graphs if (g.resolution, g.precision) == (resolution, precision)}

    def add_graph(self, record: GraphRecord) -> None:
        """Remembers a finished graph."""
        self.graphs = [*(g for g in self.graphs if g.path != record.path), record]
        self._save()

    def add_engine(self, record: EngineRecord) -> None:
        """Remembers a finished engine."""
        self.engines = [*(e for e in self.engines if e.path != record.path), record]
        self._save()

    def _save(self) -> None:
        state = {"key": self._key, "graphs": to_json(self.graphs), "engines": to_json(self.engines)}
        write_json(self.folder / _STATE_FILE, state)

    def remove_if_empty(self) -> None:
        """Removes the folder where nothing is finished that a later build could go on with."""
        if not self.graphs and not self.engines:
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, out: Path) -> None:
        """Puts the finished folder in place of `out` by renaming."""
        (self.folder / _STATE_FILE).unlink(missing_ok=True)
        backup = out.with_name(f".{out.name}.old")
        shutil.rmtree(backup, ignore_errors=True)
        try:
            if out.exists():
                os.replace(out, backup)
            os.replace(self.folder, out)
        except OSError as error:
            if backup.exists() and not out.exists():
                os.replace(backup, out)
            raise OutputError(
                f"cannot put the engines at {out}: {error.strerror}", remedy="name another --out"
            ) from error
        shutil.rmtree(backup, ignore_errors=True)


def check_engine_folder(out: Path) -> Path:
    """The absolute path of `out`, if a build may put an engine directory there. It never replaces what is not one.

    Raises:
        OutputError: `out` is a file, this very folder or one above it, or a folder with other things in it.
    """
    out = out.resolve()
    if Path.cwd().resolve().is_relative_to(out):
        raise OutputError(
            f"{out} holds the folder you are in", remedy="name a folder of its own, for example --out engines"
        )
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", remedy="name a folder with --out")
    if os.path.ismount(out):
        raise OutputError(
            f"{out} is a mount point, which cannot be replaced", remedy=f"name a folder in it: {out / 'engines'}"
        )
    foreign_names = sorted(path.name for path in out.iterdir() if not _is_ours(path)) if out.is_dir() else []
    if foreign_names or (out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_FILE).exists()):
        foreign_text = (
            f": {', '.join(foreign_names[:4])}{' …' if len(foreign_names) > 4 else ''}"
            if foreign_names
            else ", and no manifest"
        )
        raise OutputError(
            f"{out} holds other things than engines{foreign_text}",
            remedy="move them, or name an empty or new folder with --out",
        )
    return out


def _is_ours(path: Path) -> bool:
    """Whether a build made this: by layout and by what a manifest starts with, since a damaged one may be replaced."""
    if path.name == MANIFEST_FILE:
        return b'"flowturbo"' in path.read_bytes()[:200]
    if path.is_dir() and path.name.isdigit():
        return all(file.suffix in _BUILD_SUFFIXES for file in path.rglob("*") if not file.is_dir())
    return path.name == PROOF_FILE


@contextmanager
def open_stage(out: Path, key: str) -> Iterator[BuildStage]:
    """The stage of `out`, held by one process at a time; on failure what is finished is kept, for the next build."""
    make_folder(out.parent)
    lock = out.with_name(f".{out.name}.lock")
    try:
        handle = lock.open("w", encoding="ascii")
    except OSError as error:
        raise OutputError(f"cannot write beside {out}: {error.strerror}", remedy="name another --out") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another build is writing {out}", remedy="wait for it, or name another --out") from error
        try:
            stage = BuildStage(out.with_name(f".{out.name}.building"), key)
            try:
                yield stage
            finally:
                stage.remove_if_empty()
        finally:
            lock.unlink(missing_ok=True)
