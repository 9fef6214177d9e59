"""The benchmark of vLLM's starts, with a vLLM that never comes up."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from mball.bench.cli import app
from mball.device.proc import start_ticks
from mball.server.models import random as random_models
from mball.units import MiB

VLLM = """
import os, pathlib, signal, sys
if "vllm.entrypoints.openai.api_server" not in sys.argv:
    sys.exit("it serves nothing else")
pathlib.Path({pid!r}).write_text(str(os.getpid()))
signal.pause()
"""


def test_a_server_that_it_started_ends_with_it(tmp_path: Path) -> None:
    random_models.make("llama", tmp_path / "m", size_bytes=8 * MiB)
    pid, program, python = tmp_path / "pid", tmp_path / "vllm.py", tmp_path / "python"
    program.write_text(VLLM.format(pid=str(pid)))
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    python.chmod(0o700)
    command = [sys.executable, "-m", "mball", "bench", "start", str(tmp_path / "m"), "--vllm", str(python)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as bench:
        deadline = time.monotonic() + 120
        while not (pid.exists() and pid.read_text()):
            assert time.monotonic() < deadline
            assert bench.poll() is None
            time.sleep(0.1)
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(60) != 0
    assert start_ticks(int(pid.read_text())) is None


def test_a_process_that_ran_one_ends_as_it_did_before(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for arguments in (["simulate", "--help"], ["load", str(tmp_path / "none")], ["start"]):
        CliRunner().invoke(app, arguments)
        assert signal.getsignal(signal.SIGTERM) == before
