"""The host's side of a transfer: cores, NUMA nodes, memory that may be pinned."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

SYSFS = Path("/sys")
CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
PRESSURE = Path("/proc/pressure/memory")

_COPYING_THREADS = 8
_NO_LIMIT_BYTES = 1 << 60
"""v1 writes a huge number for none."""

_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of v2 and v1: the limit, what is used, and what of that is files' pages that can be dropped."""


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
    """Memory that this process can still take: the least of the system's, and its cgroup's (v1 or v2) and those above.

    File pages that can be dropped count as free.
    """
    rooms = [limit - used for limit, used in _memory_limits(cgroup, own)]
    return max(0, min([_meminfo(meminfo, "MemAvailable:"), *rooms]))


def memory_bytes(cgroup: Path = CGROUP, own: Path = OWN_CGROUP, meminfo: Path = MEMINFO) -> int:
    """Memory that this process and its neighbours may have in all: the system's, or the least limit of a cgroup."""
    return min([_meminfo(meminfo, "MemTotal:"), *(limit for limit, _ in _memory_limits(cgroup, own))])


def cpu_quota(cgroup: Path = CGROUP, own: Path = OWN_CGROUP) -> float | None:
    """How many cores a cgroup lets this process keep busy; None without a limit."""
    found = []
    for folder in _folders("cpu", cgroup, own):
        try:
            if (folder / "cpu.max").is_file():
                quota, _, period = (folder / "cpu.max").read_text().partition(" ")
            else:
                quota, period = (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
            if int(quota) > 0:
                found.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            # No such file, or `max`: this one sets no limit.
            continue
    return min(found, default=None)


def pressure_file(cgroup: Path = CGROUP, own: Path = OWN_CGROUP, system: Path = PRESSURE) -> Path | None:
    """Where the kernel says how long this process's cgroup, or the system, stood still for lack of memory."""
    files = [folder / "memory.pressure" for folder in _folders("memory", cgroup, own)]
    return next((file for file in (*files, system) if _readable(file)), None)


def numa_nodes(sysfs: Path = SYSFS) -> list[tuple[int, ...]]:
    """The cores that this process may run on, by NUMA node; one node where the system tells of none."""
    mine = os.sched_getaffinity(0)
    nodes: list[tuple[int, ...]] = []
    for folder in sorted((sysfs / "devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        with contextlib.suppress(OSError, ValueError):
            nodes.append(tuple(sorted(parse_cpus((folder / "cpulist").read_text()) & mine)))
    told = {cpu for node in nodes for cpu in node}
    return [node for node in (*nodes, tuple(sorted(mine - told))) if node]


def _readable(file: Path) -> bool:
    # Where pressure is not accounted for the file may be there, and reading it fails.
    try:
        file.read_text()
    except OSError:
        return False
    return True


def _meminfo(meminfo: Path, name: str) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def _folders(controller: str, cgroup: Path, own: Path) -> Iterator[Path]:
    """This process's folder in each hierarchy that may bound it, and those above, the innermost first.

    Lines of /proc/self/cgroup are `number:controllers:path`, with no controllers for v2, whose root is `cgroup` or,
    beside v1, `cgroup`/unified. In a container the path may be one of the host's: then the root alone is seen.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    roots = [
        (cgroup / name, path)
        for _, names, path in lines
        if controller in names.split(",")
        for name in {names, controller}
    ]
    roots += [(root, path) for _, names, path in lines if not names for root in (cgroup, cgroup / "unified")]
    for root, path in roots or [(cgroup, "/")]:
        folder = root / path.lstrip("/")
        while folder.is_relative_to(root):
            yield folder
            folder = folder.parent


def _memory_limits(cgroup: Path, own: Path) -> Iterator[tuple[int, int]]:
    """(limit, what of it can't be had) of each cgroup that has one, in bytes."""
    for folder in _folders("memory", cgroup, own):
        for limit_file, used_file, cached in _MEMORY_FILES:
            try:
                limit_bytes = int((folder / limit_file).read_text())
                used_bytes = int((folder / used_file).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                # No such file, or `max`: this one sets no limit.
                continue
            if limit_bytes < _NO_LIMIT_BYTES:
                yield limit_bytes, used_bytes - int(stat.get(cached, 0))
