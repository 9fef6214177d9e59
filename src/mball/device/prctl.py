"""What a process asks the kernel for itself (prctl(2)): whose child it is, when it dies, and its name."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

from mball.device.libc import LIBC, error

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ARG_START, _ARG_END = 45, 46
"""Fields of /proc/self/stat, counted from behind the command's name."""


def become_subreaper() -> None:
    """Orphans among this process's descendants become its children. Raises OSError."""
    _prctl("PR_SET_CHILD_SUBREAPER", _PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """The kernel kills this process when the thread that is its parent ends. Raises OSError.

    A parent that has ended before is not noticed: the caller looks at getppid() afterwards.
    """
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, signal.SIGKILL)


def set_command_line(arguments: list[str], name: str) -> bool:
    """What `ps` shows of this process, within the room that its own arguments had; `name` (15 bytes) what `top` does.

    Whether there was room for the arguments; the name is set in any case.
    """
    Path("/proc/self/comm").write_bytes(name.encode()[:15])
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    text = b"\0".join(os.fsencode(argument) for argument in arguments) + b"\0"
    if len(text) > end - start:
        return False
    # The kernel reads the line from this process's own stack.
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)
    return True


def _prctl(name: str, option: int, value: int) -> None:
    if LIBC.prctl(option, value, 0, 0, 0) != 0:
        raise error(name)
