import os
import threading
from pathlib import Path

import pytest

from mball.device.host import (
    available_bytes,
    cpu_quota,
    memory_bytes,
    node_cpus,
    numa_nodes,
    parse_cpus,
    pin_thread,
    pressure_file,
    usable_cpus,
)

GPU = "0000:17:00.0"


@pytest.fixture
def two_nodes(tmp_path: Path) -> Path:
    """Two NUMA nodes, and a GPU on the second."""
    for node, cpus in enumerate(("0-3,8\n", "4-7,9-10\n")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus)
    device = tmp_path / "bus/pci/devices" / GPU
    device.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    return tmp_path


def test_the_cores_beside_a_gpu(two_nodes: Path) -> None:
    assert node_cpus(GPU, two_nodes) == {4, 5, 6, 7, 9, 10}
    assert node_cpus("0000:17:00.0".upper(), two_nodes) == {4, 5, 6, 7, 9, 10}


def test_no_choice_where_it_does_not_matter_or_is_unknown(two_nodes: Path) -> None:
    assert node_cpus("0000:99:00.0", two_nodes) == frozenset()
    (two_nodes / "bus/pci/devices" / GPU / "numa_node").write_text("-1\n")
    assert node_cpus(GPU, two_nodes) == frozenset()
    (two_nodes / "bus/pci/devices" / GPU / "numa_node").write_text("1\n")
    (two_nodes / "devices/system/node/node0/cpulist").unlink()
    (two_nodes / "devices/system/node/node0").rmdir()
    assert node_cpus(GPU, two_nodes) == frozenset()


def test_lists_of_cores() -> None:
    assert parse_cpus("0-2,5,7-8\n") == {0, 1, 2, 5, 7, 8}
    assert parse_cpus("\n") == frozenset()
    with pytest.raises(ValueError):
        parse_cpus("a-b")


def test_a_thread_is_kept_on_the_cores_it_may_use_and_no_other_thread_is() -> None:
    mine = os.sched_getaffinity(0)
    wanted = min(mine)
    seen: list[set[int]] = []

    def run() -> None:
        pin_thread(frozenset({wanted, 4096}))
        seen.append(os.sched_getaffinity(0))
        pin_thread(frozenset({4096}))
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert seen == [{wanted}, {wanted}]
    assert os.sched_getaffinity(0) == mine
    assert usable_cpus() == len(mine) == usable_cpus(frozenset({4096}))
    assert usable_cpus(frozenset({wanted, 4096})) == 1


def group(folder: Path, limit: str, used: int, inactive: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_room_is_the_least_of_the_system_and_every_cgroup_above(tmp_path: Path) -> None:
    meminfo, own = tmp_path / "meminfo", tmp_path / "own"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 60 kB\n")
    own.write_text("0::/outer/inner\n")
    root = tmp_path / "cgroup"
    assert available_bytes(root, own, meminfo) == 60 * 1024
    group(root / "outer", "50000", 30000, 10000)
    assert available_bytes(root, own, meminfo) == 30000
    group(root / "outer/inner", "20000", 15000, 0)
    assert available_bytes(root, own, meminfo) == 5000
    group(root / "outer/inner", "max", 15000, 0)
    assert available_bytes(root, own, meminfo) == 30000
    group(root, "1000", 5000, 0)
    assert available_bytes(root, own, meminfo) == 0
    assert available_bytes(root, tmp_path / "none", meminfo) == 0


def old_group(folder: Path, limit: int, used: int, inactive: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 5\ninactive_file 1\ntotal_inactive_file {inactive}\n")


def test_limits_of_cgroup_v1_count_too(tmp_path: Path) -> None:
    meminfo, own, root = tmp_path / "meminfo", tmp_path / "own", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 60 kB\n")
    own.write_text("9:name=systemd:/\n4:memory:/outer/in:ner\n3:cpu,cpuacct:/outer\n0::/\n")
    assert memory_bytes(root, own, meminfo) == 100 * 1024
    assert available_bytes(root, own, meminfo) == 60 * 1024
    old_group(root / "memory/outer", 50000, 30000, 10000)
    assert available_bytes(root, own, meminfo) == 30000
    assert memory_bytes(root, own, meminfo) == 50000
    old_group(root / "memory/outer/in:ner", 20000, 15000, 0)
    assert available_bytes(root, own, meminfo) == 5000
    old_group(root / "memory/outer/in:ner", 9223372036854771712, 15000, 0)
    assert available_bytes(root, own, meminfo) == 30000
    group(root / "unified", "7000", 1000, 0)
    assert available_bytes(root, own, meminfo) == 6000


def test_a_containers_path_that_is_the_hosts_is_looked_for_at_the_root(tmp_path: Path) -> None:
    own, meminfo = tmp_path / "own", tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 60 kB\n")
    own.write_text("4:memory:/docker/0123abc\n")
    old_group(tmp_path / "cgroup/memory", 4000, 1000, 500)
    assert available_bytes(tmp_path / "cgroup", own, meminfo) == 3500


def test_a_quota_of_cores(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("0::/a/b\n")
    assert cpu_quota(root, own) is None
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/cpu.max").write_text("max 100000\n")
    assert cpu_quota(root, own) is None
    (root / "a/cpu.max").write_text("150000 100000\n")
    assert cpu_quota(root, own) == 1.5
    own.write_text("3:cpu,cpuacct:/x\n")
    folder = root / "cpu,cpuacct/x"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(root, own) is None
    (folder / "cpu.cfs_quota_us").write_text("400000\n")
    assert cpu_quota(root, own) == 4.0


def test_pressure_is_the_cgroups_own_else_the_systems_else_unknown(tmp_path: Path) -> None:
    own, root, system = tmp_path / "own", tmp_path / "cgroup", tmp_path / "pressure"
    own.write_text("0::/a\n")
    assert pressure_file(root, own, system) is None
    system.write_text("some avg10=0.00\n")
    assert pressure_file(root, own, system) == system
    (root / "a").mkdir(parents=True)
    (root / "a/memory.pressure").write_text("some avg10=0.00\n")
    assert pressure_file(root, own, system) == root / "a/memory.pressure"


def test_nodes_hold_the_cores_that_may_be_used(tmp_path: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))
    assert numa_nodes(tmp_path) == [tuple(mine)]
    for node, cpus in ((0, mine[:1]), (1, mine[1:]), (10, [4096])):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(",".join(map(str, cpus)) + "\n")
    assert numa_nodes(tmp_path) == [node for node in (tuple(mine[:1]), tuple(mine[1:])) if node]
