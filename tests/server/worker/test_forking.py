from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, threading
from mball.server.worker.forking import unfit
named, done = threading.Barrier(2), threading.Event()
def work(name):
    ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)
    named.wait()
    done.wait()
for name in sys.argv[1:]:
    threading.Thread(target=work, args=(name,), daemon=True).start()
    named.wait()
print(unfit())
done.set()
"""


def said(*threads: str) -> str:
    command = [sys.executable, "-c", PROGRAM, *threads]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()


def test_one_thread_and_no_cuda_may_fork() -> None:
    assert said() == "None"


def test_threads_that_nobody_misses() -> None:
    assert said("jemalloc_bg_thd", "cuda0000180000") == "None"


@pytest.mark.parametrize("name", ["python3", "cuda-EvtHandlr", "ZMQbg/IO/0"])
def test_any_other_is_named(name: str) -> None:
    assert f"({name})" in said("jemalloc_bg_thd", name)
