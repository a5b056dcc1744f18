"""Locks: one process at a time, and none is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.system.errors import OutputError
from runtime.system.locks import hold_lock

HOLD = """
import sys, time
from pathlib import Path
from runtime.system.locks import hold_lock
with hold_lock(Path(sys.argv[1]), busy="busy", remedy="wait"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError) as caught, hold_lock(lock, busy="somebody writes here", remedy="wait for it"):
            pass
        holder.kill()
    assert (caught.value.given, caught.value.remedy) == ("somebody writes here", "wait for it")
    assert caught.value.allowed
    assert lock.exists()  # a killed process leaves it, and nobody minds
    with hold_lock(lock, busy="", remedy=""):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_that_was_removed_keeps_nobody_out_and_lets_only_one_in(tmp_path: Path) -> None:
    """Who opens the file before its holder removes it takes the next one: many at once, and never two inside."""
    program = """
import os, sys
from pathlib import Path
from runtime.system.errors import OutputError
from runtime.system.locks import hold_lock
folder, entered = Path(sys.argv[1]), 0
while entered < 200:
    try:
        with hold_lock(folder / ".lock", busy="", remedy=""):
            descriptor = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)
            os.close(descriptor)
            os.unlink(folder / "inside")
            entered += 1
    except OutputError:
        pass
"""
    processes = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(3)]
    deadline = time.monotonic() + 60
    assert [process.wait(max(1, deadline - time.monotonic())) for process in processes] == [0, 0, 0]
    assert os.listdir(tmp_path) == []


def test_an_error_inside_lets_go(tmp_path: Path) -> None:
    with pytest.raises(ValueError), hold_lock(tmp_path / ".lock", busy="", remedy=""):  # noqa: PT011
        raise ValueError
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_hold_a_lock_is_said() -> None:
    with pytest.raises(OutputError) as caught, hold_lock(Path("/proc/.lock"), busy="", remedy=""):
        pass
    assert "/proc/.lock" in caught.value.given
    assert "--out" in caught.value.remedy
