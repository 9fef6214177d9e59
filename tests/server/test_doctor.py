from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mball.server.cli import app
from mball.server.doctor import Finding, Report, examine, gpus, memory
from mball.server.doctor.cli import render
from mball.server.doctor.disk import read_cached, read_direct
from mball.server.doctor.gpus import Driver, GpuFacts
from mball.units import GiB, MiB

FILES = {
    "proc/meminfo": "MemTotal:       67108864 kB\nMemAvailable:   50331648 kB\nSwapTotal:       1048576 kB\n",
    "proc/self/cgroup": "0::/serving/mball\n",
    "proc/self/limits": "Limit  Soft Limit  Hard Limit  Units\nMax locked memory         8388608   8388608   bytes\n",
    "proc/self/status": "Name:\tpython\nCapEff:\t0000000000000000\n",
    "proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size [advise] never deny force\n",
    "sys/fs/cgroup/serving/mball/memory.max": "max\n",
    "sys/devices/system/node/node0/cpulist": "0-7\n",
    "sys/devices/system/node/node1/cpulist": "8-15\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """/proc and /sys of a machine where all is well but for locked memory."""
    for name, text in FILES.items():
        put(tmp_path, name, text)
    (tmp_path / "proc/self/ns").mkdir()
    (tmp_path / "proc/self/ns/pid").symlink_to("pid:[4026531836]")
    (tmp_path / "dev/shm").mkdir(parents=True)
    return tmp_path


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def look(root: Path) -> Report:
    return examine(root, root=root, probe_s=0.02)


def test_a_good_machine_is_fine(root: Path) -> None:
    report = look(root)
    assert report["dram"].fine
    assert report["dram"].data == {"total_bytes": 64 * GiB, "available_bytes": 48 * GiB}
    for name in ("cgroup limit", "huge pages", "huge pages for images", "memory pressure", "pids"):
        assert report[name].fine, name
    assert report["cores"].data == {"cores": len(os.sched_getaffinity(0)), "numa_nodes": 2}


@pytest.mark.parametrize(
    ("name", "file", "text", "value"),
    [
        ("dram", "proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 1048576 kB\n", "1.0 GiB free of 8.0 GiB"),
        ("cgroup limit", "sys/fs/cgroup/serving/mball/memory.max", str(4 * GiB), "4.0 GiB"),
        ("cgroup limit", "sys/fs/cgroup/serving/memory.max", str(2 * GiB), "2.0 GiB"),
        ("huge pages", "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n", "never"),
        ("huge pages for images", "sys/kernel/mm/transparent_hugepage/shmem_enabled", "always [never]\n", "never"),
        ("memory pressure", "proc/pressure/memory", "some avg10=42.10 avg60=0.00 total=1\n", "42 %"),
    ],
)
def test_what_is_wrong_is_told_with_its_cost(root: Path, name: str, file: str, text: str, value: str) -> None:
    put(root, file, text)
    finding = look(root)[name]
    assert not finding.fine
    assert value in finding.value
    assert finding.cost
    assert finding.mend


@pytest.mark.parametrize("limit", [3 * GiB, 9223372036854771712])
def test_a_limit_of_cgroup_version_1(root: Path, limit: int) -> None:
    put(root, "proc/self/cgroup", "8:pids:/\n4:memory:/box/one\n0::/\n")
    put(root, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", f"{limit}\n")
    put(root, "sys/fs/cgroup/memory/box/one/memory.limit_in_bytes", "9223372036854771712\n")
    assert look(root)["cgroup limit"].data["limit_bytes"] == (3 * GiB if limit == 3 * GiB else None)


def test_a_container_sees_only_the_top_of_its_cgroup(root: Path) -> None:
    put(root, "proc/self/cgroup", "0::/not/mounted/here\n")
    put(root, "sys/fs/cgroup/memory.max", str(GiB))
    assert look(root)["cgroup limit"].data["limit_bytes"] == GiB


@pytest.mark.parametrize(
    ("file", "text", "fine"),
    [
        ("proc/self/limits", FILES["proc/self/limits"], False),
        ("proc/self/limits", "Max locked memory         unlimited   unlimited   bytes\n", True),
        ("proc/self/status", "CapEff:\t000001fffeffffff\n", True),
        ("proc/meminfo", "MemTotal: 67108864 kB\nMemAvailable: 50331648 kB\nSwapTotal: 0 kB\n", True),
    ],
    ids=["8 MiB", "unlimited", "CAP_IPC_LOCK", "no swap"],
)
def test_memlock(root: Path, file: str, text: str, fine: bool) -> None:
    put(root, file, text)
    assert memory.memlock(root).fine is fine


def test_what_is_missing_is_a_finding_and_no_error(root: Path) -> None:
    for file in FILES:
        (root / file).unlink()
    report = look(root)
    assert not report["dram"].fine
    assert report["dram"].value.startswith("unknown")
    assert report["memory pressure"].value == "not told"
    assert report["huge pages"].value == "not in this kernel"


def test_pids_of_a_container_are_hidden(root: Path) -> None:
    (root / "proc/self/ns/pid").unlink()
    (root / "proc/self/ns/pid").symlink_to("pid:[4026532201]")
    assert not look(root)["pids"].fine


def test_gpus_are_told_one_by_one() -> None:
    whole = GpuFacts(0, "GPU-a", "NVIDIA H100", 80 * GiB, 79 * GiB, mig=False, pcie_generation=5, pcie_lanes=16)
    divided = GpuFacts(1, "GPU-b", "NVIDIA H100", 80 * GiB, 79 * GiB, mig=True, pcie_generation=None, pcie_lanes=None)
    first, second = gpus.findings(Driver("570.1", (whole, divided)))
    assert first.fine
    assert first.value == "NVIDIA H100, 79.0 GiB free of 80.0 GiB, PCIe 5 x16, driver 570.1"
    assert first.data["uuid"] == "GPU-a"
    assert not second.fine
    assert second.value.endswith("MIG on")


def test_without_a_driver_there_is_no_gpu() -> None:
    (finding,) = gpus.findings(Driver(error="Driver Not Loaded"))
    assert finding.value == "none (Driver Not Loaded)"
    assert not finding.fine


def test_the_disk_is_measured_and_nothing_is_left(tmp_path: Path, root: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    report = examine(folder, root=root, probe_s=0.05)
    assert report["disk"].data["bytes_per_s"] > 0
    assert report["page cache"].data["bytes_per_s"] > 0
    assert list(folder.iterdir()) == []


def test_a_model_that_is_there_is_read_in_place(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(8 * MiB + 17))
    for rate in (read_direct(file, 0.02), read_cached(file, 0.02), read_direct(file, 0.0), read_cached(file, 0.0)):
        assert rate.nbytes >= 4 * MiB
        assert rate.nbytes % MiB == 0


def test_a_folder_that_is_not_there_is_a_finding(root: Path) -> None:
    report = examine(root / "nowhere", root=root, probe_s=0.02)
    assert not report["disk"].fine
    assert "No such file" in report["disk"].value


def test_the_view_shows_cost_and_way_out_of_what_is_wrong_alone() -> None:
    good, bad = Finding("good", "yes", True, "never shown", "never"), Finding("bad", "no", False, "slow", "mend it")
    console = Console(width=100, file=io.StringIO())
    with console.capture() as shown:
        console.print(render(Report((good, bad))))
    text = shown.get()
    assert "never" not in text
    assert "✗  bad" in text
    assert "→ mend it" in text


def test_the_command_prints_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tmp_path), "--json"])
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert found["fine"] == all(finding["fine"] for finding in found["findings"])
    assert {"dram", "cores", "disk", "page cache"} <= {finding["name"] for finding in found["findings"]}
