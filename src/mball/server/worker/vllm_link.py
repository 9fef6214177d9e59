"""An engine's way to the swap store: from its scheduler's process to the worker that the manager knows."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable

from mball.errors import TransitionError
from mball.memory.control import Asker, Channel, Message, serve
from mball.server.worker.manners import no_descriptor
from mball.server.worker.swap_client import RemoteBlockStore
from mball.swap.block_store import BlockStore
from mball.swap.slots import Slots


class Link:
    """A thread of its own, which ends with the socket. Without a worker at its other end there is no store."""

    def __init__(
        self, path: str, use_store: Callable[[BlockStore | None], None], counts: Callable[[], dict[str, int]]
    ) -> None:
        """Both are called by that thread. Raises OSError where nobody listens at `path`."""
        self._use_store = use_store
        self._counts = counts
        self._slots: Slots | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._run, name="kv-link", daemon=True)
        self._thread.start()

    def close(self, deadline_s: float) -> bool:
        """False where the thread has not ended in time. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(deadline_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        channel = Channel(self._socket)
        asker = Asker(channel)
        store: RemoteBlockStore | None = None

        async def swap(message: Message, fd: int | None) -> Message:
            if fd is None or self._slots is not None:
                no_descriptor(fd)
                raise TransitionError("swap: no descriptor came with it, or it is there already")
            nonlocal store
            self._slots = Slots.from_wire(fd, message["slots"])
            store = RemoteBlockStore(self._slots, asker, asyncio.get_running_loop())
            self._use_store(store)
            return {}

        async def counts(message: Message, fd: int | None) -> Message:
            no_descriptor(fd)
            return dict(self._counts())

        try:
            await serve(channel, {"swap": swap, "counts": counts}, asker)
        finally:
            if store is not None:
                store.close()
            self._use_store(None)
            channel.close()
