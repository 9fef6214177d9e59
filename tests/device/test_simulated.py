from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mball.device import simulated
from mball.device.account import open_account
from mball.device.device import open_device
from mball.device.simulated import SimulatedDevice
from mball.errors import ConfigError, DeviceError, DeviceOutOfMemory
from mball.units import MiB

TAKE_AND_WAIT = """
import sys
from mball.device.account import open_account
account = open_account(sys.argv[1])
account.take(int(sys.argv[2]))
print("taken", flush=True)
sys.stdin.read()
"""

TAKE_AND_GIVE = """
import sys
from mball.device.account import open_account
from mball.errors import DeviceOutOfMemory
account = open_account(sys.argv[1])
refused = 0
for _ in range(200):
    try:
        account.take(int(sys.argv[2]))
        account.give(int(sys.argv[2]))
    except DeviceOutOfMemory:
        refused += 1
print(refused)
"""


@pytest.fixture
def device(tmp_path: Path) -> SimulatedDevice:
    return SimulatedDevice.create(tmp_path / "gpu", 100 * MiB, context_bytes=3 * MiB)


def holder(device: SimulatedDevice, nbytes: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_AND_WAIT, device.name, str(nbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_over_commit_is_refused_with_the_numbers_and_takes_nothing(device: SimulatedDevice) -> None:
    account = open_account(device.name)
    account.take(90 * MiB)
    with pytest.raises(DeviceOutOfMemory) as refused:
        account.take(8 * MiB)
    assert (refused.value.wanted_bytes, refused.value.free_bytes, refused.value.total_bytes) == (
        8 * MiB,
        7 * MiB,
        100 * MiB,
    )
    assert device.process_bytes(os.getpid()) == 93 * MiB
    account.give(90 * MiB)
    assert device.free_bytes() == 97 * MiB
    assert device.refusals == 1


def test_capacity_holds_between_processes(device: SimulatedDevice) -> None:
    other = holder(device, 60 * MiB)
    try:
        assert device.process_bytes(other.pid) == 63 * MiB
        with pytest.raises(DeviceOutOfMemory):
            open_account(device.name).take(35 * MiB)
    finally:
        end(other)


def test_what_a_killed_process_held_is_free(device: SimulatedDevice) -> None:
    other = holder(device, 60 * MiB)
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert device.process_bytes(other.pid) is None
    assert device.free_bytes() == 100 * MiB
    end(other)


def test_a_later_process_of_the_same_pid_is_another(device: SimulatedDevice) -> None:
    device.take(os.getpid(), 10 * MiB)
    state = simulated._read(device.path)
    state.holders[os.getpid()].start_ticks -= 1
    simulated._write(device.path, state)
    assert device.process_bytes(os.getpid()) is None


def test_a_context_that_has_no_room_is_refused(device: SimulatedDevice) -> None:
    device.take(os.getpid(), 98 * MiB)
    other = subprocess.run([sys.executable, "-c", TAKE_AND_WAIT, device.name, "0"], capture_output=True, text=True)
    assert "DeviceOutOfMemory" in other.stderr


def test_more_than_was_taken_cannot_be_given(device: SimulatedDevice) -> None:
    with pytest.raises(DeviceError, match="holds 0 bytes"):
        device.give(os.getpid(), 1)
    device.take(os.getpid(), 5)
    with pytest.raises(DeviceError, match="holds 5 bytes"):
        device.give(os.getpid(), 6)


def test_many_processes_at_once_lose_no_byte(device: SimulatedDevice) -> None:
    command = [sys.executable, "-c", TAKE_AND_GIVE, device.name, str(40 * MiB)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    refused = [int(process.communicate()[0]) for process in processes]
    assert sum(refused) == device.refusals
    assert device.peak_bytes <= device.total_bytes
    assert device.free_bytes() == device.total_bytes


def test_a_lock_that_is_never_let_go_is_an_error_not_a_hang(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated, "_LOCK_S", 0.05)
    with Path(f"{device.path}.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DeviceError, match="lock"):
            device.free_bytes()


def test_devices_by_name(device: SimulatedDevice, tmp_path: Path) -> None:
    assert open_device(device.name).total_bytes == 100 * MiB
    assert open_device("cpu").name == "cpu"
    with pytest.raises(DeviceError, match="no such device"):
        open_device(f"simulated:{tmp_path}/none")
    for name in ("tpu", "cpu:1", "simulated:", ""):
        with pytest.raises(ConfigError):
            open_device(name)


def test_accounts_by_name() -> None:
    for name in ("cpu", "cuda:GPU-0"):
        account = open_account(name)
        account.take(1 << 60)
        account.give(1 << 60)
    with pytest.raises(ConfigError):
        open_account("tpu")
