"""Who holds what of a real GPU, as NVML shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mball.device import nvml
from mball.device.device import open_devices
from mball.units import GiB, MiB

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not nvml.gpus(), reason="no NVIDIA GPU")]

_HOLD = "import torch; x = torch.zeros(1 << 30, dtype=torch.uint8, device='cuda'); print(flush=True); input()"


@pytest.fixture
def holders() -> Iterator[list[int]]:
    """Two processes in sessions of their own, with 1 GiB of the first GPU each."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _HOLD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        for _ in range(2)
    ]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    yield [process.pid for process in started]
    for process in started:
        process.communicate(b"\n")


def test_a_stranger_is_told_from_ours_and_nothing_is_hidden(holders: list[int]) -> None:
    device = open_devices(["cuda"])[0]
    ours, other = holders
    held = device.process_bytes(ours)
    if held is None:
        pytest.skip("processes are hidden here")
    here = os.getpid()  # tests before this one have left a context here
    foreign = device.foreign({ours: 0, here: 0})
    assert [stranger.pid for stranger in foreign.strangers] == [other]
    assert foreign.strangers[0].nbytes >= GiB
    assert "python" in foreign.strangers[0].name
    assert foreign.hidden_bytes == 0, "what the driver keeps beside what it tells of is less than the blur"
    assert device.foreign(dict.fromkeys([*holders, here], 0)).nbytes == 0
    used = device.total_bytes - device.free_bytes()
    assert 0 <= used - sum(device.process_bytes(pid) or 0 for pid in (*holders, here)) < 256 * MiB
