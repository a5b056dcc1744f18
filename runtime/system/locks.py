"""Locks on folders: one process at a time writes a run, a cache or an engine directory."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.system.errors import OutputError

LOCK_FILE = ".lock"
"""Name of the lock in a folder that is written in place."""


@contextmanager
def hold_lock(path: Path, *, busy: str, remedy: str) -> Iterator[None]:
    """Hold a lock file while a folder is written; the system lets go of it when the process ends, however it ends.

    Args:
        path: of the lock file, in a folder that exists. It is removed at the end.
        busy: what to say where another process holds it.
        remedy: what to do then.

    Raises:
        OutputError: another process holds it, or it cannot be made.
    """
    try:
        descriptor = _take_lock(path)
    except BlockingIOError as error:
        raise OutputError(busy, allowed="one process at a time", remedy=remedy) from error
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}", remedy="name another --out") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # while it is held: a file removed later could be another process's
        os.close(descriptor)


def _take_lock(path: Path) -> int:
    """Return the descriptor of a lock file that is locked and has this name."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file since it was opened: a lock on that one keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                warnings.warn(
                    f"the file system of {path.parent} has no locks: a second process that writes there is not noticed",
                    stacklevel=3,
                )
                return descriptor
            os.close(descriptor)
            if not isinstance(error, FileNotFoundError):
                raise
        else:
            os.close(descriptor)


@contextmanager
def lock_folder(folder: Path, owner: str) -> Iterator[None]:
    """Hold a folder for one process; nothing is left in it. Where the file system has no locks, nothing is held.

    Args:
        owner: who else may hold it, for the message.

    Raises:
        OutputError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(
                    f"{owner} is writing into {folder}", remedy="wait for it, or name another folder"
                ) from error
        yield
    finally:
        os.close(descriptor)
