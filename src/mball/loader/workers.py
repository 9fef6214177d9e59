"""Units of work done by threads under one owner: progress, cancellation, deadlines, the first error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

from mball.errors import Cancelled

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, from the thread that called the loader."""

STALL_S = 120.0
"""A load in which no byte arrives for so long has failed."""

GRACE_S = 10.0
"""How long the other threads may take to end their read once one has failed."""

_TICK_S = 0.1

Unit = TypeVar("Unit")
_Unit = TypeVar("_Unit", contravariant=True)


class Worker(Protocol[_Unit]):
    """What one thread does its units with."""

    def take(self, unit: _Unit) -> int:
        """Do it; its bytes."""

    def finish(self) -> None:
        """Called at the end, whatever happened."""


def work_through(
    units: Iterable[Unit],
    total_bytes: int,
    open_worker: Callable[[], Worker[Unit]],
    *,
    threads: int,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    when_idle: Callable[[], None] = lambda: None,
) -> int:
    """Do every unit, in about the order given, which is asked for one by one; the bytes done.

    Raises the first failing thread's error, Cancelled, or TimeoutError after STALL_S without a byte. `when_idle` is
    called once no thread works any more: not at all where one hangs in the kernel, which may still write.
    """
    work, turn = iter(units), threading.Lock()
    meter = _Meter(total_bytes)
    stop = threading.Event()

    def run() -> None:
        worker = open_worker()
        try:
            while not stop.is_set() and not (cancel is not None and cancel.is_set()):
                with turn:
                    unit = next(work, None)
                if unit is None:
                    return
                meter.add(worker.take(unit))
        finally:
            worker.finish()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="mball-read")
    running = {pool.submit(run) for _ in range(threads)}
    try:
        _watch(running, meter, progress)
    finally:
        stop.set()
        _, running = wait(running, GRACE_S)
        pool.shutdown(wait=not running)
        if not running:
            when_idle()
    if meter.done != meter.total:
        raise Cancelled(f"loading was cancelled after {meter.done} of {meter.total} bytes")
    return meter.total


class _Meter:
    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes


def _watch(running: set[Future[None]], meter: _Meter, progress: Progress | None) -> None:
    """Until every thread has ended, raising what the first failing one raised."""
    seen, deadline = 0, time.monotonic() + STALL_S
    while running:
        ended, running = wait(running, _TICK_S, FIRST_EXCEPTION)
        for future in ended:
            future.result()
        if progress is not None:
            progress(meter.done, meter.total)
        if meter.done != seen:
            seen, deadline = meter.done, time.monotonic() + STALL_S
        elif running and time.monotonic() > deadline:
            raise TimeoutError(f"no byte arrived for {STALL_S:.0f} s ({meter.done} of {meter.total} bytes are there)")
