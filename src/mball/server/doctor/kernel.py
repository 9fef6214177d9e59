"""What the kernel offers: cores, nodes, cachestat, and whether processes can be told apart."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from mball.server.doctor.report import Finding

_FEW_CORES = 4
_CACHESTAT = 451
_FIRST_PID_NAMESPACE = "pid:[4026531836]"


def cores(root: Path) -> Finding:
    count = len(os.sched_getaffinity(0))
    nodes = len(list((root / "sys/devices/system/node").glob("node[0-9]*"))) or 1
    fine = count >= _FEW_CORES
    return Finding(
        "cores",
        f"{count} on {nodes} NUMA node{'s' if nodes > 1 else ''}",
        fine,
        "copies out of the page cache take the cores that tokens are made on",
        "give it more cores",
        {"cores": count, "numa_nodes": nodes},
    )


def cachestat() -> Finding:
    """Whether the kernel tells how much of a file is in its cache (cachestat(2), Linux 6.5)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_CACHESTAT, -1, None, None, 0)
    fine = ctypes.get_errno() == errno.EBADF
    return Finding(
        "cachestat",
        "there" if fine else "not there",
        fine,
        "a load cannot know whether a file is in the page cache, and takes the way for cold files",
        "Linux 6.5 or later; in a container, a seccomp profile that lets cachestat through",
        {"available": fine},
    )


def processes(root: Path) -> Finding:
    """The GPU's driver names its processes by the host's pids; a container with its own pids cannot match them."""
    try:
        hidden = (root / "proc/self/ns/pid").readlink().as_posix() != _FIRST_PID_NAMESPACE
    except OSError:
        hidden = True
    return Finding(
        "pids",
        "this container's own" if hidden else "the host's",
        not hidden,
        "a GPU's memory cannot be told apart by process: only its total free bytes prove a demotion",
        "docker run --pid=host",
        {"hidden": hidden},
    )
