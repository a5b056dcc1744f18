"""Make an internet socket kill the process: `import no_internet` first, then anything that must stay on the machine."""

from __future__ import annotations

import ctypes
import platform
import struct

_SOCKET_CALL = {"x86_64": 41, "aarch64": 198}[platform.machine()]
_FAMILIES = (2, 10)  # AF_INET, AF_INET6
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: load a word of the call, jump if it is equal, return
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # of prctl


def refuse_internet() -> None:
    """Install a filter of the kernel for this process and its children; Python cannot get around it, nor can C.

    Raises:
        OSError: the kernel has no such filters.
    """
    program = [
        (_LOAD, 0, 0, 0),  # number of the call
        (_EQUAL, 0, 3, _SOCKET_CALL),
        (_LOAD, 0, 0, 16),  # its first argument
        (_EQUAL, 2, 0, _FAMILIES[0]),
        (_EQUAL, 1, 0, _FAMILIES[1]),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _KILL),
    ]
    instructions = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    code = ctypes.create_string_buffer(instructions, len(instructions))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_ulong(_FILTER), header, ctypes.c_ulong(0), ctypes.c_ulong(0))
    if libc.prctl(_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    if libc.prctl(_SET_SECCOMP, *arguments):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")
