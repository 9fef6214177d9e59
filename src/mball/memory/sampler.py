"""Measures what workers hold, keeps promises near it, and lets balloons out again where there is room."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import structlog

from mball.errors import DeviceError, DeviceOutOfMemory, TransitionError
from mball.memory.events import Events
from mball.memory.images import Images
from mball.memory.invariants import broken
from mball.memory.lease import Lease
from mball.memory.ledger import Ledger
from mball.memory.model import Model
from mball.memory.settings import Settings
from mball.memory.states import Process
from mball.memory.transition import Transitions

_log = structlog.get_logger(__name__)


class Sampler:
    """The busy are measured often, the idle now and then."""

    def __init__(
        self,
        models: Mapping[str, Model],
        ledger: Ledger,
        images: Images,
        transitions: Transitions,
        lease: Lease,
        settings: Settings,
        events: Events,
        changed: Callable[[], None],
    ) -> None:
        self._models = models
        self._ledger = ledger
        self._images = images
        self._transitions = transitions
        self._lease = lease
        self._settings = settings
        self._events = events
        self._changed = changed
        self._last: dict[str, float] = {}
        self._broken: set[str] = set()
        self._roomy_since_s: float | None = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._settings.sample_s)
            for model in self._models.values():
                idle_s = time.monotonic() - self._last.get(model.name, 0.0)
                if model.queue.in_flight or idle_s >= self._settings.idle_sample_s:
                    self._last[model.name] = time.monotonic()
                    await self._take(model)
            self.check()
            await self._deflate(time.monotonic())

    def check(self) -> list[str]:
        """What is wrong with the books; told once as long as it lasts."""
        found = broken(self._models, self._ledger, self._images.ledger)
        for text in set(found) - self._broken:
            self._events.record("books wrong", None, text, level="error")
        self._broken = set(found)
        return found

    async def _take(self, model: Model) -> None:
        if not _at_rest(model):
            return
        try:
            held = await self._transitions.measure(model)
        except DeviceError as error:
            _log.warning("not measured", model=model.name, error=str(error))
            return
        if held is None or not _at_rest(model):
            return
        model.keeps(held)
        self._promise(model, held)
        await self._transitions.inquire(model)

    def _promise(self, model: Model, held: int) -> None:
        """As much as it holds, and no more than it needs: what it needed once comes free as its figure falls."""
        promised = self._ledger.held(model.name)
        wanted = max(held, model.needed_bytes) if model.on_device else max(held, model.context_bytes)
        if held > promised or wanted < promised:
            try:
                self._ledger.promise(model.name, held if held > promised else wanted)
            except DeviceOutOfMemory:
                self._changed()
                return
            if wanted < promised:
                self._changed()

    async def _deflate(self, now: float) -> None:
        """What was taken for others comes back where there has been room for a while and nobody waits."""
        squeezed = [m for m in self._models.values() if m.ballooned_bytes > m.balloon_bytes and m.on_device]
        waiting = any(len(m.queue) or m.wanted or not m.settled for m in self._models.values())
        if not squeezed or waiting or self._lease.busy or not self._ledger.free_bytes:
            self._roomy_since_s = None
            return
        if self._roomy_since_s is None:
            self._roomy_since_s = now
        if now - self._roomy_since_s < self._settings.deflate_s:
            return
        self._roomy_since_s = None
        model = max(squeezed, key=lambda m: (m.queue.rate.at(now), m.name))
        back = min(self._ledger.free_bytes, model.ballooned_bytes - model.balloon_bytes)
        async with self._lease.hold() as epoch:
            try:
                await self._transitions.set_balloon(
                    model, model.ballooned_bytes - back, epoch, "there is room, and nobody waits"
                )
            except (TransitionError, DeviceError) as error:
                _log.info("not deflated", model=model.name, error=str(error))


def _at_rest(model: Model) -> bool:
    return model.settled and model.state.process is Process.ALIVE
