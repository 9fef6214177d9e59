"""The control channel between the manager and a worker: JSON messages, with at most one descriptor each.

The manager makes a SOCK_SEQPACKET pair and the worker inherits one end. When either end closes the other learns it:
a worker whose channel closes ends itself. Messages:

    worker → manager   {"event": "hello", "pid": …, "baseline_bytes": …, "weights_bytes": …, "kv_bytes": …,
                        "image_bytes": …, "resident": …}       once, when its HTTP socket listens
                       {"event": "progress", "loaded_bytes": …, "total_bytes": …}
                       {"event": "failed", "error": …}          it cannot start; it exits after that
    manager → worker   {"id": 7, "verb": "promote", …}
    worker → manager   {"id": 7, "result": {…}}  or  {"id": 7, "error": {"type": …, "message": …}}
    worker → manager   {"call": 3, "verb": "swap.find", …}
    manager → worker   {"call": 3, "result": {…}}  or  {"call": 3, "error": {"type": …, "message": …}}
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import json
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from mball import errors

MESSAGE_BYTES = 64 * 1024
"""The largest message that is sent or taken."""

_MOST_CALLS = 32
"""Calls of a worker that may be under way; what is over is refused."""

Message = dict[str, Any]
Handler = Callable[[Message, int | None], Awaitable[Message]]
"""A worker's verb: takes the message and the descriptor that came with it (the handler owns it), gives the result."""


Answer = Callable[[Message], Awaitable[Message]]
"""The manager's side of a worker's calls: takes the message, gives the result."""


class ChannelClosed(errors.WorkerDied):
    """The other end of a control channel is gone."""


def pair() -> tuple[socket.socket, socket.socket]:
    """(manager's end, worker's end); the worker's end may be inherited."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    return ours, theirs


class Channel:
    """One end. `receive` is called by one task alone; `send` by any."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._sending = asyncio.Lock()

    async def send(self, message: Message, fd: int | None = None) -> None:
        """Raises ChannelClosed, or ValueError for a message over MESSAGE_BYTES. `fd` stays the caller's."""
        data = json.dumps(message).encode()
        if len(data) > MESSAGE_BYTES:
            raise ValueError(f"a control message of {len(data)} bytes is over {MESSAGE_BYTES}")
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        async with self._sending:
            while True:
                try:
                    self._sock.sendmsg([data], rights)
                    return
                except (BlockingIOError, InterruptedError):
                    await self._ready(writing=True)
                except OSError as error:
                    raise ChannelClosed(f"control channel: {error}") from None

    async def receive(self) -> tuple[Message, int | None]:
        """The next message and its descriptor (the caller owns it). Raises ChannelClosed."""
        while True:
            try:
                data, rights, flags, _ = self._sock.recvmsg(MESSAGE_BYTES, socket.CMSG_SPACE(4))
            except (BlockingIOError, InterruptedError):
                await self._ready(writing=False)
                continue
            except OSError as error:
                raise ChannelClosed(f"control channel: {error}") from None
            fd = _descriptor(rights)
            message = _decode(data) if data and not flags & socket.MSG_TRUNC else None
            if message is None:
                if fd is not None:
                    os.close(fd)
                raise ChannelClosed("control channel: closed" if not data else "control channel: not a message")
            return message, fd

    async def _ready(self, *, writing: bool) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        if self._sock.fileno() < 0:
            raise ChannelClosed("control channel: closed")
        add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
        add(self._sock, wake)
        try:
            await ready
        finally:
            if self._sock.fileno() >= 0:
                remove(self._sock)

    def close(self) -> None:
        """Idempotent. A `receive` under way is not woken: cancel its task first."""
        self._sock.close()


