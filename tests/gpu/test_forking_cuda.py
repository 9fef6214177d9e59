"""When a process that knows of a GPU may still be forked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

NVML = "import pynvml; pynvml.nvmlInit(); pynvml.nvmlDeviceGetCount(); pynvml.nvmlShutdown(); "
CHILD = """
import os
pid = os.fork()
if pid == 0:
    import pynvml, torch
    pynvml.nvmlInit()
    ok = pynvml.nvmlDeviceGetCount() > 0 and float(torch.ones(3, device="cuda").sum()) == 3
    os._exit(0 if ok else 1)
print(os.waitpid(pid, 0)[1])
"""


def said(program: str) -> str:
    program = f"import torch; from mball.server.worker.forking import unfit; {program}; print(unfit())"
    return subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120
    ).stdout


def test_nvml_is_no_hindrance() -> None:
    assert said(NVML + "pass").strip() == "None"


def test_after_nvml_a_child_computes() -> None:
    command = [sys.executable, "-c", "import torch; " + NVML + "\n" + CHILD]
    assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip() == "0"


@pytest.mark.parametrize("begin", ["torch.cuda.init()", "torch.ones(1, device='cuda')"])
def test_cuda_is(begin: str) -> None:
    assert "began CUDA" in said(begin)
