import os
import threading
from pathlib import Path

import pytest

from mball.device.host import available_bytes, node_cpus, parse_cpus, pin_thread, usable_cpus

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
