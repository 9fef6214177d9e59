"""Host memory: how much, what bounds it, how it is paged, how its shortage is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mball.server.doctor.report import Finding
from mball.units import GiB, KiB, format_bytes

_ENOUGH_DRAM_BYTES = 8 * GiB
_ENOUGH_SHM_BYTES = 1 * GiB
_CAP_IPC_LOCK = 14
_THP = "sys/kernel/mm/transparent_hugepage"


def dram(root: Path) -> Finding:
    total, available = (_meminfo(root, key) for key in ("MemTotal", "MemAvailable"))
    fine = available >= _ENOUGH_DRAM_BYTES
    return Finding(
        "dram",
        f"{format_bytes(available)} free of {format_bytes(total)}",
        fine,
        "few models find room as DRAM images: the others come back from the disk at every switch",
        "free memory, or serve fewer models",
        {"total_bytes": total, "available_bytes": available},
    )


def cgroup(root: Path) -> Finding:
    """The tightest limit on this process, of its own group or one above it; version 1 or 2."""
    limit = min(_limits(root), default=None)
    total = _meminfo(root, "MemTotal")
    if limit is None or limit >= total:
        return Finding("cgroup limit", "none below the machine's memory", data={"limit_bytes": None})
    return Finding(
        "cgroup limit",
        f"{format_bytes(limit)} of the machine's {format_bytes(total)}",
        False,
        "workers and DRAM images share it, page cache included; the kernel kills a process that goes over it",
        "raise the limit (docker --memory, systemd MemoryMax), or keep device_memory_bytes (on a CPU) and dram_bytes "
        "well below it",
        {"limit_bytes": limit},
    )


def _limits(root: Path) -> Iterator[int]:
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be the host's, and only its top is mounted here.
        folder = top / group.strip("/")
        for level in (folder, *folder.parents):
            if level.is_relative_to(top) and (level / file).is_file():
                text = (level / file).read_text().strip()
                if text.isdecimal():
                    yield int(text)


def memlock(root: Path) -> Finding:
    found = re.search(r"^Max locked memory\s+(\w+)", (root / "proc/self/limits").read_text(), re.MULTILINE)
    soft = int(found[1]) if found and found[1].isdecimal() else None
    total = _meminfo(root, "MemTotal")
    swap = _meminfo(root, "SwapTotal")
    unlimited = soft is None or soft >= total or _may_lock(root)
    fine = unlimited or swap == 0
    limit = "unlimited" if soft is None or unlimited else format_bytes(soft)
    return Finding(
        "memlock",
        limit if unlimited or swap else f"{limit} (this machine does not swap)",
        fine,
        f"under pressure the kernel may swap images out: no more than {limit} can be locked",
        "LimitMEMLOCK=infinity (systemd), --ulimit memlock=-1 (docker) or `ulimit -l unlimited`",
        {"limit_bytes": None if unlimited else soft, "swap_bytes": swap},
    )


def _may_lock(root: Path) -> bool:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", (root / "proc/self/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> _CAP_IPC_LOCK & 1)


def anonymous_huge_pages(root: Path) -> Finding:
    return _huge_pages(
        root,
        "huge pages",
        "enabled",
        {"always", "madvise"},
        "weights on the CPU are loaded into 4 KiB pages",
        "madvise",
    )


def shared_huge_pages(root: Path) -> Finding:
    return _huge_pages(
        root,
        "huge pages for images",
        "shmem_enabled",
        {"always", "within_size", "advise", "force"},
        "DRAM images are in 4 KiB pages, which a GPU's driver takes three to five times as long to register",
        "advise",
    )


def _huge_pages(root: Path, name: str, file: str, good: set[str], cost: str, wanted: str) -> Finding:
    path = root / _THP / file
    found = re.search(r"\[(\w+)\]", path.read_text()) if path.is_file() else None
    mode = found[1] if found else "not in this kernel"
    fine = mode in good
    mend = f"as root: echo {wanted} > /{_THP}/{file}"
    return Finding(name, mode, fine, cost, mend, {"mode": found[1] if found else None})


def pressure(root: Path) -> Finding:
    try:
        text = (root / "proc/pressure/memory").read_text()
    except OSError:
        text = ""
    found = re.search(r"some avg10=([\d.]+)", text)
    if found is None:
        return Finding(
            "memory pressure",
            "not told",
            False,
            "a shortage of host memory is seen only when the kernel already swaps or kills",
            "boot with psi=1 (Linux 4.20 or later)",
            {"some_avg10": None},
        )
    share = float(found[1])
    fine = share < 10
    return Finding(
        "memory pressure",
        f"{share:.0f} % of the last 10 s were stalled on memory" if share else "none in the last 10 s",
        fine,
        "this machine is short of memory now: loads and answers will stall",
        "free memory before serving",
        {"some_avg10": share},
    )


def shm(size_bytes: int) -> Finding:
    fine = size_bytes >= _ENOUGH_SHM_BYTES
    return Finding(
        "/dev/shm",
        format_bytes(size_bytes),
        fine,
        "engines that run one model on several GPUs talk through it and may fail to start",
        "docker run --shm-size=8g (or --ipc=host)",
        {"size_bytes": size_bytes},
    )


def _meminfo(root: Path, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", (root / "proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * KiB if found else 0
