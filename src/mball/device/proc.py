"""What /proc tells of a process."""

from __future__ import annotations

import contextlib
from pathlib import Path

PROC = Path("/proc")


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot: with the pid it names one process for ever.

    None where it is gone or a zombie.
    """
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def session(pid: int) -> int | None:
    """The process's session; None where it is gone or a zombie."""
    fields = _stat(pid)
    return None if fields is None else int(fields[3])


def family(pid: int) -> list[int]:
    """The process and all that descend from it, as far as they live. Its own children are those of its first thread:
    to look at every thread of every worker would keep a core busy."""
    descendants = _children(PROC / str(pid) / "task" / str(pid))
    for parent in descendants:
        for task in (PROC / str(parent) / "task").glob("*"):
            descendants += _children(task)
    return [pid, *descendants]


def _children(task: Path) -> list[int]:
    # A thread, or the whole process, may end meanwhile.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in (task / "children").read_text().split()]
    return []


def command_name(pid: int) -> str:
    """As the kernel calls it, 15 characters; `?` where it is gone."""
    try:
        return (PROC / str(pid) / "comm").read_text().strip() or "?"
    except (FileNotFoundError, ProcessLookupError):
        return "?"


def family_private_bytes(pid: int) -> int | None:
    """`private_bytes` of the process and all that descend from it; None where it is gone."""
    held = [private_bytes(member) for member in family(pid)]
    return None if held[0] is None else sum(each or 0 for each in held)


def _stat(pid: int) -> list[str] | None:
    """The fields after the command's name, from the state on; None where the process is gone or a zombie."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name stands in parentheses and may hold anything, parentheses too.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields


def private_bytes(pid: int) -> int | None:
    """Anonymous + Private_Hugetlb of smaps_rollup; None where the process is gone or a zombie.

    Anonymous pages are counted whether they are shared with a relative by fork or not, and pages of files not at all:
    both turn from shared to private as others come and go, and a worker's figure must not change with its neighbours'
    lives. A page of the zygote's that a worker writes to was counted before and is after.
    """
    try:
        text = (PROC / str(pid) / "smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    kinds = ("Anonymous:", "Private_Hugetlb:")
    kib = [int(line.split()[1]) for line in text.splitlines() if line.startswith(kinds)]
    return sum(kib) * 1024 if kib else None
