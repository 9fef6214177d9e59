"""Watches the host's memory, and gives images up before the kernel acts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from mball.device import host
from mball.memory.events import Events
from mball.memory.images import Images
from mball.memory.model import Model
from mball.memory.pressure import Reading, Throttle, parse, reserve_bytes
from mball.memory.settings import Settings
from mball.units import format_bytes

_log = structlog.get_logger(__name__)
_TRIGGER = b"some 150000 2000000\0"
"""Wake when something stood still for 150 ms of 2 s: the shortest window that needs no privilege."""


class Gauge:
    """What the kernel says. `wait` returns early when a PSI trigger fires; where none may be set it is a timer."""

    def __init__(
        self,
        psi: Path | None = None,
        available: Callable[[], int] = host.available_bytes,
    ) -> None:
        """`psi`: the file to watch; None for this process's own."""
        self._psi = host.pressure_file() if psi is None else psi
        self._available = available
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._trigger_fd: int | None = None
        if self._psi is not None:
            self._trigger_fd = _trigger(self._psi)

    @property
    def triggers(self) -> bool:
        return self._trigger_fd is not None

    def read(self) -> Reading:
        """Blocks for a moment."""
        some = full = None
        if self._psi is not None:
            with contextlib.suppress(OSError, ValueError):
                some, full = parse(self._psi.read_text())
        return Reading(self._available(), some, full)

    def wait(self, timeout_s: float) -> None:
        """Blocks until the time is over, work stands still, or `stop`."""
        poll = select.poll()
        poll.register(self._stop_fd, select.POLLIN)
        if self._trigger_fd is not None:
            poll.register(self._trigger_fd, select.POLLPRI)
        for fd, event in poll.poll(timeout_s * 1000):
            if fd == self._trigger_fd and event & select.POLLERR:
                # The cgroup is gone: from now on a timer.
                os.close(fd)
                self._trigger_fd = None

    def stop(self) -> None:
        """Wakes whoever waits."""
        os.eventfd_write(self._stop_fd, 1)

    def close(self) -> None:
        for fd in (self._stop_fd, self._trigger_fd):
            if fd is not None:
                os.close(fd)


def _trigger(psi: Path) -> int | None:
    try:
        if psi.stat().st_size:
            # The kernel's own have no size: what has one is a copy, which is only read.
            return None
        fd = os.open(psi, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        os.write(fd, _TRIGGER)
    except OSError:
        os.close(fd)
        return None
    return fd


class PressureWatch:
    """Keeps the images' ledger under what the host can spare, the least worth image going first."""

    def __init__(
        self,
        models: Mapping[str, Model],
        images: Images,
        events: Events,
        gauge: Gauge,
        settings: Settings,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is told when there is more room for images."""
        self._models = models
        self._images = images
        self._events = events
        self._gauge = gauge
        self._every_s = settings.pressure_s
        self._changed = changed
        reserve = settings.host_reserve_bytes
        least = reserve_bytes(host.memory_bytes()) if reserve is None else reserve
        self._throttle = Throttle(images.ledger.total_bytes, least, settings.calm_s)
        self._reading: Reading | None = None

    async def run(self) -> None:
        """Until cancelled; the gauge is closed then."""
        waiting: Awaitable[None] | None = None
        try:
            while True:
                await self.step()
                waiting = asyncio.ensure_future(asyncio.to_thread(self._gauge.wait, self._every_s))
                await asyncio.shield(waiting)
        finally:
            self._gauge.stop()
            if waiting is not None:
                await waiting
            self._gauge.close()

    async def step(self) -> None:
        """One look, and what follows from it."""
        try:
            reading = self._reading = await asyncio.to_thread(self._gauge.read)
        except OSError as error:
            _log.warning("host memory not read", error=str(error))
            return
        ledger, throttle = self._images.ledger, self._throttle
        pressed, before = throttle.pressed, throttle.limit_bytes
        self._images.limit(throttle.take(reading, ledger.promised_bytes, time.monotonic()))
        if throttle.pressed and not pressed:
            self._warn(reading)
        if ledger.excess_bytes:
            why = f"{self._state(reading)}: host memory is short"
            if throttle.limit_bytes >= ledger.promised_bytes:
                why = f"{format_bytes(self._images.worker_bytes)} of dram_bytes are for workers' layers and KV blocks"
            await self._images.shrink(self._models.values(), ledger.excess_bytes, why)
        if pressed and not throttle.pressed:
            limit = format_bytes(throttle.limit_bytes)
            self._events.record("pressure eased", None, f"{self._state(reading)}; images may have {limit}")
        if throttle.limit_bytes > before:
            self._changed()

    def _state(self, reading: Reading) -> str:
        psi = "" if reading.full is None else f", {reading.full:.0f} % of the time all stands still for it"
        return f"{format_bytes(reading.available_bytes)} of host memory are available{psi}"

    def _warn(self, reading: Reading) -> None:
        kept = [m for m in self._models.values() if m.image is not None and m.image.ready]
        slower = max((m.source_s - m.promote_s for m in kept), default=0.0)
        cost = f"a model without its image comes back from its files, up to {max(0.0, slower):.1f} s slower"
        reserve = format_bytes(self._throttle.reserve_bytes)
        limit = format_bytes(self._throttle.limit_bytes)
        why = "work stands still for memory" if reading.stalls else f"less than the {reserve} kept for others"
        self._events.record(
            "pressure",
            None,
            f"{self._state(reading)}: {why}; images may have {limit} from now on; {cost}",
            level="warning",
            available_bytes=reading.available_bytes,
        )

    def snapshot(self) -> dict[str, Any]:
        reading = self._reading
        return {
            "pressed": self._throttle.pressed,
            "reserve_bytes": self._throttle.reserve_bytes,
            "available_bytes": None if reading is None else reading.available_bytes,
            "some_avg10": None if reading is None else reading.some,
            "full_avg10": None if reading is None else reading.full,
        }
