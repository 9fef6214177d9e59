from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from mball.device.proc import start_ticks
from mball.errors import TransitionError, VerbFailed, WorkerDied, WorkerNotStarted
from mball.memory.launch import environment
from mball.memory.process import Hello, WorkerProcess
from mball.memory.settings import Settings
from mball.memory.spec import WorkerSpec
from tests.fake_worker import Knobs, command
from tests.memory.conftest import QUICK


async def start(
    folder: Path, knobs: Knobs | None = None, *, settings: Settings = QUICK, line: list[str] | None = None
) -> tuple[WorkerProcess, Hello]:
    return await WorkerProcess.start(
        line or command(),
        WorkerSpec(model="m", path="/m", socket_path=str(folder / "s"), device="cpu"),
        extra_environment=(knobs or Knobs()).environment(),
        log=folder / "m.log",
        settings=settings,
    )


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


async def test_a_worker_says_hello_answers_and_ends_when_asked(runtime_dir: Path) -> None:
    before = descriptors()
    worker, hello = await start(runtime_dir)
    assert hello.weights_bytes == Knobs().weights_bytes
    assert hello.baseline_bytes > 0
    assert (await worker.call("status", deadline_s=5.0))["resident"] is False
    with pytest.raises(VerbFailed, match="unknown verb"):
        await worker.call("dance", deadline_s=5.0)
    await worker.stop(QUICK)
    assert worker.exit_code == 0
    assert descriptors() == before


async def test_one_that_hangs_is_killed_with_its_group_in_bounded_time(runtime_dir: Path) -> None:
    settings = dataclasses.replace(QUICK, verb_s=0.1, term_s=0.1)
    worker, _ = await start(runtime_dir, Knobs(hang_at="stop", deaf=True, orphan=True), settings=settings)
    (child,) = psutil.Process(worker.pid).children()
    began = asyncio.get_running_loop().time()
    await worker.stop(settings)
    assert worker.exit_code == -signal.SIGKILL
    assert asyncio.get_running_loop().time() - began < QUICK.kill_s
    # It was killed with its group, but is not ours to wait for.
    async with asyncio.timeout(20.0):
        while start_ticks(child.pid) is not None:  # noqa: ASYNC110 - /proc has no events
            await asyncio.sleep(0.01)


async def test_calls_under_way_learn_of_its_death(runtime_dir: Path) -> None:
    worker, _ = await start(runtime_dir, Knobs(hang_at="demote"))
    told = []
    worker.on_exit(lambda: told.append(worker.exit_code))
    calling = asyncio.create_task(worker.call("demote", deadline_s=30.0))
    await asyncio.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="ended during demote"):
        await calling
    assert told == [-signal.SIGKILL]
    worker.on_exit(lambda: told.append(None))
    assert told == [-signal.SIGKILL, None]
    await worker.stop(QUICK)


async def test_no_answer_in_time(runtime_dir: Path) -> None:
    worker, _ = await start(runtime_dir, Knobs(hang_at="demote"))
    with pytest.raises(TransitionError, match=r"no answer to demote within 0\.1 s"):
        await worker.call("demote", deadline_s=0.1)
    await worker.stop(QUICK)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (["/no/such/command"], "/no/such/command"),
        ([sys.executable, "-c", "import sys; sys.exit('I will not')"], "code 1.*\n.*I will not"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], r"no hello in 1 s"),
    ],
)
async def test_a_start_that_fails_says_why_and_leaves_nothing(runtime_dir: Path, line: list[str], reason: str) -> None:
    before = descriptors()
    with pytest.raises(WorkerNotStarted, match=reason) as failed:
        await start(runtime_dir, settings=dataclasses.replace(QUICK, start_s=1.0), line=line)
    assert not failed.value.final
    assert descriptors() == before


async def test_the_workers_own_reason_is_final(runtime_dir: Path) -> None:
    with pytest.raises(WorkerNotStarted, match="no weights") as failed:
        await start(runtime_dir, Knobs(cannot_start="no weights"))
    assert failed.value.final


async def test_a_start_that_is_cancelled_leaves_no_process(runtime_dir: Path) -> None:
    before = descriptors()
    starting = asyncio.create_task(start(runtime_dir, Knobs(start_s=30.0)))
    log = runtime_dir / "m.log"
    async with asyncio.timeout(20.0):
        while not await asyncio.to_thread(lambda: log.exists() and log.stat().st_size):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    # The test's process is a subreaper: what other tests killed may be its child too, and a zombie.
    (child,) = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert start_ticks(child.pid) is None
    assert descriptors() == before


async def test_a_large_log_is_put_aside(runtime_dir: Path) -> None:
    log = runtime_dir / "m.log"
    log.write_text("old\n" * 100)
    worker, _ = await start(runtime_dir, settings=dataclasses.replace(QUICK, log_bytes=100))
    await worker.stop(QUICK)
    assert log.read_text() == "fake worker m, started\n"
    assert (runtime_dir / "m.log.1").read_text() == "old\n" * 100


async def test_a_hello_that_lacks_figures_is_refused(runtime_dir: Path) -> None:
    code = 'import socket, sys; s = socket.socket(fileno=int(sys.argv[2])); s.send(b\'{"event": "hello"}\'); s.recv(9)'
    with pytest.raises(WorkerNotStarted, match="baseline_bytes"):
        await start(runtime_dir, line=[sys.executable, "-c", code])


def test_the_environment_holds_only_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PATH", "/bin")
    spec = WorkerSpec(model="m", path="/m", device="cuda:GPU-1", threads=3)
    made = environment(spec, {"EXTRA": "1", "OMP_NUM_THREADS": "9"})
    assert "HF_TOKEN" not in made
    assert made["PATH"] == "/bin"
    assert made["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert (made["EXTRA"], made["OMP_NUM_THREADS"], made["MKL_NUM_THREADS"]) == ("1", "9", "3")
    assert environment(dataclasses.replace(spec, device="cpu"), {})["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    several = environment(dataclasses.replace(spec, device="cuda:GPU-1+cuda:GPU-2"), {})
    assert (several["CUDA_VISIBLE_DEVICES"], several["NCCL_NVLS_ENABLE"]) == ("GPU-1,GPU-2", "0")
