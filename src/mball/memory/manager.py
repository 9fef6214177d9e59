"""The memory manager: what the gateway calls."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from mball.device.device import Device
from mball.errors import (
    ConfigError,
    DeviceError,
    DeviceOutOfMemory,
    Draining,
    QueueFull,
    QueueTimeout,
    TransitionError,
    UnknownModel,
)
from mball.memory.images import Images
from mball.memory.lease import Lease
from mball.memory.ledger import Ledger
from mball.memory.model import Model
from mball.memory.process import WorkerProcess
from mball.memory.queue import Ticket
from mball.memory.scheduler import Scheduler
from mball.memory.settings import Settings
from mball.memory.spec import ModelSpec
from mball.memory.states import Process
from mball.memory.transition import Transitions

_log = structlog.get_logger(__name__)


class Manager:
    """Many models on one device. Everything runs on one asyncio loop, in whose thread workers are started too.

    `device_bytes` is what all workers may hold of the device together, `dram_bytes` what images may. `runtime_dir`
    holds sockets, `log_dir` (by default inside it) a log per model. `command_for` gives the command that starts a
    model's worker; `--control-fd N --spec JSON` is added to it.
    """

    def __init__(
        self,
        models: Sequence[ModelSpec],
        device: Device,
        *,
        device_bytes: int,
        dram_bytes: int,
        runtime_dir: Path,
        command_for: Callable[[ModelSpec], list[str]],
        log_dir: Path | None = None,
        settings: Settings | None = None,
    ) -> None:
        """Raises ConfigError for two models of one name."""
        self._settings = settings or Settings()
        self._scheduler: Scheduler | None = None
        self._models = {
            spec.name: Model(spec, self._settings, number, self._wake) for number, spec in enumerate(models)
        }
        if len(self._models) != len(models):
            raise ConfigError("two models have one name")
        self._device = device
        self._runtime_dir = runtime_dir
        self._log_dir = log_dir if log_dir is not None else runtime_dir / "logs"
        self._ledger = Ledger(device.name, min(device_bytes, device.total_bytes))
        self._images = Images(Ledger("dram", dram_bytes), self._settings, self._wake)
        self._command_for = command_for
        self._transitions: Transitions | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = asyncio.Event()
        self._hurry = asyncio.Event()
        self._closed: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Begins to serve; models marked `preload` are brought in where there is room."""
        await asyncio.to_thread(_make_private, self._runtime_dir, self._log_dir)
        self._transitions = Transitions(
            self._device,
            self._ledger,
            self._images,
            self._settings,
            self._runtime_dir,
            self._log_dir,
            self._command_for,
            self._worker_exited,
        )
        self._scheduler = Scheduler(
            self._models, self._device, self._ledger, self._images, self._transitions, Lease(), self._settings
        )
        self._spawn(self._scheduler.run(), "scheduler")
        self._spawn(self._sample(self._transitions), "sampler")
        _log.info("memory manager started", device=self._device.name, device_bytes=self._ledger.total_bytes)

    def names(self) -> list[str]:
        return list(self._models)

    @contextlib.asynccontextmanager
    async def admit(self, name: str, *, deadline_s: float | None = None) -> AsyncIterator[Ticket]:
        """Waits until the model is on the device and its turn has come; inside, one request is counted as in flight.

        Raises UnknownModel, ModelDoesNotFit, ModelFailed, QueueFull, QueueTimeout, Draining.
        """
        model = self._ready_to_wait(name)
        ticket = await self._enter(model, deadline_s)
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

    async def engine_status(self, name: str) -> dict[str, Any] | None:
        """What the model's engine says of itself; None where its process doesn't live.

        Raises UnknownModel, TransitionError, TimeoutError.
        """
        worker = self._model(name).worker
        return None if worker is None else await worker.call("status", deadline_s=self._settings.verb_s)

    def retry_after_s(self, name: str) -> float:
        """After how many seconds a request for the model may well be served, from measured costs; at least 1."""
        model = self._model(name)
        if model.queue.is_open:
            return 1.0
        now = time.monotonic()
        start_s = (model.figures.start_s.value or 0.0) if model.worker is None else 0.0
        stays = [m.stay_s() - (now - m.opened_s) for m in self._models.values() if m.on_device and m is not model]
        return float(math.ceil(max(1.0, start_s + model.promote_s + max(0.0, *stays, 0.0), model.not_before_s - now)))

    def not_ready(self) -> str | None:
        """Why requests should not be sent here; None where they should."""
        if self._draining.is_set():
            return "shutting down"
        if self._scheduler is None:
            return "not started"
        models = self._models.values()
        if models and all(model.state.process is Process.FAILED for model in models):
            return "every model has failed"
        return None

    def snapshot(self) -> dict[str, Any]:
        """JSON for `/mball/v1/state`."""
        models = list(self._models.values())
        return {
            "models": [model.snapshot(self._ledger.held(model.name)) for model in models],
            "device": {
                "name": self._device.name,
                "total_bytes": self._ledger.total_bytes,
                "promised_bytes": self._ledger.promised_bytes,
                "measured_bytes": sum(model.measured_bytes for model in models),
            },
            "dram": {
                "total_bytes": self._images.ledger.total_bytes,
                "image_bytes": self._images.ledger.promised_bytes,
            },
            "promotions": sum(model.counters.promotions for model in models),
            "demotions": sum(model.counters.demotions for model in models),
            "crashes": sum(model.counters.crashes for model in models),
            "draining": self._draining.is_set(),
        }

    def begin_drain(self) -> None:
        """From now on requests get Draining, those that wait too; those in flight go on. A second call ends those."""
        if self._draining.is_set():
            self._hurry.set()
            return
        self._draining.set()
        _log.info("draining", in_flight=sum(model.queue.in_flight for model in self._models.values()))
        for model in self._models.values():
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
        if self._scheduler is not None:
            await self._scheduler.close()
        if self._transitions is not None:
            stops = [self._transitions.stop(model, "shutting down") for model in models]
            for error in await asyncio.gather(*stops, return_exceptions=True):
                if error is not None:
                    _log.error("worker not stopped", error=str(error))
        await self._images.close(models)
        await asyncio.to_thread(_remove_sockets, self._runtime_dir)
        _log.info("memory manager closed")

    def _model(self, name: str) -> Model:
        model = self._models.get(name)
        if model is None:
            raise UnknownModel(f"the model {name!r} is not served here; these are: {', '.join(self._models)}")
        return model

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
        if model.queue.would_wait and sum(len(m.queue) for m in self._models.values()) >= self._settings.max_queue:
            wait_s = self.retry_after_s(name)
            raise QueueFull(f"{self._settings.max_queue} requests wait for their models already", retry_after_s=wait_s)
        return model

    async def _enter(self, model: Model, deadline_s: float | None, *, visitor: bool = False) -> Ticket | None:
        wait_s = self._settings.queue_timeout_s if deadline_s is None else deadline_s
        try:
            return await model.queue.enter(wait_s, visitor=visitor)
        except QueueTimeout as timeout:
            raise QueueTimeout(str(timeout), retry_after_s=self.retry_after_s(model.name)) from None

    def _wake(self) -> None:
        if self._scheduler is not None:
            self._scheduler.wake()

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _worker_exited(self, model: Model, worker: WorkerProcess) -> None:
        if self._scheduler is not None:
            self._scheduler.worker_exited(model, worker)

    async def _sample(self, transitions: Transitions) -> None:
        """Measures what workers hold: the busy often, the idle now and then."""
        last: dict[str, float] = {}
        while True:
            await asyncio.sleep(self._settings.sample_s)
            for model in self._models.values():
                idle_s = time.monotonic() - last.get(model.name, 0.0)
                if model.queue.in_flight or idle_s >= self._settings.idle_sample_s:
                    last[model.name] = time.monotonic()
                    await self._take_sample(transitions, model)

    async def _take_sample(self, transitions: Transitions, model: Model) -> None:
        if not model.settled or model.state.process is not Process.ALIVE:
            return
        try:
            held = await transitions.measure(model)
        except DeviceError as error:
            _log.warning("not measured", model=model.name, error=str(error))
            return
        if held is None or not model.settled or model.state.process is not Process.ALIVE:
            return
        model.keeps(held)
        if held > self._ledger.held(model.name):
            with contextlib.suppress(DeviceOutOfMemory):
                self._ledger.promise(model.name, held)
                return
            self._wake()


def _draining() -> Draining:
    return Draining("the server is shutting down; try another, or later", retry_after_s=5.0)


def _make_private(runtime_dir: Path, log_dir: Path) -> None:
    for folder in (runtime_dir, log_dir):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    runtime_dir.chmod(0o700)


def _remove_sockets(runtime_dir: Path) -> None:
    for socket in runtime_dir.glob("*.sock"):
        socket.unlink(missing_ok=True)
