"""Who may move models on a device: one at a time, each under an epoch of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Lease:
    """An epoch is never given twice, so a worker that answers to an old one is late."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._epoch = 0

    @property
    def busy(self) -> bool:
        return self._lock.locked()

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[int]:
        """Waits its turn; without a pause where the lease is free. Gives the epoch."""
        async with self._lock:
            self._epoch += 1
            yield self._epoch
