from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

import pytest

from mball.errors import DeviceOutOfMemory, VerbFailed, WorkerDied
from mball.memory import control
from mball.memory.control import Caller, Channel, Message


def raw() -> tuple[socket.socket, socket.socket]:
    return control.pair()


@pytest.fixture
async def ends() -> AsyncIterator[tuple[Channel, Channel]]:
    ours, theirs = raw()
    pair = Channel(ours), Channel(theirs)
    yield pair
    for channel in pair:
        channel.close()


@contextlib.asynccontextmanager
async def called(verbs: dict[str, control.Handler]) -> AsyncIterator[tuple[Caller, list[Message], Channel]]:
    ours, theirs = raw()
    events: list[Message] = []
    channel = Channel(theirs)
    caller = Caller(Channel(ours), events.append)
    serving = asyncio.create_task(control.serve(channel, verbs))
    try:
        yield caller, events, channel
    finally:
        await caller.close()
        await asyncio.wait_for(serving, 5.0)
        channel.close()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


async def test_messages_keep_their_bounds_and_order(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    for i in range(50):
        await ours.send({"n": i})
    assert [(await theirs.receive())[0]["n"] for _ in range(50)] == list(range(50))


async def test_a_full_channel_waits_for_its_reader(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    text = "x" * 60_000
    sending = [asyncio.create_task(ours.send({"n": i, "text": text})) for i in range(40)]
    await asyncio.sleep(0.05)
    assert not all(task.done() for task in sending)
    got = [(await theirs.receive())[0] for _ in range(40)]
    assert {message["n"] for message in got} == set(range(40))
    assert all(message["text"] == text for message in got)
    await asyncio.gather(*sending)


async def test_a_message_that_is_too_large_is_refused_here(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(ValueError, match="over 65536"):
        await ends[0].send({"text": "x" * control.MESSAGE_BYTES})


async def test_a_descriptor_comes_over_and_is_not_inherited(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    read, write = os.pipe()
    await ours.send({"verb": "image"}, write)
    os.close(write)
    message, fd = await theirs.receive()
    assert message == {"verb": "image"}
    assert fd is not None
    assert not os.get_inheritable(fd)
    os.write(fd, b"through")
    os.close(fd)
    assert os.read(read, 10) == b"through"
    os.close(read)


@pytest.mark.parametrize("data", [b"not json", b"[1]", b'"text"', b"\xff"])
async def test_what_is_no_message_closes(data: bytes) -> None:
    ours, theirs = raw()
    channel = Channel(ours)
    theirs.sendmsg([data])
    with pytest.raises(control.ChannelClosed, match="not a message"):
        await channel.receive()
    channel.close()
    theirs.close()


async def test_verbs_are_answered_side_by_side() -> None:
    released = asyncio.Event()

    async def slow(message: Message, fd: int | None) -> Message:
        await released.wait()
        return {"was": "slow"}

    async def quick(message: Message, fd: int | None) -> Message:
        released.set()
        return {"was": message["word"]}

    async with called({"slow": slow, "quick": quick}) as (caller, _, _):
        first = asyncio.create_task(caller.call("slow", deadline_s=5.0))
        await asyncio.sleep(0)
        assert await caller.call("quick", deadline_s=5.0, word="quick") == {"was": "quick"}
        assert await first == {"was": "slow"}


async def test_an_error_keeps_its_kind_and_text() -> None:
    async def promote(message: Message, fd: int | None) -> Message:
        raise DeviceOutOfMemory("gpu", 3, 2, 1)

    async with called({"promote": promote}) as (caller, _, _):
        with pytest.raises(VerbFailed, match="3 B wanted") as failed:
            await caller.call("promote", deadline_s=5.0)
        assert failed.value.kind == "DeviceOutOfMemory"
        with pytest.raises(VerbFailed, match="unknown verb 'dance'"):
            await caller.call("dance", deadline_s=5.0)


async def test_a_descriptor_for_an_unknown_verb_is_closed() -> None:
    async with called({}) as (caller, _, _):
        before = open_fds()
        read, write = os.pipe()
        with pytest.raises(VerbFailed):
            await caller.call("dance", deadline_s=5.0, fd=write)
        os.close(read)
        os.close(write)
        assert open_fds() == before


async def test_a_late_answer_is_nobodys() -> None:
    async def late(message: Message, fd: int | None) -> Message:
        await asyncio.sleep(0.05)
        return {"n": message["n"]}

    async with called({"late": late}) as (caller, _, _):
        with pytest.raises(TimeoutError):
            await caller.call("late", deadline_s=0.01, n=1)
        assert await caller.call("late", deadline_s=5.0, n=2) == {"n": 2}


async def test_events_are_handed_on_and_odd_messages_ignored() -> None:
    async with called({}) as (caller, events, worker):
        await worker.send({"id": ["x"]})
        await worker.send({"id": 77, "result": {}})
        await worker.send({"event": "progress", "loaded_bytes": 5})
        with pytest.raises(VerbFailed):
            await caller.call("x", deadline_s=5.0)
        assert events == [{"event": "progress", "loaded_bytes": 5}]


async def test_when_the_worker_ends_callers_are_told_now_and_later() -> None:
    ours, theirs = raw()
    caller = Caller(Channel(ours), lambda event: None)
    waiting = asyncio.create_task(caller.call("promote", deadline_s=30.0))
    await asyncio.sleep(0.01)
    theirs.close()
    with pytest.raises(WorkerDied):
        await asyncio.wait_for(waiting, 5.0)
    with pytest.raises(WorkerDied):
        await caller.call("promote", deadline_s=30.0)
    await caller.close()


async def test_when_the_manager_ends_the_worker_does_not_wait_for_its_handlers() -> None:
    began = asyncio.Event()

    async def endless(message: Message, fd: int | None) -> Message:
        began.set()
        await asyncio.Event().wait()
        return {}

    ours, theirs = raw()
    channel = Channel(theirs)
    serving = asyncio.create_task(control.serve(channel, {"endless": endless}))
    ours.send(b'{"id": 1, "verb": "endless"}')
    await asyncio.wait_for(began.wait(), 5.0)
    ours.close()
    await asyncio.wait_for(serving, 5.0)
    channel.close()
