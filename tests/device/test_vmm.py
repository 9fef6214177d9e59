"""Ranges on the CPU: addresses stay, pages come and go."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from mball.device.libc import LIBC
from mball.device.vmm import HostRange, Range, reserve, rounded
from mball.units import MiB

PAGE = mmap.PAGESIZE


def private_bytes() -> int:
    """Of this process, as smaps counts them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


def resident_bytes(address: int, nbytes: int) -> int:
    """How much of the memory there has pages behind it, as the kernel says."""
    flags = (ctypes.c_ubyte * -(-nbytes // PAGE))()
    assert LIBC.mincore(address, nbytes, flags) == 0
    return sum(flag & 1 for flag in flags) * PAGE


def test_what_goes_is_given_back_and_what_stays_keeps_its_content() -> None:
    space: Range = reserve(64 * MiB, torch.device("cpu"))
    assert space.mapped_bytes == 0
    space.resize(64 * MiB)
    view = space.tensor()
    assert view.shape == (64 * MiB,)
    before = private_bytes()
    view.fill_(7)
    assert private_bytes() - before > 60 * MiB
    assert resident_bytes(view.data_ptr(), 64 * MiB) == 64 * MiB
    space.resize(20 * MiB)
    assert space.mapped_bytes == 20 * MiB
    assert resident_bytes(view.data_ptr(), 64 * MiB) == 20 * MiB
    assert private_bytes() - before < 30 * MiB
    assert bool((view[: 20 * MiB] == 7).all())
    space.resize(64 * MiB)
    assert resident_bytes(view.data_ptr(), 64 * MiB) == 20 * MiB, "pages come at the first touch"
    assert not view[20 * MiB :].any()
    assert space.tensor().data_ptr() == view.data_ptr()
    space.close()
    assert resident_bytes(view.data_ptr(), 64 * MiB) == 0
    space.close()


def test_memory_comes_in_whole_pages() -> None:
    space = HostRange(3 * PAGE + 5)
    space.resize(PAGE + 1)
    assert space.mapped_bytes == 2 * PAGE
    space.resize(3 * PAGE + 1)
    assert space.mapped_bytes == 3 * PAGE + 5, "never more than all"


@given(st.integers(1, 40 * PAGE), st.data())
def test_what_is_mapped_is_enough_and_no_page_too_many(nbytes: int, data: st.DataObject) -> None:
    space = HostRange(nbytes)
    for wanted in data.draw(st.lists(st.integers(0, nbytes), max_size=5)):
        space.resize(wanted)
        assert wanted <= space.mapped_bytes < wanted + PAGE
        assert space.mapped_bytes == rounded(wanted, space)
