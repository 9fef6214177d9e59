from __future__ import annotations

import os
from pathlib import Path

import pytest

from mball.device.account import open_account
from mball.device.device import Device, members, open_device, open_devices
from mball.device.simulated import SimulatedDevice
from mball.errors import ConfigError, DeviceError, DeviceOutOfMemory
from mball.units import MiB
from tests.device.test_simulated import holder


@pytest.fixture
def gpus(tmp_path: Path) -> list[SimulatedDevice]:
    sizes = (100 * MiB, 120 * MiB)
    return [SimulatedDevice.create(tmp_path / f"g{n}", size, context_bytes=MiB) for n, size in enumerate(sizes)]


@pytest.fixture
def group(gpus: list[SimulatedDevice]) -> Device:
    return open_device("+".join(gpu.name for gpu in gpus))


def test_its_name_says_whom_it_consists_of(group: Device, gpus: list[SimulatedDevice]) -> None:
    assert members(group.name) == [gpu.name for gpu in gpus]
    assert members("cuda:GPU-1") == ["cuda:GPU-1"]
    assert members("simulated:/a+b+simulated:/c") == ["simulated:/a+b", "simulated:/c"]
    assert [device.name for device in open_devices([group.name, group.name])] == [group.name]


@pytest.mark.parametrize("name", ["{0}+{0}", "{0}+cpu", "cpu+cpu", "{0}+"])
def test_what_is_no_group_is_refused(gpus: list[SimulatedDevice], name: str) -> None:
    with pytest.raises((ConfigError, DeviceError)):
        open_device(name.format(gpus[0].name))


def test_all_bytes_are_those_of_one_member(group: Device, gpus: list[SimulatedDevice]) -> None:
    assert (group.total_bytes, group.context_bytes, group.free_bytes()) == (100 * MiB, MiB, 100 * MiB)
    account = open_account(group.name)
    account.take(30 * MiB)
    assert [gpu.process_bytes(os.getpid()) for gpu in gpus] == [31 * MiB, 31 * MiB]
    assert group.process_bytes(os.getpid()) == 31 * MiB
    assert group.free_bytes() == 69 * MiB
    gpus[1].take(os.getpid(), 10 * MiB)
    assert group.process_bytes(os.getpid()) == 41 * MiB
    assert group.free_bytes() == 59 * MiB
    account.give(30 * MiB)
    assert group.free_bytes() == 89 * MiB
    assert group.process_bytes(1) is None


def test_it_takes_of_every_member_or_of_none(group: Device, gpus: list[SimulatedDevice]) -> None:
    account = open_account(group.name)
    gpus[1].take(os.getpid(), 100 * MiB)
    with pytest.raises(DeviceOutOfMemory):
        account.take(30 * MiB)
    assert [gpu.process_bytes(os.getpid()) for gpu in gpus] == [MiB, 101 * MiB]


def test_strangers_are_those_of_the_member_that_has_most_of_them(group: Device, gpus: list[SimulatedDevice]) -> None:
    others = [holder(gpu, (10 + n) * MiB) for n, gpu in enumerate(gpus)]
    try:
        found = group.foreign({})
        assert [(stranger.pid, stranger.nbytes) for stranger in found.strangers] == [(others[1].pid, 12 * MiB)]
        assert group.foreign({others[1].pid: 0}).nbytes == 11 * MiB
    finally:
        for other in others:
            other.communicate(timeout=30)
