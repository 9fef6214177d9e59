"""Weight images in the swap store: the rung below DRAM. Each is written once, and never again: it does not change."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from mball.device import memfd
from mball.errors import SwapMiss, SwapRefused
from mball.memory.events import Events
from mball.memory.rates import Smoothed
from mball.memory.settings import Settings
from mball.memory.states import Weights
from mball.memory.swap_keeper import SwapKeeper
from mball.swap.place import Place, digest

if TYPE_CHECKING:
    from mball.memory.images import Image
    from mball.memory.model import Model

_log = structlog.get_logger(__name__)

MODEL = digest("mball weight images")
"""Images are named by their content alone: models that share it share the entry."""

_LEAST_SAVED_S = 0.01
_DAMAGE = ("checksum", "stale", "io")


class SwapImages:
    """`read_rate`, `write_rate`: bytes a second, as measured."""

    def __init__(self, keeper: SwapKeeper, settings: Settings, events: Events) -> None:
        self.read_rate = Smoothed()
        self.write_rate = Smoothed()
        self._keeper = keeper
        self._settings = settings
        self._events = events

    def look(self, model: Model) -> None:
        """Learns whether the store has a model's image now; one that rests on or below it rises or falls by that."""
        service, key = self._keeper.service, model.image_key
        model.stored = service is not None and key is not None and service.has_image(key, MODEL)
        rate = self.read_rate.value
        model.stored_s = model.hello.image_bytes / rate if model.stored and rate and model.hello else None
        pair = {model.state.weights, model.rest}
        if pair == {Weights.NVME, Weights.SOURCE}:
            model.state = model.state.to(weights=model.rest)

    async def keep(self, model: Model, image: Image, within_s: float) -> bool:
        """Writes a ready image where it is not there and that is worth it; whether it is there now. Nothing is begun
        that, as measured, would not be done in time."""
        service, key, rate = self._keeper.service, image.key, self.read_rate.value
        if service is None or key is None:
            return False
        saved_s = max(_LEAST_SAVED_S, model.load_s - (image.nbytes / rate if rate else 0.0))
        uses = model.queue.rate.at(time.monotonic())
        if service.has_image(key, MODEL):
            service.store.value(key, saved_s, uses)
            return True
        if service.store.read_only is not None or not await self._worth_it(service.store.settings.path, model):
            return False
        if (slowest := self.write_rate.value) is not None and image.nbytes / slowest > within_s:
            why = f"it would take {image.nbytes / slowest:.1f} s, and there are {within_s:.1f} s"
            self._events.record("image not stored", model.name, why, image_bytes=image.nbytes)
            return False
        began = time.monotonic()
        try:
            written = await service.put_image(
                key,
                MODEL,
                image.fd,
                image.nbytes,
                saved_s=saved_s,
                rate=uses,
                deadline_s=within_s,
            )
        except SwapRefused as error:
            if error.reason == "busy":
                self._wrote(image, began)
            self._events.record("image not stored", model.name, str(error), image_bytes=image.nbytes)
            return False
        except asyncio.CancelledError:  # it would have taken longer still
            self._wrote(image, began)
            raise
        took = self._wrote(image, began)
        self._events.record("image stored", model.name, written_bytes=written, store_s=round(took, 3))
        return True

    async def read(self, model: Model, image: Image) -> bool:
        """Whether an image could be read into its memfd; what that holds is worth nothing where not."""
        service, key = self._keeper.service, image.key
        if service is None or key is None:
            return False
        began = time.monotonic()
        try:
            if await service.read_image(key, MODEL, image.fd, deadline_s=self._settings.image_s) != image.nbytes:
                return False
        except SwapMiss as error:
            self._events.record("image missed", model.name, str(error), level="warning")
            return False
        self.read_rate.add(image.nbytes / max(1e-6, time.monotonic() - began))
        return True

    @contextlib.contextmanager
    def lent(self, model: Model) -> Iterator[tuple[Place, int] | None]:
        """Where a model's image is, also as JSON in a memfd, to be read by its worker; it stays there meanwhile. None
        where it is not there."""
        service, key = self._keeper.service, model.image_key
        if service is None or key is None or model.rest is not Weights.NVME:
            yield None
            return
        with service.store.held(key):
            try:
                place = service.store.find(key, MODEL)
            except SwapMiss:
                yield None
                return
            text = json.dumps(place.to_wire()).encode()
            fd = memfd.create("place", len(text))
            try:
                os.pwrite(fd, text, 0)
                yield place, fd
            finally:
                os.close(fd)

    def missed(self, model: Model, place: Place, reason: str) -> None:
        """Its worker could not read it there."""
        self._events.record("image missed", model.name, f"its worker read its files instead: {reason}", level="warning")
        if self._keeper.service is not None and reason in _DAMAGE:
            self._keeper.service.store.missed(place, SwapMiss(reason, "read by a worker"))

    def _wrote(self, image: Image, began: float) -> float:
        took = max(1e-6, time.monotonic() - began)
        self.write_rate.add(image.nbytes / took)
        return took

    async def _worth_it(self, store: Path, model: Model) -> bool:
        """An image is the shards as they are: where these are read as fast, they are the swap. One of an engine's own
        memory is not, and spares what the engine makes of them."""
        if self._settings.swap_weights != "auto":
            return self._settings.swap_weights == "always"
        source, rate = model.figures.source_rate.value, self.read_rate.value
        own = model.spec.worker.starts_awake
        if not own and await asyncio.to_thread(_one_disk, store, Path(model.spec.worker.path)):
            return False
        return source is None or rate is None or source < rate


def _one_disk(store: Path, source: Path) -> bool:
    """As far as the system tells. Blocks."""
    try:
        status = store.stat()
        device = status.st_rdev if store.is_block_device() else status.st_dev
        return device == source.stat().st_dev
    except OSError:
        return False