def _descriptor(rights: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, data in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds = array.array("i")
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
            for fd in fds:
                os.set_inheritable(fd, False)
            return fds[0]
    return None


def _decode(data: bytes) -> Message | None:
    try:
        message = json.loads(data)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


async def refuse(message: Message) -> Message:
    """An `Answer` of one who takes no calls. Raises TransitionError."""
    raise errors.TransitionError(f"unknown verb {message.get('verb')!r}")


class Caller:
    """The manager's side: calls verbs, hands events to `on_event`, and the worker's own calls to `answer`.

    `on_late` is told what a verb of a lease was called with, when its answer comes after the caller has given up;
    `on_closed` that no more will come.
    """

    def __init__(
        self,
        channel: Channel,
        on_event: Callable[[Message], None],
        on_late: Callable[[Message], None] = lambda _: None,
        on_closed: Callable[[], None] = lambda: None,
        answer: Answer = refuse,
    ) -> None:
        self._channel = channel
        self._answer = answer
        self._answering: set[asyncio.Task[None]] = set()
        self._on_event = on_event
        self._on_late = on_late
        self._on_closed = on_closed
        self._given_up: dict[int, Message] = {}
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._closed = False
        self._task = asyncio.create_task(self._read(), name="control-reader")

    async def call(self, verb: str, *, deadline_s: float, fd: int | None = None, **arguments: Any) -> Message:
        """The verb's result.

        Raises WorkerDied when the channel closes, TimeoutError past the deadline, and VerbFailed with the worker's
        message where the worker answered with an error.
        """
        if self._closed:
            raise ChannelClosed("control channel: closed")
        number = next(self._ids)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(deadline_s):
                await self._channel.send({"id": number, "verb": verb, **arguments}, fd)
                message = await answer
        except (TimeoutError, asyncio.CancelledError):
            if "epoch" in arguments:
                self._given_up[number] = {"verb": verb, **arguments}
            raise
        finally:
            self._waiting.pop(number, None)
        if "error" in message:
            error = message["error"]
            raise errors.VerbFailed(verb, str(error.get("type")), str(error.get("message")))
        result: Message = message.get("result") or {}
        return result

    async def _read(self) -> None:
        try:
            while True:
                message, fd = await self._channel.receive()
                if fd is not None:
                    os.close(fd)
                number = message.get("id")
                waiting = self._waiting.get(number) if isinstance(number, int) else None
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
                elif "event" in message:
                    self._on_event(message)
                elif isinstance(message.get("call"), int):
                    await self._called(message)
                elif isinstance(number, int) and (late := self._given_up.pop(number, None)) is not None:
                    self._on_late(late)
        except ChannelClosed as closed:
            self._fail(closed)
            self._on_closed()
        finally:
            self._fail(ChannelClosed("control channel: closed"))
            for task in self._answering:
                task.cancel()

    async def _called(self, message: Message) -> None:
        if len(self._answering) >= _MOST_CALLS:
            await _reply(self._channel, "call", message["call"], _over)
            return
        answering = _reply(self._channel, "call", message["call"], lambda: self._answer(message))
        task = asyncio.create_task(answering, name="control-answer")
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    def _fail(self, error: ChannelClosed) -> None:
        self._closed = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)

    async def close(self) -> None:
        """Ends the reader and the socket; calls under way raise WorkerDied."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await asyncio.gather(*self._answering, return_exceptions=True)
        self._channel.close()


async def _over() -> Message:
    raise errors.TransitionError(f"{_MOST_CALLS} calls are under way already")


class Asker:
    """The worker's side of its own calls. `settle` is given the answers."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[asyncio.Future[Message], Callable[[Message], None]]] = {}
        self._closed = False

    async def call(
        self, verb: str, *, deadline_s: float, on_late: Callable[[Message], None] = lambda _: None, **arguments: Any
    ) -> Message:
        """The manager's result. One that comes after the caller has given up is given to `on_late`.

        Raises ChannelClosed, TimeoutError, VerbFailed with the manager's message, ValueError for one that is too large.
        """
        if self._closed:
            raise ChannelClosed("control channel: closed")
        number = next(self._numbers)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (answer, on_late)
        try:
            async with asyncio.timeout(deadline_s):
                await self._channel.send({"call": number, "verb": verb, **arguments})
                message = await answer
        except (ChannelClosed, ValueError):
            self._waiting.pop(number, None)
            raise
        except (TimeoutError, asyncio.CancelledError):
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                _late(answer.result(), on_late)
            raise
        if "error" in message:
            error = message["error"]
            raise errors.VerbFailed(verb, str(error.get("type")), str(error.get("message")))
        result: Message = message.get("result") or {}
        return result

    def settle(self, message: Message) -> None:
        number = message.get("call")
        if not isinstance(number, int) or number not in self._waiting:
            return
        answer, on_late = self._waiting.pop(number)
        if not answer.done():
            answer.set_result(message)
        else:
            _late(message, on_late)

    def close(self) -> None:
        """No more answers will come."""
        self._closed = True
        for answer, _ in self._waiting.values():
            if not answer.done():
                answer.set_exception(ChannelClosed("control channel: closed"))
        self._waiting.clear()


def _late(message: Message, on_late: Callable[[Message], None]) -> None:
    if isinstance(result := message.get("result"), dict):
        on_late(result)


async def serve(channel: Channel, verbs: dict[str, Handler], asker: Asker | None = None) -> None:
    """The worker's side: answers verbs, each in its own task, until the manager's end closes; then returns. Answers to
    the worker's own calls go to `asker`.

    An MballError or OSError of a handler becomes an error answer; an unknown verb too. Handlers under way when the
    channel closes are cancelled: nobody waits for their answers.
    """
    async with asyncio.TaskGroup() as group:
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                message, fd = await channel.receive()
                if "call" in message:
                    if fd is not None:
                        os.close(fd)
                    if asker is not None:
                        asker.settle(message)
                    continue
                task = group.create_task(_answer(channel, verbs, message, fd))
                running.add(task)
                task.add_done_callback(running.discard)
        except ChannelClosed:
            for task in running:
                task.cancel()
        finally:
            if asker is not None:
                asker.close()


async def _answer(channel: Channel, verbs: dict[str, Handler], message: Message, fd: int | None) -> None:
    handler = verbs.get(str(message.get("verb")))
    if handler is not None:
        await _reply(channel, "id", message.get("id"), lambda: handler(message, fd))
        return
    if fd is not None:
        os.close(fd)
    await _reply(channel, "id", message.get("id"), lambda: refuse(message))


async def _reply(channel: Channel, key: str, number: Any, act: Callable[[], Awaitable[Message]]) -> None:
    try:
        reply: Message = {key: number, "result": await act()}
    except (errors.MballError, OSError, ValueError, RuntimeError) as error:
        reply = {key: number, "error": {"type": type(error).__name__, "message": str(error)[:4000]}}
    with contextlib.suppress(ChannelClosed):
        try:
            await channel.send(reply)
        except ValueError as error:
            await channel.send({key: number, "error": {"type": "ValueError", "message": str(error)}})
