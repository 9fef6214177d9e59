"""Verbs over a control channel, beside each other."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mball.device import memfd
from mball.errors import Cancelled, VerbFailed
from mball.memory import control
from mball.memory.spec import WorkerSpec
from mball.server.worker.service import Service
from mball.server.worker.tokenizer import Tokenizer
from mball.server.worker.verbs import Verbs
from tests.server.worker.echo_engine import EchoEngine


class SlowEngine(EchoEngine):
    """Its images take as long as nobody gives them up."""

    def __init__(self) -> None:
        super().__init__(vocab_size=600, eos=2)
        self.begun = threading.Event()
        self.slow = True
        self.keys: list[bytes | None] = []
        """What its files are named by, one time after another."""

    def image_key(self) -> bytes | None:
        return self.keys.pop(0) if self.keys else None

    def fill_image(self, image_fd: int, cancel: threading.Event | None = None) -> int:
        self.begun.set()
        if self.slow:
            assert cancel is not None
            assert cancel.wait(60)
            raise Cancelled("given up")
        return super().fill_image(image_fd, cancel)


@pytest.fixture
async def worker(tokenizer: Tokenizer) -> AsyncIterator[tuple[control.Caller, SlowEngine]]:
    engine = SlowEngine()
    service = Service(WorkerSpec("echo", "/models/echo"), engine, tokenizer)
    ours, theirs = (control.Channel(sock) for sock in control.pair())
    verbs = Verbs(service, theirs, lambda: None)
    serving = asyncio.create_task(control.serve(theirs, verbs.table()))
    caller = control.Caller(ours, lambda _: None)
    yield caller, engine
    await caller.close()
    async with asyncio.timeout(30):
        await serving
    theirs.close()
    verbs.close()
    service.close()
    engine.close()


async def test_an_image_that_is_not_wanted_any_more_is_filled_no_further(
    worker: tuple[control.Caller, SlowEngine],
) -> None:
    caller, engine = worker
    fd = memfd.create("slow", engine.image_bytes)
    filling = asyncio.create_task(caller.call("image", deadline_s=60, fd=fd, state="empty"))
    assert await asyncio.to_thread(engine.begun.wait, 30)
    await caller.call("drop_image", deadline_s=30)
    with pytest.raises(VerbFailed, match="Cancelled: given up"):
        await filling
    held = await asyncio.to_thread(
        lambda: [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    )
    assert len([name for name in held if "slow" in name]) == 1, "the worker has let go of it"
    engine.slow = False
    assert await caller.call("image", deadline_s=30, fd=fd, state="empty")
    os.close(fd)


async def test_files_that_change_while_an_image_is_filled_leave_it_without_a_name(
    worker: tuple[control.Caller, SlowEngine],
) -> None:
    caller, engine = worker
    engine.slow = False
    fd = memfd.create("named", engine.image_bytes)
    for keys, name in (([b"a", b"a"], b"a".hex()), ([b"a", b"b"], None), ([None, None], None)):
        engine.keys = list(keys)
        assert (await caller.call("image", deadline_s=30, fd=fd, state="empty"))["key"] == name
    os.close(fd)


async def test_an_image_of_other_files_than_those_that_are_there_is_refused(
    worker: tuple[control.Caller, SlowEngine],
) -> None:
    caller, engine = worker
    fd = memfd.create("other", engine.image_bytes)
    for key in (b"b", None):
        engine.keys = [key]
        with pytest.raises(VerbFailed, match="files are others"):
            await caller.call("image", deadline_s=30, fd=fd, state="ready", key=b"a".hex())
    engine.keys = [b"a"]
    await caller.call("image", deadline_s=30, fd=fd, state="ready", key=b"a".hex())
    await caller.call("image", deadline_s=30, fd=fd, state="ready", key=None)
    os.close(fd)
