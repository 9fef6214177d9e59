from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from mball.device import proc
from mball.device.cpu import CpuDevice
from mball.units import MiB

TREE = f"""
import subprocess, sys, threading
lump = bytearray({32 * MiB})
inner = "import sys; lump = bytearray({16 * MiB}); print('there', flush=True); sys.stdin.read()"
def start():
    global child
    child = subprocess.Popen([sys.executable, "-c", inner], stdin=subprocess.PIPE, stdout=sys.stdout)
starter = threading.Thread(target=lambda: (start(), child.wait()), daemon=True)
starter.start()
sys.stdin.read()
child.stdin.close()
"""


@pytest.fixture
def tree() -> Iterator[int]:
    """A process with a child, which a thread of it has started, below two shells; its pid."""
    shell = subprocess.Popen(
        ["/bin/sh", "-c", 'sh -c \'"$0" -c "$1"; true\' "$0" "$1"; true', sys.executable, TREE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert shell.stdout is not None
    assert shell.stdout.readline() == b"there\n"
    yield shell.pid
    shell.communicate()


def test_a_family_is_all_that_descend(tree: int) -> None:
    children = [child.pid for child in psutil.Process(tree).children(recursive=True)]
    assert len(children) == 3
    assert sorted(proc.family(tree)) == sorted([tree, *children])
    held = proc.family_private_bytes(tree)
    assert held is not None
    assert held > 48 * MiB
    assert CpuDevice().process_bytes(tree, baseline_bytes=16 * MiB) == pytest.approx(held - 16 * MiB, abs=MiB)
    assert (proc.private_bytes(tree) or 0) < 16 * MiB


def test_one_alone_is_its_own_family() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert proc.family(process.pid) == [process.pid]
    process.communicate(b"\n")
    assert proc.family_private_bytes(process.pid) is None


def test_a_process_that_is_gone() -> None:
    assert proc.family(2**22 - 1) == [2**22 - 1]
    assert os.getpid() in proc.family(os.getpid())
