from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import psutil
import pytest
import structlog

from mball.device.proc import start_ticks
from mball.memory.launch import base_environment
from mball.memory.nursery import Nursery
from mball.memory.process import WorkerProcess
from mball.memory.settings import Settings
from mball.memory.spec import WorkerSpec
from tests import fake_worker, fake_zygote
from tests.fake_worker import Knobs
from tests.memory.conftest import QUICK

Opened = Callable[..., AbstractAsyncContextManager[Nursery]]


@pytest.fixture
def nursery(runtime_dir: Path) -> Opened:
    @asynccontextmanager
    async def opened(fault: str | None = "", settings: Settings = QUICK) -> AsyncIterator[Nursery]:
        zygotes = {} if fault is None else {tuple(fake_worker.command()): fake_zygote.command(fault)}
        made = Nursery(zygotes, settings, runtime_dir, runtime_dir)
        try:
            await made.open()
            yield made
        finally:
            await made.close()

    return opened


async def start(
    nursery: Nursery, folder: Path, knobs: Knobs | None = None, digest: str = "", **extra: str
) -> WorkerProcess:
    worker, _ = await WorkerProcess.start(
        fake_worker.command(),
        WorkerSpec(model="m", path="/m", socket_path=str(folder / "s"), threads=3, environment_digest=digest),
        extra_environment={**(knobs or Knobs()).environment(), **extra},
        log=folder / "m.log",
        settings=QUICK,
        launch=nursery.launch,
    )
    return worker


def is_forked(folder: Path) -> bool:
    return (folder / "m.log").read_text().splitlines()[-1].endswith("forked")


async def until(condition: Callable[[], bool], deadline_s: float = 120.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - /proc has no events
            await asyncio.sleep(0.01)


def descriptors(pid: int) -> list[str]:
    """What its open descriptors lead to."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(fd.readlink()))
    return found


def zygote_of(nursery: Nursery) -> psutil.Process:
    (pid,) = [pid for pid in nursery.pids() if "fake_zygote" in " ".join(psutil.Process(pid).cmdline())]
    return psutil.Process(pid)


async def test_a_forked_worker_is_the_managers_child_with_a_session_environment_and_log_of_its_own(
    nursery: Opened, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret")
    async with nursery() as made:
        worker = await start(made, runtime_dir, EXTRA="1")
        assert is_forked(runtime_dir)
        process = psutil.Process(worker.pid)
        assert process.ppid() == os.getpid()
        assert os.getsid(worker.pid) == os.getpgid(worker.pid) == worker.pid
        assert process.num_threads() == 1
        assert [word for word in process.cmdline() if word][-2:] == ["--spec", worker.spec.to_json()]
        status = await worker.call("status", deadline_s=5.0)
        assert status["environment"]["OMP_NUM_THREADS"] == "3"
        assert status["environment"]["EXTRA"] == "1"
        assert "HF_TOKEN" not in status["environment"]
        opened = descriptors(worker.pid)
        assert {name for name in opened if name.startswith("/")} == {"/dev/null", str(runtime_dir / "m.log")}
        assert not {name for name in set(opened) & set(descriptors(zygote_of(made).pid)) if name.startswith("socket")}
        await worker.stop(QUICK)
        assert worker.exit_code == 0


async def test_one_with_an_environment_of_its_operators_is_not_forked(nursery: Opened, runtime_dir: Path) -> None:
    """A zygote has read its own while it imported."""
    async with nursery() as made:
        worker = await start(made, runtime_dir, digest="ab", EXTRA="1")
        assert not is_forked(runtime_dir)
        assert (await worker.call("status", deadline_s=5.0))["environment"]["EXTRA"] == "1"
        await worker.stop(QUICK)


async def test_two_forks_have_two_random_states(nursery: Opened, runtime_dir: Path) -> None:
    async with nursery() as made:
        drawn = set()
        for _ in range(2):
            worker = await start(made, runtime_dir)
            drawn |= set((await worker.call("status", deadline_s=5.0))["drawn"])
            await worker.stop(QUICK)
    assert len(drawn) == 4


async def test_a_killed_worker_leaves_no_zombie_and_its_code_is_known(nursery: Opened, runtime_dir: Path) -> None:
    async with nursery() as made:
        worker = await start(made, runtime_dir, Knobs(orphan=True))
        (child,) = psutil.Process(worker.pid).children()
        os.kill(worker.pid, signal.SIGKILL)
        assert await worker.wait(10.0)
        assert worker.exit_code == -signal.SIGKILL
        await worker.stop(QUICK)
        await until(lambda: not psutil.pid_exists(child.pid))
        assert not psutil.pid_exists(worker.pid)


async def test_a_dead_zygote_takes_no_worker_with_it_and_another_comes(nursery: Opened, runtime_dir: Path) -> None:
    async with nursery() as made:
        worker = await start(made, runtime_dir)
        first = zygote_of(made)
        first.kill()
        await until(lambda: start_ticks(first.pid) is None)
        assert (await worker.call("status", deadline_s=5.0))["resident"] is False
        await until(lambda: any("fake_zygote" in " ".join(psutil.Process(p).cmdline()) for p in made.pids()))
        assert zygote_of(made).pid != first.pid
        await worker.stop(QUICK)
        async with asyncio.timeout(30.0):
            while True:
                worker = await start(made, runtime_dir)
                await worker.stop(QUICK)
                if is_forked(runtime_dir):
                    break


@pytest.mark.parametrize("fault", ["threads", "mute", "ends", "hangs", "no command", None])
async def test_without_a_zygote_workers_start_afresh_and_one_warning_says_what_it_costs(
    nursery: Opened, runtime_dir: Path, fault: str | None
) -> None:
    settings = dataclasses.replace(QUICK, fork_s=0.3, start_s=2.0, max_backoff_s=30.0, backoff_s=15.0)
    with structlog.testing.capture_logs() as logs:
        async with nursery(fault, settings) as made:
            if fault == "no command":
                await made.close()
                made = Nursery({tuple(fake_worker.command()): ["/no/such"]}, settings, runtime_dir, runtime_dir)
                await made.open()
            for _ in range(2):
                worker = await start(made, runtime_dir)
                assert not is_forked(runtime_dir)
                await worker.stop(QUICK)
            await made.close()
    warnings = [log for log in logs if log["event"].startswith("worker started afresh")]
    assert len(warnings) == (0 if fault is None else 1)
    if warnings:
        assert "seconds longer" in warnings[0]["event"]


async def test_what_is_read_when_a_program_is_loaded_needs_a_fresh_start(nursery: Opened, runtime_dir: Path) -> None:
    async with nursery() as made:
        worker = await start(made, runtime_dir, GOMP_SPINCOUNT="7")
        assert not is_forked(runtime_dir)
        await worker.stop(QUICK)
        worker = await start(made, runtime_dir, GOMP_SPINCOUNT="10000", OMP_NUM_THREADS="2")
        assert is_forked(runtime_dir)
        await worker.stop(QUICK)


async def test_a_hung_zygote_is_replaced(nursery: Opened, runtime_dir: Path) -> None:
    settings = dataclasses.replace(QUICK, fork_s=0.3)
    async with nursery(settings=settings) as made:
        worker = await start(made, runtime_dir)
        await worker.stop(QUICK)
        hung = zygote_of(made)
        hung.suspend()
        worker = await start(made, runtime_dir)
        assert not is_forked(runtime_dir)
        await until(lambda: start_ticks(hung.pid) is None)
        await worker.stop(QUICK)


async def test_a_start_that_is_cancelled_while_it_forks_leaves_no_process(nursery: Opened, runtime_dir: Path) -> None:
    async with nursery() as made:
        worker = await start(made, runtime_dir)
        await worker.stop(QUICK)
        zygote = zygote_of(made)
        zygote.suspend()
        starting = asyncio.create_task(start(made, runtime_dir))
        await asyncio.sleep(0.1)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        zygote.resume()
        await until(lambda: not zygote.children())
        before = set(made.pids())
        worker = await start(made, runtime_dir)
        mine = {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}
        keeper = {p for p in mine if "keeper" in " ".join(psutil.Process(p).cmdline())}
        assert mine - keeper == before | {worker.pid}
        await worker.stop(QUICK)


async def test_a_worker_that_is_lost_and_found_has_one_owner(nursery: Opened, runtime_dir: Path) -> None:
    """The zygote's late answer and the look for strays both name it."""
    async with nursery() as made:
        with subprocess.Popen(["sleep", "600"], start_new_session=True) as lost, told() as errors:  # noqa: ASYNC220
            assert made._adopt(lost.pid)
            assert not made._adopt(lost.pid)
            await until(lambda: lost.pid not in made.pids())
            assert not made._adopt(lost.pid)
            await asyncio.sleep(0)
            assert errors == []
            lost.returncode = -signal.SIGKILL  # it was waited for


@contextlib.contextmanager
def told() -> Iterator[list[object]]:
    """What the loop's callbacks raised."""
    errors: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: errors.append(context))
    yield errors
    loop.set_exception_handler(None)


