"""Where a worker's engine asks for the swap store: a socket in the worker's own folder, and this user's alone.

What is asked for is handed on to the manager, which knows this worker by its control channel and takes back what it
has when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Any

from mball.errors import MballError, TransitionError
from mball.memory.control import Asker, Caller, Channel, ChannelClosed, Message

ASK_S = 60.0
"""Longer than the engine waits itself: it gives back what comes late."""

_VERBS = frozenset({"swap.find", "swap.lease", "swap.commit", "swap.abandon", "swap.missed"})
_MOST_ENGINES = 16
_ANSWER_S = 5.0


class Door:
    """Belongs to the loop's thread."""

    def __init__(self, path: Path, asker: Asker) -> None:
        """Listens. Raises OSError."""
        self._path = path
        self._asker = asker
        self._callers: list[Caller] = []
        self._store: tuple[int, Message] | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            self._socket.bind(str(path))
        except OSError:
            self._socket.close()
            raise
        finally:
            os.umask(mask)
        self._socket.listen(_MOST_ENGINES)
        self._accepting = asyncio.create_task(self._accept(), name="kv-door")

    async def give(self, fd: int, slots: Message) -> None:
        """The store is there: its descriptor, which is this one's from now on. Raises TransitionError."""
        if self._store is not None:
            os.close(fd)
            raise TransitionError("swap: it is there already")
        self._store = (fd, slots)
        for caller in self._callers:
            await self._introduce(caller)

    async def counts(self) -> dict[str, int]:
        """What became of blocks, over all engines behind it."""
        total: dict[str, int] = {}
        for caller in self._callers:
            try:
                found = await caller.call("counts", deadline_s=_ANSWER_S)
            except (MballError, TimeoutError):
                continue
            for name, count in found.items():
                total[name] = total.get(name, 0) + int(count)
        return total

    async def close(self) -> None:
        """Idempotent."""
        self._accepting.cancel()
        await asyncio.wait({self._accepting})
        self._socket.close()
        self._path.unlink(missing_ok=True)
        for caller in self._callers:
            await caller.close()
        self._callers.clear()
        if self._store is not None:
            os.close(self._store[0])
            self._store = None

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            engine, _ = await loop.sock_accept(self._socket)
            if len(self._callers) >= _MOST_ENGINES:
                engine.close()
                continue
            caller = Caller(Channel(engine), lambda _: None, answer=self._answer)
            self._callers.append(caller)
            await self._introduce(caller)

    async def _introduce(self, caller: Caller) -> None:
        """One that can't take it goes on without."""
        if self._store is None:
            return
        fd, slots = self._store
        with contextlib.suppress(MballError, OSError, TimeoutError):
            await caller.call("swap", deadline_s=_ANSWER_S, fd=fd, slots=slots)

    async def _answer(self, message: Message) -> Message:
        verb = str(message.get("verb"))
        if verb not in _VERBS:
            raise TransitionError(f"unknown verb {verb!r}")
        arguments: dict[str, Any] = {name: value for name, value in message.items() if name not in ("call", "verb")}
        try:
            return await self._asker.call(verb, deadline_s=ASK_S, **arguments)
        except (ChannelClosed, TimeoutError) as error:
            raise TransitionError(f"{verb}: the manager did not answer ({error!r})") from None
