"""The folder in which a build works, beside its target: resumable, and never mistaken for a finished one."""

from __future__ import annotations

import ctypes
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
from runtime.system.locks import hold_lock

_STATE_FILE = "stage.json"
_AT_WORKING_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_BUILD_SUFFIXES = (".onnx", ".data", ".engine")


class BuildStage:
    """Unfinished work of one build key: it records finished graphs and engines, so an interrupted build goes on.

    Attributes:
        folder: where the files are.
        graphs, engines: records of what is finished.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._key = folder, key
        self.graphs: list[GraphRecord] = []
        self.engines: list[EngineRecord] = []
        with suppress(OSError, ValueError, KeyError):
            state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
            if state["key"] == key:
                graphs = [from_json(GraphRecord, graph) for graph in state["graphs"]]
                engines = [from_json(EngineRecord, engine) for engine in state["engines"]]
                self.graphs = [graph for graph in graphs if (folder / graph.path).is_file()]
                self.engines = [engine for engine in engines if (folder / engine.path).is_file()]
                return
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)

    def list_finished_graphs(self, resolution: int, precision: str) -> set[str]:
        """Return the names of the graphs that an earlier, interrupted run finished."""
        return {g.graph for g in self.graphs if (g.resolution, g.precision) == (resolution, precision)}

    def add_graph(self, record: GraphRecord) -> None:
        """Record a finished graph."""
        self.graphs = [*(g for g in self.graphs if g.path != record.path), record]
        self._save()

    def add_engine(self, record: EngineRecord) -> None:
        """Record a finished engine."""
        self.engines = [*(e for e in self.engines if e.path != record.path), record]
        self._save()

    def _save(self) -> None:
        state = {"key": self._key, "graphs": to_json(self.graphs), "engines": to_json(self.engines)}
        write_json(self.folder / _STATE_FILE, state)

    def remove_if_empty(self) -> None:
        """Remove the folder if nothing in it is finished."""
        if not self.graphs and not self.engines:
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, out: Path) -> None:
        """Put the finished folder in place of `out` by renaming.

        Raises:
            OutputError: the file system refuses.
        """
        backup = _name_backup(out)
        try:
            if out.exists() and swap_folders(self.folder, out):
                shutil.rmtree(self.folder, ignore_errors=True)  # the former engines
            else:
                shutil.rmtree(backup, ignore_errors=True)
                if out.exists():
                    os.replace(out, backup)
                os.replace(self.folder, out)
        except OSError as error:
            if backup.exists() and not out.exists():
                os.replace(backup, out)
            raise OutputError(
                f"cannot put the engines at {out}: {error.strerror}", remedy="name another --out"
            ) from error
        (out / _STATE_FILE).unlink(missing_ok=True)  # last: a build that is killed before it goes on from here
        shutil.rmtree(backup, ignore_errors=True)


def _name_backup(out: Path) -> Path:
    """Where the former engines are for a moment, on file systems that cannot exchange two folders."""
    return out.with_name(f".{out.name}.old")


def swap_folders(first: Path, second: Path) -> bool:
    """Exchange two folders in one step, so that no moment has neither; return whether the system can do so."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    code: int = rename(_AT_WORKING_FOLDER, os.fsencode(first), _AT_WORKING_FOLDER, os.fsencode(second), _EXCHANGE)
    return code == 0


def restore_backup(out: Path) -> None:
    """Put the engines back that a build moved away before it was killed, unless another build is at work there."""
    backup = _name_backup(out)
    if out.exists() or not (backup / MANIFEST_FILE).is_file():
        return
    with suppress(OutputError), _hold_lock(out):
        if not out.exists():
            os.replace(backup, out)


def check_engine_folder(out: Path) -> Path:
    """Return the absolute path of `out`, if a build may put an engine directory there; it replaces nothing else.

    Raises:
        OutputError: `out` is a file, this very folder or one above it, or a folder with other things in it.
    """
    out = out.resolve()
    if out.name:  # the root has none, and no folder beside it
        restore_backup(out)
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

    def is_ours(path: Path) -> bool:  # by layout and by the start of a manifest: a damaged one may be replaced
        if path.name == MANIFEST_FILE:
            return b'"flowturbo"' in path.read_bytes()[:200]
        if path.is_dir() and path.name.isdigit():
            return all(file.suffix in _BUILD_SUFFIXES for file in path.rglob("*") if not file.is_dir())
        return path.name in (PROOF_FILE, _STATE_FILE)

    foreign_names = sorted(path.name for path in out.iterdir() if not is_ours(path)) if out.is_dir() else []
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


@contextmanager
def open_stage(out: Path, key: str) -> Iterator[BuildStage]:
    """Give the stage of `out` to one process at a time; after a failure the next build goes on with what is finished.

    Raises:
        OutputError: another build holds it, or its folder cannot be written.
    """
    with _hold_lock(out):
        stage = BuildStage(out.with_name(f".{out.name}.building"), key)
        try:
            yield stage
        finally:
            stage.remove_if_empty()


@contextmanager
def _hold_lock(out: Path) -> Iterator[None]:
    """Hold the lock of `out`; its file is removed at the end.

    Raises:
        OutputError: another build holds it, or its folder cannot be written.
    """
    make_folder(out.parent)
    busy = f"another build is writing {out}"
    with hold_lock(out.with_name(f".{out.name}.lock"), busy=busy, remedy="wait for it, or name another --out"):
        yield
