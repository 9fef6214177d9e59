"""The memory manager: what the gateway calls."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from mball.device.device import Device
from mball.errors import (
    DeviceError,
    DeviceOutOfMemory,
    Draining,
    InvalidRequest,
    QueueFull,
    QueueTimeout,
    TransitionError,
    VerbFailed,
)
from mball.memory.cores_keeper import CoresKeeper
from mball.memory.devices import Devices
from mball.memory.events import Event, Events
from mball.memory.figures_keeper import FiguresKeeper
from mball.memory.images import Images
from mball.memory.invariants import Books
from mball.memory.ledger import Ledger
from mball.memory.log_follower import follow
from mball.memory.model import Model
from mball.memory.nursery import Nursery
from mball.memory.outlook import progress, ready_in_s
from mball.memory.pressure_watch import Gauge, PressureWatch
from mball.memory.queue import Ticket
from mball.memory.roster import Changes, Roster
from mball.memory.settings import Settings
from mball.memory.slot import Slot
from mball.memory.spec import ModelSpec
from mball.memory.states import Process
from mball.memory.swap_broker import SwapBroker
from mball.memory.swap_images import SwapImages
from mball.memory.swap_keeper import SwapKeeper
from mball.memory.worker_log import log_path, log_tail
from mball.swap.store import Settings as SwapSettings
from mball.units import format_bytes

_log = structlog.get_logger(__name__)
_SHOWN = 20
"""Events in a snapshot."""


class Manager:
    """Many models on one device or several. Everything runs on one asyncio loop, in whose thread workers are started
    too.

    `devices`: each with what all workers may hold of it together; `dram_bytes`: what images may, with what workers keep
    there. `runtime_dir` holds sockets, `log_dir` (by default inside it) a log per model, `state_dir` what is kept
    across restarts (None: nothing is). `command_for` gives the command that starts a model's worker; `--control-fd N
    --spec JSON` is added to it, `zygote_for` that of a zygote which can fork such workers (None: they start afresh).
    `runs_dir` holds the records of this user's runs (None: the user's own place). `gauge` tells of the host's memory
    (None: the host's). `swap` says where the swap store is (None: there is none).
    """

    def __init__(
        self,
        models: Sequence[ModelSpec],
        devices: Sequence[tuple[Device, int]],
        *,
        dram_bytes: int,
        runtime_dir: Path,
        command_for: Callable[[ModelSpec], list[str]],
        zygote_for: Callable[[ModelSpec], list[str] | None] = lambda _: None,
        log_dir: Path | None = None,
        runs_dir: Path | None = None,
        state_dir: Path | None = None,
        settings: Settings | None = None,
        gauge: Gauge | None = None,
        swap: SwapSettings | None = None,
    ) -> None:
        """Raises ConfigError for two models of one name, or a model whose device is not among them."""
        self._settings = settings or Settings()
        self.events = Events(told=self._look)
        self._cores: CoresKeeper | None = None
        self._max_queue = self._settings.max_queue
        told = self._wake, self._passed
        self._roster = Roster(models, lambda spec, number: Model(spec, self._settings, number, *told))
        self._models = self._roster.models
        self._runtime_dir = runtime_dir
        self._log_dir = log_dir if log_dir is not None else runtime_dir / "logs"
        self._devices = Devices(self._models, self._settings, self.events)
        self._swap = SwapKeeper(swap, self.events)
        self._broker = SwapBroker(self._swap, self._settings.verb_s)
        swapped = SwapImages(self._swap, self._settings, self.events)
        self._images = Images(Ledger("dram", dram_bytes), self._settings, self.events, self._wake, swapped)
        self._figures = FiguresKeeper(self._models, devices, state_dir, self._settings)
        if any(device.name == "cpu" for device, _ in devices):
            self._cores = CoresKeeper(self._models, self._settings)
        self._pressure = PressureWatch(
            self._models, self._images, self.events, gauge or Gauge(), self._settings, self._wake
        )
        zygotes = {tuple(command_for(spec)): line for spec in models if (line := zygote_for(spec)) is not None}
        paths = {tuple(command_for(s)): s.environment["PYTHONPATH"] for s in models if "PYTHONPATH" in s.environment}
        self._nursery = Nursery(zygotes, self._settings, runs_dir, self._log_dir, paths)
        self._devices.settle(
            [
                Slot(
                    device,
                    nbytes,
                    self._devices,
                    self._images,
                    self._settings,
                    self.events,
                    self._runtime_dir,
                    self._log_dir,
                    command_for,
                    self._nursery,
                    self._broker,
                )
                for device, nbytes in devices
            ]
        )
        self._books = Books(self._models, self._devices, self._images.ledger, self.events)
        self._claimed = self._started = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = asyncio.Event()
        self._hurry = asyncio.Event()
        self._closed: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Begins to serve; models marked `preload` are brought in where there is room.

        Raises DeviceInUse where another daemon has one of the devices, OSError.
        """
        await asyncio.to_thread(self.claim)
        await self._nursery.open()
        await self._figures.recall(self._roster.all())
        self._started = True
        for slot in self._devices:
            self._spawn(slot.scheduler.run(), f"scheduler of {slot.name}")
            self._spawn(slot.sampler.run(), f"sampler of {slot.name}")
            _log.info("device", device=slot.name, budget_bytes=slot.ledger.total_bytes)
        self._spawn(self._books.run(self._settings.books_s), "books")
        self._spawn(self._open_swap(), "swap store")
        self._spawn(self._pressure.run(), "pressure")
        self._spawn(self._figures.run(), "figures")
        if self._cores is not None:
            self._spawn(self._cores.run(), "cores")
        _log.info("memory manager started", devices=len(self._devices))

    def claim(self) -> None:
        """Makes the folders, and takes the devices for this daemon; `start` does where it was not done before.

        Blocks for a moment. Raises DeviceInUse where another daemon has one, DeviceError, OSError; then it takes none.
        """
        if self._claimed:
            return
        _make_private(self._runtime_dir, self._log_dir)
        try:
            for slot in self._devices:
                slot.claim()
        except DeviceError:
            for slot in self._devices:
                slot.release()
            raise
        self._claimed = True

    def names(self) -> list[str]:
        return self._roster.names()

    def serves(self, name: str) -> bool:
        """A model or an adapter."""
        return name in self._roster.adapters or self._roster.answering(name) is not None

    def adapters(self) -> dict[str, str]:
        """Models that another one serves, as adapters of it: that one's name by theirs."""
        return self._roster.adapters

    async def prepare(self, models: Sequence[ModelSpec]) -> Changes:
        """What `change` needs to serve these models from now on. Nothing has changed yet. Raises ConfigError."""
        changes = self._roster.compare(models)
        for model in changes.fresh:
            self._devices.check(model)
        await self._figures.recall(changes.fresh)
        return changes

    def change(self, changes: Changes, *, max_queue: int) -> None:
        """From now on requests find the models as they are to be. Those that came before are answered as the models
        were, whose workers end after them; who takes the place of one comes after that."""
        if self._draining.is_set():
            return
        self._max_queue = max_queue
        self._roster.change(changes, self._devices.seat, self._devices.unseat)
        self.events.record("configured", None, str(changes))
        self._wake()

    @contextlib.asynccontextmanager
    async def admit(self, name: str, *, deadline_s: float | None = None, priority: int = 0) -> AsyncIterator[Ticket]:
        """Waits until the model is on the device and its turn has come; inside, one request is counted as in flight.
        The lower `priority` goes first.

        Raises UnknownModel, ModelDoesNotFit, ModelFailed, QueueFull, QueueTimeout, Draining.
        """
        model = self._ready_to_wait(name)
        ticket = await self._enter(model, deadline_s, priority=priority)
        if ticket is None:
            raise TransitionError(f"{name}: no ticket")
        try:
            yield ticket
            if not ticket.lost.is_set():
                model.crashes_in_row = 0
        finally:
            model.queue.leave(ticket)

    async def load(self, name: str, *, deadline_s: float | None = None) -> None:
        """Brings a model to the device, as a request would. Raises as `admit`."""
        await self._enter(self._ready_to_wait(name), deadline_s, visitor=True)

    async def unload(self, name: str) -> None:
        """Takes a model off the device once those inside are done; the next request brings it back.

        Raises UnknownModel, and TransitionError where it is still in use after `drain_s`.
        """
        model = self._model(name)
        model.wanted = False
        if model.unload is None:
            model.unload = asyncio.get_running_loop().create_future()
        leaving = model.unload
        self._wake()
        deadline_s = self._settings.drain_s + self._settings.demote_s
        await asyncio.wait({leaving}, timeout=deadline_s)
        if not leaving.done():
            model.unload = None
            self._wake()
            raise TransitionError(f"{name}: still in use after {deadline_s:.0f} s ({model.queue.in_flight} in flight)")

    async def pin(self, name: str) -> None:
        """Once on the device it is not demoted for another. Raises UnknownModel."""
        self._model(name).pinned = True
        self._wake()

    async def unpin(self, name: str) -> None:
        """Raises UnknownModel."""
        self._model(name).pinned = False
        self._wake()

    async def balloon(self, name: str, nbytes: int) -> None:
        """Has a model do without `nbytes` of the device from now on, also while it serves; 0 gives all back, as soon as
        there is room for it.

        Raises UnknownModel, InvalidRequest where it can't do without so much, TransitionError.
        """
        model = self._model(name)
        needs, whose = model.needs, "its KV pool has"
        most_bytes = needs.kv_bytes if needs is not None else nbytes + 1
        if needs is not None and model.spec.worker.streamed:
            most_bytes, whose = most_bytes + needs.weights_bytes, "its KV pool and its weights have"
        if nbytes < 0 or (nbytes and nbytes >= most_bytes):
            most = f"{whose} {format_bytes(most_bytes)}, which are not to be given up whole"
            raise InvalidRequest(f"{name}: {format_bytes(nbytes)} for the balloon: {most}", param="bytes")
        before, model.balloon_bytes = model.balloon_bytes, nbytes
        if not model.on_device:
            self.events.record("balloon set", name, "from the next promotion on", balloon_bytes=nbytes)
            return
        slot = self._devices.of(model)
        try:
            async with asyncio.timeout(self._settings.drain_s), slot.lease.hold() as epoch:
                if model.on_device:
                    await slot.transitions.set_balloon(model, nbytes, epoch, "asked for by hand")
        except DeviceOutOfMemory as error:
            self.events.record("balloon set", name, f"its memory comes back once there is room: {error}")
        except VerbFailed as error:
            model.balloon_bytes = before
            raise InvalidRequest(str(error), param="bytes") from None
        except TimeoutError:
            model.balloon_bytes = before
            raise TransitionError(f"{name}: other moves took {self._settings.drain_s:.0f} s") from None
        finally:
            self._wake()

    async def engine_status(self, name: str) -> dict[str, Any] | None:
        """What the model's engine says of itself; None where its process doesn't live.

        Raises UnknownModel, TransitionError, TimeoutError.
        """
        worker = self._model(name).worker
        return None if worker is None else await worker.call("status", deadline_s=self._settings.verb_s)

    def retry_after_s(self, name: str) -> float:
        """After how many seconds a request for the model may well be served, from what bringing it in, and answering
        those that wait, was measured to take; at least 1."""
        model = self._roster.answering(name)
        return 1.0 if model is None else ready_in_s(model, self._devices.of(model).models.values())

    def progress(self, name: str) -> dict[str, Any]:
        """JSON for those that wait for a model: the rung it is on, what is loaded of it, and how long it may take."""
        model = self._roster.answering(name)
        return {"model": name} if model is None else {**progress(model), "expected_s": self.retry_after_s(name)}

    def not_ready(self) -> str | None:
        """Why requests should not be sent here; None where they should."""
        if self._draining.is_set():
            return "shutting down"
        if not self._started:
            return "not started"
        if all(slot.lost is not None for slot in self._devices):
            return "no device answers"
        models = self._models.values()
        if models and all(model.state.process is Process.FAILED for model in models):
            return "every model has failed"
        return None

    def snapshot(self) -> dict[str, Any]:
        """JSON for `/mball/v1/state`."""
        models = list(self._models.values())
        return {
            "models": [self._shown(model) for model in models],
            "devices": [slot.snapshot() for slot in self._devices],
            "dram": {
                "total_bytes": self._images.ledger.total_bytes,
                "limit_bytes": self._images.ledger.limit_bytes,
                "image_bytes": self._images.ledger.promised_bytes,
                "worker_bytes": self._images.worker_bytes,
                "pressure": self._pressure.snapshot(),
            },
            "swap": self._swap.snapshot(),
            "events": [self._told(event) for event in self.events.recent(_SHOWN)],
            "books_wrong": self._books.check(),
            "promotions": sum(model.counters.promotions for model in models),
            "demotions": sum(model.counters.demotions for model in models),
            "crashes": sum(model.counters.crashes for model in models),
            "draining": self._draining.is_set(),
        }

    def workers(self) -> dict[int, tuple[str, str]]:
        """pid → (model, what it is doing) of every worker that lives: start, a verb, drain, serve, awake or asleep."""
        workers = [(pid, name, self._models.get(name)) for pid, name in self._nursery.workers.items()]
        return {pid: (name, "stop" if model is None else model.doing(pid)) for pid, name, model in workers}

    def log_tail(self, name: str) -> str:
        """The last lines of the log of the model's workers. Reads a file: call it off the loop. Raises UnknownModel."""
        return log_tail(log_path(self._log_dir, self._model(name).name))

    def log_lines(self, name: str) -> AsyncIterator[str]:
        """The same, and what they write from now on, until the server drains. Raises UnknownModel, later OSError."""
        return follow(log_path(self._log_dir, self._model(name).name), self._draining)

    def begin_drain(self) -> None:
        """From now on requests get Draining, those that wait too; those in flight go on. A second call ends those."""
        if self._draining.is_set():
            self._hurry.set()
            return
        self._draining.set()
        in_flight = sum(model.queue.in_flight for model in self._roster.all())
        self.events.record("draining", None, "told to shut down", in_flight=in_flight)
        # Whoever follows would hold the server's end up.
        self.events.close()
        for model in self._roster.all():
            model.queue.refuse(_draining)
            model.wanted = False

    async def close(self, deadline_s: float) -> None:
        """Lets those in flight finish until the deadline, then ends every worker. May be called again, and at once."""
        if not self._draining.is_set():
            self.begin_drain()
        if self._closed is not None:
            self._hurry.set()
            await asyncio.shield(self._closed)
            return
        self._closed = asyncio.ensure_future(self._close(deadline_s))
        await asyncio.shield(self._closed)

    async def _close(self, deadline_s: float) -> None:
        models = list(self._models.values())
        drained = asyncio.gather(*(model.queue.empty(deadline_s) for model in models))
        hurry = asyncio.ensure_future(self._hurry.wait())
        either: set[asyncio.Future[Any]] = {drained, hurry}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        drained.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drained
        for model in models:
            model.queue.lose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._figures.save()
        await asyncio.gather(*(slot.scheduler.close() for slot in self._devices))
        stops = [self._devices.of(model).transitions.stop(model, "shutting down") for model in models]
        for error in await asyncio.gather(*stops, return_exceptions=True):
            if error is not None:
                _log.error("worker not stopped", error=str(error))
        await self._images.close(models)
        await self._swap.close()
        await self._nursery.close()
        if self._claimed:  # else the folder is another's
            await asyncio.to_thread(_remove_sockets, self._runtime_dir)
            for slot in self._devices:
                slot.release()
            self._claimed = False
        _log.info("memory manager closed")

    async def _open_swap(self) -> None:
        """Workers that came before it are given it, too."""
        if await self._swap.open():
            for model in list(self._models.values()):
                if model.worker is not None:
                    await self._broker.introduce(model.worker)
            self._wake()

    def _model(self, name: str) -> Model:
        return self._roster.find(name)

    def _ready_to_wait(self, name: str) -> Model:
        """The model, where a request for it may wait at all."""
        model = self._model(name)
        if self._draining.is_set():
            raise _draining()
        if model.failure is not None:
            if time.monotonic() < model.not_before_s:
                raise model.failure()
            model.failure, model.crashes_in_row = None, 0
            if model.state.process is Process.FAILED:
                model.state = model.state.to(Process.GONE)
        if model.queue.would_wait:
            self._check_room(model)
        return model

    def _check_room(self, model: Model) -> None:
        """Raises QueueFull."""
        most = model.spec.max_queue
        if most is not None and len(model.queue) >= most:
            full = f"{most} requests wait for {model.name} already"
        elif sum(len(m.queue) for m in self._roster.all()) >= self._max_queue:
            full = f"{self._max_queue} requests wait for their models already"
        else:
            return
        raise QueueFull(full, retry_after_s=self.retry_after_s(model.name))

    async def _enter(
        self, model: Model, deadline_s: float | None, *, visitor: bool = False, priority: int = 0
    ) -> Ticket | None:
        wait_s = self._settings.queue_timeout_s if deadline_s is None else deadline_s
        try:
            return await model.queue.enter(wait_s, visitor=visitor, priority=priority)
        except QueueTimeout as timeout:
            raise QueueTimeout(str(timeout), retry_after_s=self.retry_after_s(model.name)) from None

    def _wake(self) -> None:
        self._devices.wake()
        self._look()

    def _passed(self) -> None:
        self._devices.passed()
        self._look()

    def _look(self) -> None:
        """Who computes may have changed."""
        if self._cores is not None:
            self._cores.look()

    def _shown(self, model: Model) -> dict[str, Any]:
        last = self.events.last(model.name)
        slot = self._devices.of(model)
        device = None if model.state.process in (Process.GONE, Process.FAILED) else slot.name
        shown = {**model.snapshot(slot.ledger.held(model.name)), "device": device, "last_event": self._told(last)}
        shown["host_bytes"] = self._images.workers.get(model.name, 0)
        if model.retired and (coming := self._roster.answering(model.name)) is not None and coming is not model:
            shown["queued"] += len(coming.queue)
        return shown

    def _told(self, event: Event | None) -> dict[str, Any] | None:
        return None if event is None else {"id": self.events.id_of(event), **event.as_dict()}

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _draining() -> Draining:
    return Draining("the server is shutting down; try another, or later", retry_after_s=5.0)


def _make_private(runtime_dir: Path, log_dir: Path) -> None:
    for folder in (runtime_dir, log_dir):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    runtime_dir.chmod(0o700)


def _remove_sockets(runtime_dir: Path) -> None:
    for socket in runtime_dir.glob("*.sock"):
        socket.unlink(missing_ok=True)
