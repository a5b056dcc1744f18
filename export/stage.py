"""The folder a build works in, beside the one it is for: resumable, and never mistaken for a finished one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import OutputError
from runtime.files import make_folder, write_json
from runtime.manifest import MANIFEST, GraphRecord
from runtime.records import from_json, to_json

_STATE = "stage.json"


class Stage:
    """Unfinished work of one build key. Finished graphs are remembered, so that an interrupted build goes on."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._key = folder, key
        self.graphs: list[GraphRecord] = self._load()

    def _load(self) -> list[GraphRecord]:
        with suppress(OSError, ValueError, KeyError):
            state = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
            if state["key"] == self._key:
                records = [from_json(GraphRecord, graph) for graph in state["graphs"]]
                return [g for g in records if (self.folder / g.path).is_file()]
        shutil.rmtree(self.folder, ignore_errors=True)
        make_folder(self.folder)
        return []

    def has(self, resolution: int, precision: str) -> bool:
        """Whether all graphs of a resolution and precision were finished by an earlier, interrupted run."""
        return (self.folder / str(resolution) / precision / ".done").exists()

    def add(self, record: GraphRecord) -> None:
        """Remembers a finished graph."""
        self.graphs = [g for g in self.graphs if g.path != record.path] + [record]
        write_json(self.folder / _STATE, {"key": self._key, "graphs": to_json(self.graphs)})

    def complete(self, resolution: int, precision: str) -> None:
        """Marks a resolution and precision as finished."""
        (self.folder / str(resolution) / precision / ".done").touch()

    def publish(self, out: Path) -> None:
        """Puts the finished folder in place of `out` by renaming."""
        for marker in [self.folder / _STATE, *self.folder.glob("*/*/.done")]:
            marker.unlink(missing_ok=True)
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        try:
            if out.exists():
                os.replace(out, old)
            os.replace(self.folder, out)
        except OSError as error:
            raise OutputError(f"cannot put the engines at {out}: {error.strerror}", remedy="name another --out") from error
        shutil.rmtree(old, ignore_errors=True)


def check_out(out: Path) -> None:
    """Refuses to replace what is no engine directory.

    Raises:
        OutputError: `out` is a file, or a folder with other things in it.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", remedy="name a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise OutputError(f"{out} is a folder with other things in it", remedy="name an empty or new folder with --out")


@contextmanager
def stage_for(out: Path, key: str) -> Iterator[Stage]:
    """The stage of `out`, held by one process at a time; kept on failure, so that the next build resumes."""
    make_folder(out.parent)
    lock = out.with_name(f".{out.name}.lock")
    try:
        handle = open(lock, "w", encoding="ascii")
    except OSError as error:
        raise OutputError(f"cannot write beside {out}: {error.strerror}", remedy="name another --out") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another build is writing {out}", remedy="wait for it, or name another --out") from error
        try:
            yield Stage(out.with_name(f".{out.name}.building"), key)
        finally:
            lock.unlink(missing_ok=True)
