"""Folders that take long to make, made once in a run of the tests and shared by its worker processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder `name` of this run of the tests; the first process that asks fills it with `make`.

    Others wait for it. If `make` fails, the next process that asks tries again in an empty folder.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the workers' folders lie side by side in the run's
    folder, finished = root / "made-once" / name, root / "made-once" / f"{name}.finished"
    folder.parent.mkdir(exist_ok=True)
    with open(folder.with_name(f"{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when this process ends, however it ends
        if not finished.exists():
            if folder.exists():
                folder.rename(folder.with_name(f"{name}.failed-{os.getpid()}"))
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder
