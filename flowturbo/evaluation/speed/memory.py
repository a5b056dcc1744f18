"""Memory of this process, as Linux counts it."""

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
        peak_rss_bytes: peak since the start or the last `reset_peak_memory`.
        rss_bytes: now; `anonymous_bytes` of it are private, `file_bytes` can be dropped and read again.
    """

    peak_rss_bytes: int | None
    rss_bytes: int | None
    anonymous_bytes: int | None
    file_bytes: int | None


def read_process_memory(proc: Path = PROC_SELF) -> ProcessMemory:
    """Read the memory of this process from its status file."""
    try:
        text = (proc / "status").read_text(encoding="utf-8")
    except OSError:
        text = ""
    kilobytes = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    sizes = {field: kilobytes[name] * 1024 if name in kilobytes else None for field, name in _STATUS_FIELDS.items()}
    return ProcessMemory(**sizes)


def reset_peak_memory(proc: Path = PROC_SELF) -> str:
    """Restart the peak; return why where the system refuses (then the peak is since the start), else ""."""
    try:
        descriptor = os.open(proc / "clear_refs", os.O_WRONLY)
        try:
            os.write(descriptor, b"5")
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"the peak is counted since the process started: {proc / 'clear_refs'}: {error.strerror}"
    return ""
