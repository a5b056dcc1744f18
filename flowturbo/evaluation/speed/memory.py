"""Memory of a process as Linux counts it, and of the GPU as its driver does."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

PROC_SELF = Path("/proc/self")
_STATUS_FIELDS = {
    "peak_rss_bytes": "VmHWM",
    "rss_bytes": "VmRSS",
    "anonymous_bytes": "RssAnon",
    "file_bytes": "RssFile",
}


@dataclass(frozen=True)
class ProcessMemory:
    """Resident bytes; None where the system does not say.

    Attributes:
        peak_rss_bytes: the most since the start or the last `reset_peak_memory`.
        rss_bytes: now; of these `anonymous_bytes` are the process's own, `file_bytes` can be dropped and read again.
    """

    peak_rss_bytes: int | None
    rss_bytes: int | None
    anonymous_bytes: int | None
    file_bytes: int | None


def read_process_memory(proc: Path = PROC_SELF) -> ProcessMemory:
    """This process, from its status file."""
    try:
        text = (proc / "status").read_text(encoding="utf-8")
    except OSError:
        text = ""
    kilobytes = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    sizes = {field: kilobytes[name] * 1024 if name in kilobytes else None for field, name in _STATUS_FIELDS.items()}
    return ProcessMemory(**sizes)


def reset_peak_memory(proc: Path = PROC_SELF) -> str:
    """Starts the peak anew; says why not where the system does not let it (then the peak is since the start)."""
    try:
        descriptor = os.open(proc / "clear_refs", os.O_WRONLY)
        try:
            os.write(descriptor, b"5")
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"the peak is counted since the process started: {proc / 'clear_refs'}: {error.strerror}"
    return ""
