from __future__ import annotations

import subprocess
import sys

import pytest

from mball.device import nvml
from mball.device.device import open_device
from mball.errors import DeviceError
from mball.units import MiB


def test_an_unknown_gpu_says_which_there_are() -> None:
    with pytest.raises(DeviceError, match="no such GPU"):
        open_device("cuda:GPU-00000000-0000-0000-0000-000000000000")


@pytest.mark.gpu
@pytest.mark.skipif(not nvml.gpus(), reason="no NVIDIA GPU")
def test_nvml_sees_what_a_process_holds() -> None:
    gpu = nvml.gpus()[0]
    device = open_device(f"cuda:{gpu.uuid}")
    assert device.total_bytes == gpu.total_bytes
    before = device.free_bytes()
    code = "import sys, torch; x = torch.zeros(512 << 20, dtype=torch.uint8, device='cuda'); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    taken = before - device.free_bytes()
    held = device.process_bytes(process.pid)
    process.communicate("\n")
    assert taken >= 512 * MiB
    assert held is None or held >= 512 * MiB
    assert before - device.free_bytes() < 64 * MiB
