"""The life of DRAM images: filled in the background, kept while the budget allows, handed to every new worker."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from mball.device import memfd
from mball.errors import DeviceOutOfMemory, TransitionError
from mball.memory.events import Events
from mball.memory.ledger import Ledger
from mball.memory.planner import Demand, Snapshot, plan
from mball.memory.policy import image_drops
from mball.memory.settings import Settings
from mball.memory.states import Process, Weights
from mball.memory.swap_images import SwapImages
from mball.units import format_bytes

if TYPE_CHECKING:
    from mball.memory.model import Model
    from mball.memory.process import WorkerProcess

_log = structlog.get_logger(__name__)


@dataclass(eq=False)
class Image:
    """A memfd that outlives workers. `ready`: filled and sealed; `key` names what is in it (None: it can't be had from
    the swap store). `transfer` reads it from there, or writes it there; it ends with the image."""

    fd: int
    nbytes: int
    ready: bool = False
    key: bytes | None = None
    transfer: asyncio.Task[bool] | None = None


class Images:
    """Images of all models within the DRAM budget, of which they have what living workers leave: `workers` says by
    model what those have of host memory for layers and KV blocks.

    An image is worth the seconds it saves: arrival rate × what loading from the source takes ÷ its bytes. The least
    valuable goes first, and only for one that is worth twice as much.
    """

    def __init__(
        self, ledger: Ledger, settings: Settings, events: Events, changed: Callable[[], None], swap: SwapImages
    ) -> None:
        self.ledger = ledger
        self.swap = swap
        self._events = events
        self._settings = settings
        self._changed = changed
        self._filling: set[asyncio.Task[None]] = set()
        self._spare_bytes = ledger.total_bytes
        self.workers: dict[str, int] = {}
        self._warned = False

    @property
    def worker_bytes(self) -> int:
        """Of all."""
        return sum(self.workers.values())

    def limit(self, nbytes: int) -> None:
        """What the host can spare for images; what is over goes by `shrink`."""
        self._spare_bytes = nbytes
        self.ledger.limit(min(nbytes, self.ledger.total_bytes - self.worker_bytes))

    def charge(self, model: Model, nbytes: int) -> None:
        """What the model's worker has of host memory for layers and KV blocks (0: it is gone)."""
        before, total_bytes = self.worker_bytes, self.ledger.total_bytes
        self.workers[model.name] = nbytes
        if not nbytes:
            del self.workers[model.name]
        self.limit(self._spare_bytes)
        if self.worker_bytes < before:
            self._changed()
        if self.worker_bytes > total_bytes > 0 and not self._warned:
            self._warned = True
            self._events.record(
                "host memory over budget",
                model.name,
                f"with its {format_bytes(nbytes)}, workers have {format_bytes(self.worker_bytes)} of host memory for "
                f"layers and KV blocks, and dram_bytes is {format_bytes(total_bytes)}: no model keeps an image, and "
                "comes back from its files; give more dram_bytes, or fewer kv_arena_bytes and more resident_layers",
                level="warning",
            )

    def keep(self, model: Model, models: Iterable[Model], now_s: float) -> asyncio.Task[None] | None:
        """Begins to fill a model's image in the background, where it has none and the budget allows."""
        if model.image is not None or model.worker is None or model.hello is None or model.hello.image_bytes <= 0:
            return None
        task = asyncio.create_task(self._keep(model, list(models), now_s), name=f"image {model.name}")
        self._filling.add(task)
        task.add_done_callback(self._filling.discard)
        return task

    async def attach(self, model: Model) -> None:
        """Gives a ready image to a worker that has just started, whose lock is held: one that was made of the files as
        it knows them. Raises TransitionError."""
        image, worker = model.image, model.worker
        if image is None or not image.ready or worker is None:
            return
        if image.key is not None and image.key != model.image_key:
            await self.forget(model, "the model's files have changed since it was made")
            return
        await self._hand(worker, image)

    async def drop(self, model: Model, reason: str, *, store_s: float = 0.0) -> None:
        """Frees a model's image, which is written to the swap store before, where it is worth that and there are
        `store_s` for it. A worker that does not let go of it in time is killed: it would keep the pages."""
        image = model.image
        if image is not None and image.ready and store_s > 0:
            # Who else drops it waits for the same writing, each as long as he may.
            if image.transfer is None:
                image.transfer = asyncio.create_task(self.swap.keep(model, image, store_s), name=f"store {model.name}")
            await asyncio.wait({image.transfer}, timeout=store_s)
            if model.image is not image:  # another has dropped it meanwhile
                return
        async with model.lock:  # no promotion reads it now
            await self.forget(model, reason)

    async def forget(self, model: Model, reason: str) -> None:
        """As `drop`, by whoever holds the model's lock, and nothing is written."""
        image, model.image = model.image, None
        if image is None:
            return
        self.swap.look(model)
        if model.state.weights is Weights.DRAM:
            model.state = model.state.to(weights=model.rest)
        if image.transfer is not None:
            image.transfer.cancel()
        try:
            if model.worker is not None and model.state.process is Process.ALIVE:
                await self._let_go(model.worker)
        finally:
            os.close(image.fd)
            self.ledger.give_back(model.name)
        self._changed()
        self._events.record("image dropped", model.name, reason, image_bytes=image.nbytes)

    async def shrink(self, models: Iterable[Model], nbytes: int, why: str) -> None:
        """Gives images of `nbytes` up, those that save the fewest seconds a byte. One that is being filled saves none
        yet."""
        owned = {m.name: (m, m.image.nbytes) for m in models if m.image is not None}
        kept = tuple(
            dataclasses.replace(m.candidate(0), pinned=False, image_bytes=image_bytes)
            for m, image_bytes in owned.values()
        )
        held = sum(candidate.image_bytes for candidate in kept)
        for move in plan(Snapshot(0, kept), Demand("", 0, dram_bytes=min(nbytes, held))) or []:
            await self.drop(owned[move.model][0], f"{why}; {move.reason}", store_s=self._settings.hurry_s)

    async def _hand(self, worker: WorkerProcess, image: Image) -> None:
        """Refused where the model's files are not those that it was made of. Raises TransitionError."""
        key = None if image.key is None else image.key.hex()
        await worker.call("image", deadline_s=self._settings.verb_s, fd=image.fd, state="ready", key=key)

    async def _let_go(self, worker: WorkerProcess) -> None:
        try:
            await worker.call("drop_image", deadline_s=self._settings.verb_s)
        except TransitionError as error:
            _log.warning("image not let go, worker killed", model=worker.spec.model, error=str(error))
            worker.kill()
            await worker.wait(self._settings.kill_s)

    async def close(self, models: Iterable[Model]) -> None:
        """Ends the filling and frees all; the workers are gone by now."""
        for task in list(self._filling):
            task.cancel()
        await asyncio.gather(*self._filling, return_exceptions=True)
        for model in models:
            await self.drop(model, "shutting down")

    async def _keep(self, model: Model, models: list[Model], now_s: float) -> None:
        nbytes = model.hello.image_bytes if model.hello else 0
        worker = model.worker
        victims = self._victims(model, models, nbytes, now_s)
        if worker is None or victims is None:
            return
        store_s = self._settings.hurry_s if len(model.queue) else self._settings.store_s
        for victim in victims:
            why = f"{format_bytes(nbytes)} for {model.name}, which saves more seconds a byte"
            await self.drop(victim, why, store_s=store_s)
        try:
            # The drops took time: another image may have come first.
            self.ledger.promise(model.name, nbytes)
        except DeviceOutOfMemory as error:
            _log.info("no image", model=model.name, reason=str(error))
            return
        image = model.image = Image(memfd.create(model.name, nbytes), nbytes)
        self.swap.look(model)
        if model.stored:
            await self._fetch(model, image)
        if model.image is image and not image.ready:
            await self._fill(model, worker, image)

    async def _fill(self, model: Model, worker: WorkerProcess, image: Image) -> None:
        """From the source, or by what its engine has made of it."""
        try:
            filled = await worker.call("image", deadline_s=self._settings.image_s, fd=image.fd, state="empty")
            if model.image is not image:  # given up meanwhile, and its descriptor may be another's by now
                return
            memfd.seal(image.fd)
        except (TransitionError, OSError) as error:
            if model.image is image:
                _log.warning("image not filled", model=model.name, error=str(error))
                await self.drop(model, "it could not be filled")
            return
        fill_s = float(filled.get("fill_s", 0.0))
        image.key = None if (key := filled.get("key")) is None else bytes.fromhex(key)
        if model.spec.worker.starts_awake:
            # Of its memory, not of its files: it has a name only now.
            model.name_image(image.key)
        elif fill_s > 0:
            model.figures.source_rate.add(image.nbytes / fill_s)
        self._ready(model, image, fill_s, Weights.SOURCE)

    async def _fetch(self, model: Model, image: Image) -> None:
        """From the swap store, where that has it."""
        began = time.monotonic()
        image.key = model.image_key
        reading = image.transfer = asyncio.create_task(self.swap.read(model, image), name=f"fetch {model.name}")
        await asyncio.wait({reading})  # it has a deadline
        if model.image is not image:  # given up meanwhile
            return
        image.transfer = None
        if not reading.result():
            return
        try:
            memfd.seal(image.fd)
            async with model.lock:
                if model.image is image:
                    if model.worker is not None:
                        await self._hand(model.worker, image)
                    self._ready(model, image, time.monotonic() - began, Weights.NVME)
        except (TransitionError, OSError) as error:
            _log.warning("image not fetched", model=model.name, error=str(error))
            await self.drop(model, "it could not be fetched")

    def _ready(self, model: Model, image: Image, fill_s: float, source: Weights) -> None:
        image.ready = True
        if model.state.weights in (Weights.NVME, Weights.SOURCE):
            model.state = model.state.to(weights=Weights.DRAM)
        self._events.record(
            "image ready", model.name, image_bytes=image.nbytes, fill_s=round(fill_s, 3), filled_from=source.value
        )

    def _victims(self, model: Model, models: list[Model], nbytes: int, now_s: float) -> list[Model] | None:
        """Whose images go for this one: [] where there is room, None where those that stay are worth more."""
        owned = {m.name: m for m in models if m.image is not None and m.image.ready}
        kept = [m.candidate(0) for m in owned.values()]
        drops = image_drops(model.candidate(0), nbytes, kept, self.ledger.free_bytes)
        return None if drops is None else [owned[move.model] for move in drops]
