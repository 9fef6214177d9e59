from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

from mball.device import memfd, proc
from mball.device.cpu import CpuDevice
from mball.units import GiB, MiB

NBYTES = 32 * MiB


def held(baseline: int) -> int:
    found = CpuDevice().process_bytes(os.getpid(), baseline)
    assert found is not None
    return found


def test_private_memory_counts_once_it_is_touched_and_until_it_is_unmapped() -> None:
    baseline = proc.private_bytes(os.getpid())
    assert baseline is not None
    with mmap.mmap(-1, NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        assert held(baseline) < NBYTES // 4
        for page in range(0, NBYTES, 4096):
            memory[page] = 1
        assert NBYTES <= held(baseline) < NBYTES * 1.25
    assert held(baseline) < NBYTES // 4


def test_pages_of_an_image_do_not_count() -> None:
    baseline = proc.private_bytes(os.getpid())
    assert baseline is not None
    fd = memfd.create("image", NBYTES)
    try:
        for at in range(0, NBYTES, MiB):
            os.pwrite(fd, b"\1" * MiB, at)
        assert held(baseline + NBYTES) < NBYTES // 4
        assert held(baseline) < NBYTES // 4
    finally:
        os.close(fd)


def test_below_the_baseline_is_nothing() -> None:
    assert held(1 << 50) == 0


def test_a_process_that_is_gone_or_a_zombie_holds_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert CpuDevice().process_bytes(process.pid) is None
    assert proc.start_ticks(process.pid) is None
    process.wait()
    assert CpuDevice().process_bytes(process.pid) is None
    assert proc.start_ticks(process.pid) is None


def test_a_command_may_be_called_anything(tmp_path: Path) -> None:
    path = tmp_path / "a) b ("
    path.symlink_to("/bin/sleep")
    process = subprocess.Popen([path, "60"])
    try:
        before, here = proc.start_ticks(os.getpid()), proc.start_ticks(process.pid)
        assert before is not None
        assert here is not None
        assert here >= before
    finally:
        process.kill()
        process.wait()


def test_the_machine_has_memory() -> None:
    device = CpuDevice()
    assert 0 < device.free_bytes() <= device.total_bytes
    assert device.total_bytes > GiB // 4
