"""What the manager knows of one model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mball.errors import MballError
from mball.memory.images import Image
from mball.memory.planner import Candidate
from mball.memory.process import Hello, WorkerProcess
from mball.memory.queue import Queue
from mball.memory.rates import Rate, Smoothed
from mball.memory.settings import Settings
from mball.memory.spec import ModelSpec
from mball.memory.states import Process, State, Weights
from mball.units import GiB


@dataclass
class Figures:
    """Measured, smoothed."""

    start_s: Smoothed = field(default_factory=Smoothed)
    demote_s: Smoothed = field(default_factory=Smoothed)
    promote_s: dict[Weights, Smoothed] = field(default_factory=lambda: {w: Smoothed() for w in Weights})
    load_rate: float | None = None
    last_swap_s: float | None = None


@dataclass
class Counters:
    starts: int = 0
    promotions: int = 0
    demotions: int = 0
    crashes: int = 0


class Model:
    """State, queue and figures of one model. `lock` is held by whoever moves it. Only the holder changes
    `state`, but for an image that becomes ready.

    `context_bytes`: device bytes of its idle worker. `high_water_bytes`: the most it was measured to hold.
    `failure` makes the error that its requests get while it has failed. `wanted` without a request: a preload.
    `moving`: it is part of a transition that was decided, and nothing else is to be decided about it; `arriving`:
    that transition brings it in. `unload` is done once it is off the device.
    """

    def __init__(self, spec: ModelSpec, settings: Settings, number: int, changed: Callable[[], None]) -> None:
        self.spec = spec
        self.number = number
        self.settings = settings
        self.pinned = spec.pinned
        self.queue = Queue(spec.name, spec.admitted, Rate(settings.rate_window_s), changed)
        self.lock = asyncio.Lock()
        self.state = State()
        self.worker: WorkerProcess | None = None
        self.hello: Hello | None = None
        self.image: Image | None = None
        self.figures = Figures()
        self.counters = Counters()
        self.generation = 0
        self.context_bytes = 0
        self.measured_bytes = 0
        self.high_water_bytes = 0
        self.opened_s = 0.0
        self.gated_s: float | None = None
        self.not_before_s = 0.0
        self.crashes_in_row = 0
        self.error: str | None = None
        self.failure: Callable[[], MballError] | None = None
        self.wanted = spec.preload
        self.moving = False
        self.arriving = False
        self.unload: asyncio.Future[None] | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def on_device(self) -> bool:
        return self.state == State(Process.ALIVE, Weights.DEVICE)

    @property
    def unused(self) -> bool:
        return not self.queue.in_flight and not len(self.queue)

    @property
    def settled(self) -> bool:
        """Nobody moves it."""
        return not self.moving and not self.lock.locked()

    @property
    def rest(self) -> Weights:
        """Where the weights are when they are not on the device."""
        return Weights.DRAM if self.image is not None and self.image.ready else Weights.SOURCE

    @property
    def needed_bytes(self) -> int:
        """Device bytes on the device: as its worker announced, or the most measured if that is more."""
        if self.hello is None:
            return self.high_water_bytes
        working = self.spec.working_bytes
        if working is None:
            working = self.hello.working_bytes
        if working is None:
            working = max(self.settings.working_bytes, self.hello.weights_bytes // 8)
        announced = self.context_bytes + self.hello.weights_bytes + self.hello.kv_bytes + working
        return max(announced, self.high_water_bytes)

    @property
    def promote_s(self) -> float:
        """What bringing it back from where its weights rest takes; before it was measured, by a modest rate."""
        known = self.figures.promote_s[self.rest].value
        return known if known is not None else self.source_s

    @property
    def source_s(self) -> float:
        """The same where there is no image of it."""
        known = self.figures.promote_s[Weights.SOURCE].value
        return known if known is not None else self.needed_bytes / self.settings.first_rate

    def stay_s(self) -> float:
        """How long it stays on the device before it may go for another."""
        return self.settings.stay_s(self.promote_s + (self.figures.demote_s.value or 0.0))

    def keeps(self, measured_bytes: int) -> None:
        """Takes a measurement of what its worker holds."""
        self.measured_bytes = measured_bytes
        if self.on_device:
            self.high_water_bytes = max(self.high_water_bytes, measured_bytes)

    def candidate(self, held_bytes: int) -> Candidate:
        """It as the planner sees it; `held_bytes` are promised to it."""
        now = time.monotonic()
        return Candidate(
            self.name,
            demote_bytes=held_bytes - self.context_bytes if self.on_device else 0,
            stop_bytes=self.context_bytes if self.on_device else held_bytes,
            image_bytes=self.image.nbytes if self.image is not None and self.image.ready else 0,
            in_flight=self.queue.in_flight,
            pinned=self.pinned,
            priority=self.spec.priority,
            stay_s=now - self.opened_s,
            min_stay_s=self.stay_s(),
            rate=self.queue.rate.at(now),
            promote_s=self.promote_s,
            start_s=self.figures.start_s.value or 0.0,
            source_s=self.source_s,
            oldest_wait_s=self.queue.oldest_wait_s(now),
            gated=self.gated_s is not None,
        )

    def snapshot(self, promised_bytes: int) -> dict[str, Any]:
        """JSON for `/mball/v1/state`."""
        worker, figures = self.worker, self.figures
        rate = figures.load_rate
        return {
            "name": self.name,
            "task": self.spec.worker.task,
            "process": self.state.process.value,
            "weights": self.state.weights.value,
            "shown_as": self.state.shown_as,
            "open": self.queue.is_open,
            "pid": worker.pid if worker else None,
            "pinned": self.pinned,
            "in_flight": self.queue.in_flight,
            "queued": len(self.queue),
            "device_bytes": self.measured_bytes,
            "promised_bytes": promised_bytes,
            "needed_bytes": self.needed_bytes,
            "weights_bytes": self.hello.weights_bytes if self.hello else None,
            "loaded_bytes": worker.loaded_bytes if worker else 0,
            "baseline_bytes": self.hello.baseline_bytes if self.hello else None,
            "image_bytes": self.image.nbytes if self.image else 0,
            "image_ready": self.image is not None and self.image.ready,
            "starts": self.counters.starts,
            "promotions": self.counters.promotions,
            "demotions": self.counters.demotions,
            "crashes": self.counters.crashes,
            "rate": self.queue.rate.at(time.monotonic()),
            "promote_s": self.promote_s,
            "last_swap_s": figures.last_swap_s,
            "load_gib_s": rate / GiB if rate else None,
            "error": self.error,
        }
