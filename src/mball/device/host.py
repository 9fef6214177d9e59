"""The host's side of a transfer: cores, NUMA nodes, memory that may be pinned."""

from __future__ import annotations

import os
from pathlib import Path

SYSFS = Path("/sys")
CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")

_COPYING_THREADS = 8


def usable_cpus(among: frozenset[int] = frozenset()) -> int:
    """Cores that this process may run on, of those given where it may run on any of them."""
    mine = os.sched_getaffinity(0)
    return len(mine & among) or len(mine)


def host_threads() -> int:
    """Threads that copy between files and memory: more than that add nothing."""
    return min(usable_cpus(), _COPYING_THREADS)


def node_cpus(pci_bus_id: str, sysfs: Path = SYSFS) -> frozenset[int]:
    """The cores on the NUMA node of a PCI device (`0000:17:00.0`); none where there is one node, or it is unknown."""
    nodes = sysfs / "devices/system/node"
    if len(list(nodes.glob("node[0-9]*"))) < 2:
        return frozenset()
    try:
        node = int((sysfs / "bus/pci/devices" / pci_bus_id.lower() / "numa_node").read_text())
        return parse_cpus((nodes / f"node{node}/cpulist").read_text()) if node >= 0 else frozenset()
    except (OSError, ValueError):
        return frozenset()


def parse_cpus(text: str) -> frozenset[int]:
    """`0-3,8,10-11`, as the kernel writes it. Raises ValueError."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def pin_thread(cpus: frozenset[int]) -> None:
    """Keep the calling thread, and so the memory it touches first, on those of the cores that it may use."""
    if mine := cpus & os.sched_getaffinity(0):
        os.sched_setaffinity(0, mine)


def available_bytes(cgroup: Path = CGROUP, own: Path = OWN_CGROUP, meminfo: Path = MEMINFO) -> int:
    """Memory that this process can still take: the least of the system's, and its cgroup's (v2) and those above it.

    File pages that can be dropped count as free.
    """
    found = [_system_room(meminfo)]
    folder = cgroup / _own_cgroup(own)
    while folder.is_relative_to(cgroup):
        found += _cgroup_room(folder)
        folder = folder.parent
    return max(0, min(found))


def _system_room(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _own_cgroup(own: Path) -> str:
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")), "")


def _cgroup_room(folder: Path) -> list[int]:
    try:
        limit_bytes = int((folder / "memory.max").read_text())
        used_bytes = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [limit_bytes - used_bytes + int(stat.get("inactive_file", 0))]
    except (OSError, ValueError):
        # No such file, or `max`: this one sets no limit.
        return []
