"""A few threads for the disk: reads go first, and writes never take them all."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, wait

from mball.errors import Cancelled

Call = Callable[[], int]

_TICK_S = 0.2


class Threads:
    """`count` threads, at least two. They are daemons: one that hangs in the kernel keeps no process from ending."""

    def __init__(self, count: int) -> None:
        self.count = max(2, count)
        self._reads: deque[tuple[Call, Future[int]]] = deque()
        self._writes: deque[tuple[Call, Future[int]]] = deque()
        self._writing = 0
        self._closed = False
        self._work = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"mball-swap-{number}", daemon=True) for number in range(self.count)
        ]
        for thread in self._threads:
            thread.start()

    def run(
        self, calls: Iterable[Call], *, reading: bool, deadline_s: float, cancel: threading.Event | None = None
    ) -> int:
        """Does them all, in about this order; the sum of what they give.

        Raises the first error of one, Cancelled, or TimeoutError. Only then one may still run: it hangs in the kernel.
        """
        end = time.monotonic() + deadline_s
        futures = self._add(calls, reading)
        running: set[Future[int]] = set(futures)
        try:
            while running:
                ended, running = wait(running, max(0.0, min(_TICK_S, end - time.monotonic())), FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                if cancel is not None and cancel.is_set():
                    raise Cancelled("the disk's work was given up")
                if running and time.monotonic() >= end:
                    raise TimeoutError(f"the disk has not answered for {deadline_s:.0f} s")
        except CancelledError:
            raise Cancelled("the store is closed") from None
        finally:
            begun = {future for future in running if not future.cancel()}
            if wait(begun, max(0.0, end - time.monotonic())).not_done:
                raise TimeoutError(f"the disk has not answered for {deadline_s:.0f} s")
        return sum(future.result() for future in futures)

    def close(self, deadline_s: float) -> bool:
        """Gives up what waits, and waits for what runs; False where a thread has not ended in time. Idempotent."""
        with self._work:
            self._closed = True
            waiting = [*self._reads, *self._writes]
            self._reads.clear()
            self._writes.clear()
            self._work.notify_all()
        for _, future in waiting:
            future.cancel()
            # Only then do those who wait for it hear of it.
            future.set_running_or_notify_cancel()
        end = time.monotonic() + deadline_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _add(self, calls: Iterable[Call], reading: bool) -> list[Future[int]]:
        added = [(call, Future[int]()) for call in calls]
        with self._work:
            if self._closed:
                raise Cancelled("the store is closed")
            (self._reads if reading else self._writes).extend(added)
            self._work.notify_all()
        return [future for _, future in added]

    def _run(self) -> None:
        while True:
            with self._work:
                taken = self._take()
                while taken is None and not self._closed:
                    self._work.wait()
                    taken = self._take()
                if taken is None:
                    return
            (call, future), writing = taken
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 — whoever waits for the future raises it
                    future.set_exception(error)
            del call, future
            if writing:
                with self._work:
                    self._writing -= 1
                    self._work.notify_all()

    def _take(self) -> tuple[tuple[Call, Future[int]], bool] | None:
        if self._reads:
            return self._reads.popleft(), False
        if self._writes and self._writing < self.count - 1:
            self._writing += 1
            return self._writes.popleft(), True
        return None