async def test_what_left_the_group_ends_too(nursery: Opened, runtime_dir: Path) -> None:
    async with nursery() as made:
        worker = await start(made, runtime_dir, Knobs(orphan=True, leaves_group=True))
        (child,) = psutil.Process(worker.pid).children()
        await until(lambda: os.getpgid(child.pid) == child.pid)
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: not psutil.pid_exists(child.pid))
        await worker.stop(QUICK)


async def test_closing_leaves_no_process_and_no_descriptor(nursery: Opened, runtime_dir: Path) -> None:
    before = len(descriptors(os.getpid()))
    async with nursery() as made:
        worker = await start(made, runtime_dir)
        await worker.stop(QUICK)
    assert not [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert len(descriptors(os.getpid())) == before
    assert not list(runtime_dir.glob("*.run"))


def test_a_worker_whose_manager_is_gone_does_not_begin(runtime_dir: Path) -> None:
    """The zygote is asked by a process that is not to be the worker's parent."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker_end, other = socket.socketpair()
    line = [*fake_zygote.command(), "--room", "." * 2000, "--control-fd", str(theirs.fileno())]
    popen = subprocess.Popen(line, pass_fds=[theirs.fileno()], env=base_environment(1))
    with ours, theirs, worker_end, other:
        assert json.loads(ours.recv(65536))["event"] == "hello"
        spec = WorkerSpec(model="m", path="/m", socket_path=str(runtime_dir / "s"))
        message = {
            "id": 1,
            "verb": "fork",
            "spec": spec.to_json(),
            "environment": {},
            "log": str(runtime_dir / "l"),
            "manager": 1 << 22,
            "zygote_environment": {},
        }
        socket.send_fds(ours, [json.dumps(message).encode()], [other.fileno()])
        pid = json.loads(ours.recv(65536))["result"]["pid"]
        other.close()
        worker_end.settimeout(10)
        assert worker_end.recv(1) == b""
        assert not (runtime_dir / "l").exists()
        deadline = time.monotonic() + 10.0
        while start_ticks(pid) is not None:
            assert time.monotonic() < deadline
        popen.kill()
        popen.wait()
