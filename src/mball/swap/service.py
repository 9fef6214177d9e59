"""The swap store for an event loop: nothing here blocks it, and everything has a deadline.

What only looks at memory is called at once (`has`, `find`, `missed`, `abandon`, `failed`, `release`, `value`,
`status` of `store`); what waits for the disk runs in a few threads, and no more of it may wait than they can serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from mball.errors import SwapMiss, SwapRefused
from mball.swap.book import Lease, Want
from mball.swap.index import Kind
from mball.swap.store import Settings, SwapStore, open_store

T = TypeVar("T")
P = ParamSpec("P")

_THREADS = 4
_MOST_WAITING = 64


class SwapService:
    """Made by `open`; its methods belong to one event loop."""

    def __init__(self, store: SwapStore) -> None:
        self.store = store
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="mball-swap-call")
        self._waiting = 0

    @classmethod
    async def open(cls, settings: Settings, *, deadline_s: float = 300.0) -> SwapService:
        """See `store.open_store`. Raises its errors, and TimeoutError: preallocating can take long."""
        opening: asyncio.Future[SwapStore] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def run() -> None:
            store: SwapStore | None = None
            error: BaseException | None = None
            try:
                store = open_store(settings)
            except BaseException as failed:  # noqa: BLE001 — raised where it is awaited
                error = failed
            try:
                loop.call_soon_threadsafe(_settle, opening, store, error)
            except RuntimeError:  # the loop is gone
                if store is not None:
                    store.close()

        threading.Thread(target=run, name="mball-swap-open", daemon=True).start()
        try:
            async with asyncio.timeout(deadline_s):
                return cls(await opening)
        except BaseException:
            # It may have come in the very moment in which its caller gave up.
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                _close(opening.result())
            raise

    async def put_image(
        self,
        key: bytes,
        model: bytes,
        fd: int,
        nbytes: int,
        *,
        saved_s: float,
        rate: float,
        deadline_s: float,
    ) -> int:
        """Write the first `nbytes` of a memfd, once per key (the content's digest); the bytes written, 0 where it is
        there. On the disk for good when this returns. Raises SwapRefused."""
        want = Want(Kind.IMAGE, key, model, nbytes, saved_s, rate)
        return await self._transfer(self.store.put, fd, deadline_s, lambda fd: (want, fd), writing=True)

    async def read_image(
        self,
        key: bytes,
        model: bytes,
        into: int | memoryview,
        *,
        offset: int = 0,
        nbytes: int | None = None,
        deadline_s: float,
    ) -> int:
        """Bytes [offset, offset + nbytes) of an image to the beginning of a memfd or of memory; how many.

        Raises SwapMiss. Memory must stay what it is until this returns, or is cancelled and `close` has returned.
        """
        call = functools.partial(self.store.get, offset=offset, nbytes=nbytes)
        return await self._transfer(call, into, deadline_s, lambda into: (key, model, into), writing=False)

    def has_image(self, key: bytes, model: bytes) -> bool:
        return self.store.has(key, model)

    def drop_image(self, key: bytes) -> bool:
        """Its slots are used again after the next snapshot."""
        return self.store.drop(key)

    async def lease(self, owner: str, wants: Sequence[Want], *, deadline_s: float) -> list[Lease | None]:
        """Slots for a worker's blocks, None for each that is there already; fewer where the rest is refused.

        Raises SwapRefused where the first one is; what is leased after the deadline is given back.
        """
        call = functools.partial(self._leased, owner, wants)
        return await self._call(call, deadline_s, writing=True, unclaimed=functools.partial(self._give_back, owner))

    async def commit(self, owner: str, lease_ids: Sequence[int], *, deadline_s: float) -> int:
        """See `SwapStore.commit`. Raises SwapRefused("busy") in time."""
        return await self._call(functools.partial(self.store.commit, owner, lease_ids), deadline_s, writing=True)

    async def flush(self, *, deadline_s: float) -> bool:
        return await self._call(self.store.flush, deadline_s, writing=True)

    async def close(self, deadline_s: float = 10.0) -> bool:
        """See `SwapStore.close`."""
        end = time.monotonic() + deadline_s
        self._threads.shutdown(wait=False, cancel_futures=True)
        closed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def run() -> None:
            result = self.store.close(max(0.1, end - time.monotonic()))
            with contextlib.suppress(RuntimeError):  # the loop is gone
                loop.call_soon_threadsafe(_settle, closed, result, None)

        threading.Thread(target=run, name="mball-swap-close", daemon=True).start()
        try:
            async with asyncio.timeout(deadline_s + 1.0):
                return await closed
        except TimeoutError:
            return False

    def _leased(self, owner: str, wants: Sequence[Want]) -> list[Lease | None]:
        leases: list[Lease | None] = []
        for want in wants:
            try:
                leases.append(self.store.lease(owner, want))
            except SwapRefused:
                if not leases:
                    raise
                break
        return leases

    async def _transfer(
        self,
        call: Callable[..., int],
        memory: int | memoryview,
        deadline_s: float,
        given: Callable[[int | memoryview], tuple[object, ...]],
        *,
        writing: bool,
    ) -> int:
        """With a descriptor of its own: a thread may work on after the caller closed his. Given up, it stops soon."""
        cancel = threading.Event()
        own = os.dup(memory) if isinstance(memory, int) else memory

        def run() -> int:
            try:
                return call(*given(own), cancel=cancel)
            finally:
                if isinstance(own, int):
                    os.close(own)

        try:
            return await self._call(run, deadline_s, writing=writing)
        finally:
            cancel.set()

    def _give_back(self, owner: str, leases: list[Lease | None]) -> None:
        for lease in leases:
            if lease is not None:
                self.store.abandon(owner, lease.id)

    async def _call(
        self,
        call: Callable[[], T],
        deadline_s: float,
        *,
        writing: bool,
        unclaimed: Callable[[T], None] = lambda _: None,
    ) -> T:
        """`unclaimed` is given the result that nobody waited for."""
        try:
            if self._waiting >= _MOST_WAITING:
                raise TimeoutError
            future = self._threads.submit(call)
        except (RuntimeError, TimeoutError) as error:
            raise _busy(writing, "too much waits for the disk, or the store is closed") from error
        self._waiting += 1
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: _told(loop, self._done))
        try:
            async with asyncio.timeout(deadline_s):
                return await asyncio.wrap_future(future)
        except (TimeoutError, asyncio.CancelledError) as error:
            future.add_done_callback(functools.partial(_unclaimed, unclaimed))
            if isinstance(error, TimeoutError):
                raise _busy(writing, f"the disk took over {deadline_s:.0f} s") from None
            raise

    def _done(self) -> None:
        self._waiting -= 1


def _busy(writing: bool, why: str) -> SwapRefused | SwapMiss:
    return SwapRefused("busy", why) if writing else SwapMiss("busy", why)


def _unclaimed(told: Callable[[T], None], future: Future[T]) -> None:
    if not future.cancelled() and future.exception() is None:
        told(future.result())


def _told(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)


def _settle(future: asyncio.Future[T], result: T | None, error: BaseException | None) -> None:
    """On the loop. A store that nobody waits for any more is closed."""
    if future.done():
        if isinstance(result, SwapStore):
            _close(result)
    elif error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)  # type: ignore[arg-type]


def _close(store: SwapStore) -> None:
    threading.Thread(target=store.close, name="mball-swap-close", daemon=True).start()
