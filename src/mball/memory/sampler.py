"""Measures what workers and others hold, keeps promises near it, and lets balloons out again where there is room."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import structlog

from mball.device.device import Foreign
from mball.errors import DeviceError, DeviceOutOfMemory, TransitionError
from mball.memory.events import Events
from mball.memory.model import Model
from mball.memory.settings import Settings
from mball.memory.states import Process
from mball.units import MiB, format_bytes

if TYPE_CHECKING:
    from mball.memory.slot import Slot

_log = structlog.get_logger(__name__)
_TOLD_BYTES = 256 * MiB
"""Foreign use is told of again when it has changed by more."""


class Sampler:
    """Of one device. The busy are measured often, the idle now and then, and others every `foreign_s`.

    What others hold is taken from what may be promised; they are never touched.
    """

    def __init__(self, slot: Slot, workers: Mapping[int, str], settings: Settings, events: Events) -> None:
        """`workers`: the models of all workers that live, by pid."""
        self._slot = slot
        self._workers = workers
        self._settings = settings
        self._events = events
        self._last: dict[str, float] = {}
        self._roomy_since_s: float | None = None
        # What an engine could make nothing of: a layer, or a piece of KV, comes back as a whole.
        self._too_little: dict[str, int] = {}
        self.foreign = Foreign()
        self._seen_before = Foreign()
        self._told_bytes = 0
        self._looked_s = float("-inf")

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            for model in list(self._slot.models.values()):
                idle_s = time.monotonic() - self._last.get(model.name, 0.0)
                if model.queue.in_flight or idle_s >= self._settings.idle_sample_s:
                    self._last[model.name] = time.monotonic()
                    await self._take(model)
            if time.monotonic() - self._looked_s >= self._settings.foreign_s:
                self._looked_s = time.monotonic()
                await self._look_for_others()
            await self._deflate(time.monotonic())
            await asyncio.sleep(self._settings.sample_s)

    async def _look_for_others(self) -> None:
        slot = self._slot
        ours = {pid: slot.ledger.held(name) for pid, name in self._workers.items()}
        ours |= {m.worker.pid: slot.ledger.held(m.name) for m in slot.models.values() if m.worker is not None}
        try:
            found = await asyncio.to_thread(slot.device.foreign, ours)
        except DeviceError as error:
            if slot.lost is None:
                self._events.record("device lost", None, f"{slot.name}: {error}", level="error", device=slot.name)
            slot.lost = error
            slot.scheduler.wake()
            return
        if slot.lost is not None:
            self._events.record("device back", None, f"{slot.name} answers again", device=slot.name)
            slot.lost = None
        # One that is seen once may be a worker of ours that ended, or grew, between two of the driver's answers.
        self.foreign = min(found, self._seen_before, key=lambda foreign: foreign.nbytes)
        self._seen_before = found
        before = slot.ledger.limit_bytes
        slot.ledger.limit(slot.device.total_bytes - self.foreign.nbytes)
        self._tell()
        if slot.ledger.limit_bytes != before:
            slot.scheduler.wake()

    def _tell(self) -> None:
        now_bytes, told_bytes = self.foreign.nbytes, self._told_bytes
        if abs(now_bytes - told_bytes) <= _TOLD_BYTES and bool(now_bytes) == bool(told_bytes):
            return
        self._told_bytes = now_bytes
        slot, may = self._slot, format_bytes(self._slot.ledger.limit_bytes)
        if not now_bytes:
            why = f"{slot.name}: models may have {may} again"
            self._events.record("foreign use ended", None, why, device=slot.name)
            return
        who = [f"{s.name} (pid {s.pid}) holds {format_bytes(s.nbytes)}" for s in self.foreign.strangers]
        if self.foreign.hidden_bytes:
            who.append(f"processes that are not shown hold {format_bytes(self.foreign.hidden_bytes)}")
        self._events.record(
            "foreign use",
            None,
            f"{slot.name}: {', '.join(who)}; models may have {may}",
            level="warning",
            device=slot.name,
            foreign_bytes=now_bytes,
        )

    async def _take(self, model: Model) -> None:
        if not _at_rest(model):
            return
        inside = model.queue.in_flight
        model.figures.busy.add(inside, time.monotonic(), used=inside > 0)
        transitions = self._slot.transitions
        try:
            held = await transitions.measure(model)
        except DeviceError as error:
            _log.warning("not measured", model=model.name, error=str(error))
            return
        if held is None or not _at_rest(model):
            return
        model.keeps(held)
        self._promise(model, held)
        await transitions.inquire(model)

    def _promise(self, model: Model, held: int) -> None:
        """As much as it holds, and no more than it needs: what it needed once comes free as its figure falls."""
        ledger, changed = self._slot.ledger, self._slot.scheduler.wake
        promised = ledger.held(model.name)
        wanted = max(held, model.needed_bytes) if model.on_device else max(held, model.context_bytes)
        if held > promised or wanted < promised:
            try:
                ledger.promise(model.name, held if held > promised else wanted)
            except DeviceOutOfMemory:
                changed()
                return
            if wanted < promised:
                changed()

    async def _deflate(self, now: float) -> None:
        """What was taken for others comes back where there has been room for a while and nobody waits."""
        slot = self._slot
        models = slot.models.values()
        free_bytes, few = slot.ledger.free_bytes, self._too_little
        squeezed = [m for m in models if m.ballooned_bytes > m.balloon_bytes and m.on_device]
        squeezed = [m for m in squeezed if free_bytes > few.get(m.name, 0)]
        waiting = any(len(m.queue) or m.wanted or not m.settled for m in models)
        if not squeezed or waiting or slot.lease.busy:
            self._roomy_since_s = None
            return
        if self._roomy_since_s is None:
            self._roomy_since_s = now
        if now - self._roomy_since_s < self._settings.deflate_s:
            return
        self._roomy_since_s = None
        model = max(squeezed, key=lambda m: (m.queue.rate.at(now), m.name))
        before, back = model.ballooned_bytes, min(free_bytes, model.ballooned_bytes - model.balloon_bytes)
        async with slot.lease.hold() as epoch:
            try:
                await slot.transitions.set_balloon(
                    model, model.ballooned_bytes - back, epoch, "there is room, and nobody waits"
                )
            except (TransitionError, DeviceError) as error:
                _log.info("not deflated", model=model.name, error=str(error))
                return
        if model.ballooned_bytes == before:
            few[model.name] = back


def _at_rest(model: Model) -> bool:
    return model.settled and model.state.process is Process.ALIVE
