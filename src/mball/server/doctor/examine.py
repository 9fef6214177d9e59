"""Looks at everything that MBALL's speed and safety hang on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mball.server.doctor import disk, gpus, kernel, memory
from mball.server.doctor.report import Finding, Report

_PROBE_S = 1.0


def examine(path: Path, *, root: Path = Path("/"), probe_s: float = _PROBE_S) -> Report:
    """What this machine has. `path` is a folder of models: the disk under it is read for about `probe_s` seconds.

    `root` is where /proc and /sys are looked for. What cannot be read is a finding too, never an error.
    """
    looks: dict[str, Callable[[], Finding]] = {
        "dram": lambda: memory.dram(root),
        "cgroup limit": lambda: memory.cgroup(root),
        "memlock": lambda: memory.memlock(root),
        "huge pages": lambda: memory.anonymous_huge_pages(root),
        "huge pages for images": lambda: memory.shared_huge_pages(root),
        "memory pressure": lambda: memory.pressure(root),
        "/dev/shm": lambda: memory.shm(_size_of(root / "dev/shm")),
        "cores": lambda: kernel.cores(root),
        "cachestat": kernel.cachestat,
        "pids": lambda: kernel.processes(root),
    }
    host = [_look(name, look) for name, look in looks.items()]
    return Report((*gpus.findings(gpus.read()), *host, *disk.findings(path, probe_s)))


def _look(name: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except OSError as error:
        return Finding(name, f"unknown ({error})", False, "nothing is known of it", "mount /proc and /sys")


def _size_of(folder: Path) -> int:
    stats = os.statvfs(folder)
    return stats.f_frsize * stats.f_blocks
