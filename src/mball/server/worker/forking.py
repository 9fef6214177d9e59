"""Whether a fork of this process is safe."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

_TASKS = Path("/proc/self/task")
_MISSED_BY_NOBODY = re.compile(r"jemalloc_bg_thd|cuda[0-9a-f]+")
"""jemalloc begins its own anew in a child. The other is NVML's, which looks for events that nobody waits for: vLLM asks
NVML while it is imported, and forks its engine by itself beside that."""
_NOT_INITIALIZED = 3
_CUDA = "libcuda.so.1"


def unfit() -> str | None:
    """Why it would not be safe; None where it is."""
    if cuda_began():
        return "its imports began CUDA, and that survives no fork"
    others = sorted(name for task in _TASKS.iterdir() if (name := _name(task)) is not None)
    if others:
        return f"it has threads after its imports ({', '.join(others)}), and a fork would take one of them along alone"
    return None


def cuda_began() -> bool:
    """Whether somebody in this process called the driver's cuInit. A driver that is not loaded is left alone."""
    if _CUDA.removesuffix(".1") not in Path("/proc/self/maps").read_text():
        return False
    return bool(ctypes.CDLL(_CUDA).cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALIZED)


def _name(task: Path) -> str | None:
    """Of a thread that a child would miss; None for the others, and for the one that forks."""
    try:
        name = (task / "comm").read_text().strip()
    except FileNotFoundError:
        return None
    return None if int(task.name) == os.getpid() or _MISSED_BY_NOBODY.fullmatch(name) else name
