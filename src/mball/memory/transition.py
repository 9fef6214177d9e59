"""The steps that move one model: start, promote, demote, stop. Each has a deadline, and one undo: stop the worker."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from mball.device.device import Device
from mball.errors import (
    ConfigError,
    DeviceError,
    DeviceOutOfMemory,
    IllegalMove,
    MballError,
    ModelDoesNotFit,
    NotReleased,
    TransitionError,
    VerbFailed,
    WorkerDied,
)
from mball.memory.events import Events
from mball.memory.images import Images
from mball.memory.launch import Launch
from mball.memory.ledger import Ledger
from mball.memory.model import Model
from mball.memory.process import Hello, WorkerProcess
from mball.memory.settings import Settings
from mball.memory.spec import ModelSpec, WorkerSpec
from mball.memory.states import Process, Weights
from mball.memory.swap_broker import SwapBroker
from mball.memory.worker_log import log_path
from mball.units import format_bytes

_log = structlog.get_logger(__name__)
_POLL_S = 0.01
_SOCKET_PATH_BYTES = 107


class Transitions:
    """Moves models on one device. Promises come before bytes are taken; they end when the device shows them free."""

    def __init__(
        self,
        device: Device,
        ledger: Ledger,
        images: Images,
        settings: Settings,
        events: Events,
        folder: Path,
        log_folder: Path,
        command_for: Callable[[ModelSpec], list[str]],
        on_exit: Callable[[Model, WorkerProcess], None],
        launch: Launch,
        swap: SwapBroker,
    ) -> None:
        self._device = device
        self._ledger = ledger
        self._images = images
        self._settings = settings
        self._events = events
        self._folder = folder
        self._log_folder = log_folder
        self._command_for = command_for
        self._on_exit = on_exit
        self._launch = launch
        self._swap = swap

    async def start(self, model: Model) -> None:
        """Gone → alive, or on the device where its worker starts there. What that takes is promised already.

        Raises WorkerNotStarted, ModelDoesNotFit, DeviceError, TransitionError; then no process is left and nothing
        is promised.
        """
        async with model.lock:
            model.state = model.state.to(Process.STARTING)
            model.counters.starts += 1
            model.generation += 1
            self._images.charge(model, 0 if model.estimate is None else model.estimate.cold_bytes)
            began = time.monotonic()
            owner = f"{model.name} #{model.generation}"
            try:
                worker, model.hello = await WorkerProcess.start(
                    self._command_for(model.spec),
                    self._worker_spec(model),
                    extra_environment=model.spec.environment,
                    log=self._log_of(model),
                    settings=self._settings,
                    launch=self._launch,
                    answer=self._swap.answers(owner),
                )
            except MballError:
                self._swap.gone(owner)
                model.state = model.state.to(Process.GONE)
                self._give_back(model)
                raise
            model.worker = worker
            model.state = model.state.to(Process.ALIVE)
            worker.on_lost(model.queue.lose)
            worker.on_exit(lambda: self._swap.gone(owner))
            worker.on_exit(lambda: self._on_exit(model, worker))
            try:
                await self._settle(model)
                if model.hello.resident:
                    await self._welcome(model, worker)
            except MballError:
                await self.bury(model)
                raise
            took = time.monotonic() - began
            model.figures.start_s.add(took)
            self._events.record("started", model.name, pid=worker.pid, start_s=round(took, 3), **_stages(model.hello))

    async def promote(self, model: Model, epoch: int) -> None:
        """Alive → on the device and answering, its door still shut. There is room for it.

        Raises DeviceOutOfMemory where there is none after all; WorkerDied, or TransitionError and its kin with the
        reason, after which the worker is gone and nothing is promised.
        """
        async with model.lock:
            worker, settings = _alive(model), self._settings
            self._images.swap.look(model)
            self._ledger.promise(model.name, model.needed_bytes)
            worker.loaded_bytes = 0
            began = time.monotonic()
            reason = _whom_for(model)
            try:
                if model.ballooned_bytes != model.arrives_without_bytes:
                    await self._wish(model, worker, epoch)
                done, rest = await self._load(model, worker, epoch)
                canary = await worker.call("canary", deadline_s=settings.canary_s)
                if not canary.get("ok"):
                    raise TransitionError(f"{model.name}: no token came out after the weights were loaded")
                held = await self._held(model)
                model.state = model.state.to(weights=Weights.DEVICE)
                model.keeps(held)
            except MballError:
                await self.bury(model)
                raise
            took = time.monotonic() - began
            load_s, weights_bytes = float(done.get("load_s", 0.0)), int(done.get("weights_bytes", 0))
            model.figures.promote_s[rest].add(took)
            model.figures.load_rate = weights_bytes / load_s if load_s > 0 else None
            self._learn(model, rest, load_s)
            model.counters.promotions += 1
            if model.tight_bytes:
                # Layers go as a whole: it may have given more than it had to.
                model.tight_bytes = 0
                self._ledger.promise(model.name, min(self._ledger.held(model.name), max(held, model.needed_bytes)))
            model.opened_s = model.queue.last_used_s = time.monotonic()
            model.error = None
            self._events.record(
                "promoted",
                model.name,
                reason,
                epoch=epoch,
                weights_from=rest.value,
                promote_s=round(took, 3),
                held_bytes=held,
                promised_bytes=self._ledger.held(model.name),
            )
        await self.inquire(model)

    async def _load(self, model: Model, worker: WorkerProcess, epoch: int) -> tuple[dict[str, Any], Weights]:
        """The promotion itself, and where the weights came from."""
        came_from = model.rest
        with self._images.swap.lent(model) as lent:
            fd = None if lent is None else lent[1]
            done = await worker.call("promote", deadline_s=self._settings.promote_s, epoch=epoch, fd=fd)
        self._charge(model, done)
        if came_from is Weights.NVME and done.get("weights_from") != Weights.NVME:
            came_from = Weights.SOURCE
        if lent is not None and (missed := done.get("missed")) is not None:
            self._images.swap.missed(model, lent[0], str(missed))
        return done, came_from

    def _learn(self, model: Model, rest: Weights, load_s: float) -> None:
        """How fast it was read from where."""
        if load_s > 0 and model.hello is not None:
            rates = {Weights.NVME: self._images.swap.read_rate, Weights.SOURCE: model.figures.source_rate}
            if rest in rates:
                rates[rest].add(model.hello.weights_bytes / load_s)

    async def demote(self, model: Model, epoch: int, reason: str) -> None:
        """On the device → alive at rest, or gone where the worker did not give its bytes back.

        Raises IllegalMove unless its door is shut and nobody is inside, NotReleased where not even its end freed them.
        """
        async with model.lock:
            if not model.on_device:
                return
            if model.queue.is_open or model.queue.in_flight:
                raise IllegalMove(f"{model.name}: in use ({model.queue.in_flight} in flight), so it is not demoted")
            worker, began = _alive(model), time.monotonic()
            model.counters.demotions += 1
            try:
                before, gives = await self._held(model), model.movable_bytes
                free_bytes = await asyncio.to_thread(self._device.free_bytes)
                self._charge(model, await worker.call("demote", deadline_s=self._settings.demote_s, epoch=epoch))
                # Beside its weights and KV it may keep what its context has grown by. That is charged, and no more.
                allowed = max(model.context_bytes, before - gives) + self._settings.slack_bytes
                held = await self._given(model, allowed, free_bytes + gives, model.context_bytes)
                if abs(held - model.context_bytes) > self._settings.slack_bytes:
                    model.context_bytes = held
                    model.figures.needs = model.needs
            except (TransitionError, DeviceError) as error:
                dead = worker.exited.is_set()
                await self.bury(model)
                if not dead:
                    why = f"it did not give its memory back: {error}"
                    self._events.record("stopped", model.name, why, level="warning")
                return
            self._images.swap.look(model)
            model.state = model.state.to(weights=model.rest)
            model.figures.held.start_anew()
            model.measured_bytes = held
            self._ledger.promise(model.name, held)
            took = time.monotonic() - began
            model.figures.demote_s.add(took)
            self._events.record("demoted", model.name, reason, epoch=epoch, demote_s=round(took, 3), held_bytes=held)

    async def balloon(self, model: Model, nbytes: int, epoch: int, reason: str, *, gently: bool = True) -> None:
        """Takes `nbytes` more from a model while it serves, of what nobody uses, and proves them free; not `gently`:
        of its layers, too.

        Raises DeviceOutOfMemory where it can't give as much any more; WorkerDied.
        """
        try:
            await self.set_balloon(model, model.ballooned_bytes + nbytes, epoch, reason, gently=gently)
        except (VerbFailed, NotReleased) as error:
            spare_bytes, model.spare_bytes, model.layer_bytes = model.spare_bytes, 0, 0
            _log.warning("not ballooned", model=model.name, error=str(error))
            what = f"{model.name}'s balloon"
            raise DeviceOutOfMemory(what, nbytes, spare_bytes, self._ledger.held(model.name)) from error

    async def set_balloon(self, model: Model, nbytes: int, epoch: int, reason: str, *, gently: bool = False) -> None:
        """Has a living model do without `nbytes`, fewer or more than now.

        Raises VerbFailed where its engine can't, DeviceOutOfMemory where there is no room for what it takes back,
        NotReleased where the device does not show free what it gave (that stays promised); WorkerDied, or
        TransitionError past the deadline: then its worker is gone.
        """
        async with model.lock:
            worker, before, held = _alive(model), model.ballooned_bytes, self._ledger.held(model.name)
            if not model.on_device:
                await self._squeeze(model, worker, nbytes, epoch)
                return
            # What comes back is taken at once: it is promised before.
            self._ledger.promise(model.name, held + max(0, before - nbytes))
            free_bytes = await asyncio.to_thread(self._device.free_bytes)
            began = time.monotonic()
            try:
                await self._squeeze(model, worker, nbytes, epoch, gently=gently)
            except VerbFailed:
                self._ledger.promise(model.name, held)
                raise
            except TransitionError:
                await self.bury(model)
                raise
            took, freed = time.monotonic() - began, model.ballooned_bytes - before
            model.layer_bytes = max(0, model.layer_bytes - max(0, freed - model.spare_bytes))
            model.spare_bytes = max(0, model.spare_bytes - freed)
            model.figures.held.start_anew()
            if freed > 0:
                model.measured_bytes = await self._given(model, held - freed, free_bytes + freed, held - freed)
            elif freed < 0:
                model.figures.balloon_s.add(took)
            self._ledger.promise(model.name, held - freed)
            if not freed:
                return
            self._events.record(
                "ballooned" if freed > 0 else "deflated",
                model.name,
                reason,
                epoch=epoch,
                freed_bytes=freed,
                ballooned_bytes=model.ballooned_bytes,
                balloon_s=round(took, 3),
            )

    async def inquire(self, model: Model) -> None:
        """Asks its worker whether it lives, and its engine what it could give up now: nothing where it doesn't say."""
        worker, status = model.worker, dict[str, Any]()
        if worker is not None:
            try:
                status = await worker.call("status", deadline_s=self._settings.verb_s)
            except TransitionError as error:
                _log.warning("no status", model=model.name, error=str(error))
        if not model.lock.locked():
            model.spare_bytes = int(status.get("spare_bytes", 0)) if model.on_device else 0
            model.layer_bytes = int(status.get("layer_bytes", 0)) if model.on_device else 0
            model.layer_s = float(status.get("layer_s", 0.0))

    async def _wish(self, model: Model, worker: WorkerProcess, epoch: int) -> None:
        """What was taken for others has ended with its stay; what its operator wants goes on, as far as it can be, and
        so does what there is no room for, else it does not come."""
        try:
            await self._squeeze(model, worker, model.arrives_without_bytes, epoch)
        except VerbFailed as error:
            if model.tight_bytes > model.balloon_bytes:
                model.tight_bytes = 0
                raise
            model.balloon_bytes = model.ballooned_bytes
            self._events.record("balloon set", model.name, f"not as was wished: {error}", level="warning")
        # The wish may be another by now: whoever made it waits for his turn.
        self._ledger.promise(model.name, model.needed_without(model.ballooned_bytes))

    async def _squeeze(
        self, model: Model, worker: WorkerProcess, nbytes: int, epoch: int, *, gently: bool = False
    ) -> None:
        done = await worker.call(
            "balloon", deadline_s=self._settings.demote_s, epoch=epoch, bytes=nbytes, gently=gently
        )
        model.ballooned_bytes = int(done["ballooned_bytes"])

    async def stop(self, model: Model, reason: str) -> None:
        """Any state with a process → gone. Raises NotReleased, TransitionError as `bury`."""
        async with model.lock:
            if model.worker is not None:
                await self.bury(model, politely=True)
                self._events.record("stopped", model.name, reason)

    async def bury(self, model: Model, *, politely: bool = False) -> None:
        """Ends the worker for certain, proves its bytes free, and gives the promise back. The lock is held.

        Raises NotReleased, or TransitionError where it can't be killed; then its bytes stay promised and its state
        stays `stopping`, to be tried again.
        """
        worker = model.worker
        if worker is None:
            return
        model.queue.lose()
        if worker.exited.is_set() and model.state.process is not Process.STOPPING:
            ended = True
        else:
            ended = False
            if model.state.process is not Process.STOPPING:
                model.state = model.state.to(Process.STOPPING)
        await worker.stop(self._settings, politely=politely)
        await self._gone(worker)
        self._give_back(model)
        model.worker = None
        model.measured_bytes = model.ballooned_bytes = model.spare_bytes = model.layer_bytes = 0
        if model.spec.worker.starts_awake:
            await self._images.forget(model, "it is of its worker's memory, which is gone")
            model.name_image(None)
            self._images.swap.look(model)
        model.state = model.state.to(Process.GONE, model.rest)
        if ended:
            self._events.record("ended", model.name, f"exit code {worker.exit_code}", level="warning", pid=worker.pid)

    async def measure(self, model: Model) -> int | None:
        """Device bytes that its worker holds now; None where it has none, or they can't be seen."""
        worker, hello = model.worker, model.hello
        if worker is None or hello is None:
            return None
        return await asyncio.to_thread(self._device.process_bytes, worker.pid, hello.baseline_bytes)

    async def _settle(self, model: Model) -> None:
        """After a hello: what the context costs, whether the model fits at all, and its image."""
        hello = model.hello
        self._images.charge(model, 0 if hello is None else hello.host_bytes)
        held = model.measured_bytes = await self._held(model)
        model.context_bytes = held if hello is None or not hello.resident else max(0, held - model.movable_bytes)
        self._ledger.promise(model.name, held)
        model.figures.needs = model.needs
        if model.needed_bytes > self._ledger.total_bytes:
            raise ModelDoesNotFit(does_not_fit(model, self._ledger.total_bytes))
        if model.worker is not None:
            await self._swap.introduce(model.worker)
        self._images.swap.look(model)
        await self._images.attach(model)

    async def _welcome(self, model: Model, worker: WorkerProcess) -> None:
        """Its worker has started on the device: from now on it is there, if it answers."""
        canary = await worker.call("canary", deadline_s=self._settings.canary_s)
        if not canary.get("ok"):
            raise TransitionError(f"{model.name}: no token came out after its worker had started")
        held = await self._held(model)
        self._ledger.promise(model.name, max(held, model.needed_bytes))
        model.state = model.state.to(weights=Weights.DEVICE)
        model.keeps(held)
        model.opened_s = model.queue.last_used_s = time.monotonic()
        model.error = None

    async def _held(self, model: Model) -> int:
        """As `measure`. Where the device hides it, what is promised counts. Raises WorkerDied."""
        held = await self.measure(model)
        if model.worker is not None and model.worker.exited.is_set():
            raise WorkerDied(f"{model.name}: its worker ended")
        return self._ledger.held(model.name) if held is None else held

    def _charge(self, model: Model, done: dict[str, Any]) -> None:
        """What a worker that was moved says that it has of host memory now."""
        if (nbytes := done.get("host_bytes")) is not None:
            self._images.charge(model, int(nbytes))

    def _give_back(self, model: Model) -> None:
        """Its process is gone."""
        self._ledger.give_back(model.name)
        self._images.charge(model, 0)

    async def _released(self, model: Model, allowed_bytes: int) -> int:
        """Waits until the worker holds no more than it may; returns what it holds. Raises NotReleased, WorkerDied."""
        deadline = time.monotonic() + self._settings.release_s
        while (held := await self._held(model)) > allowed_bytes:
            if time.monotonic() > deadline:
                raise NotReleased(
                    f"{model.name}: its worker still holds {format_bytes(held)} of {self._device.name} "
                    f"{self._settings.release_s:.1f} s after its demotion; {format_bytes(allowed_bytes)} are allowed"
                )
            await asyncio.sleep(_POLL_S)
        return held

    async def _given(self, model: Model, allowed_bytes: int, free_bytes: int, hidden_bytes: int) -> int:
        """Waits until a worker that gave memory back holds no more than it may; returns what it holds. Where the device
        hides that, waits until so much is free, and takes it to hold `hidden_bytes`. Raises NotReleased, WorkerDied."""
        if await self.measure(model) is not None:
            return await self._released(model, allowed_bytes)
        deadline = time.monotonic() + self._settings.release_s
        while (free := await asyncio.to_thread(self._device.free_bytes)) < free_bytes - self._settings.slack_bytes:
            if time.monotonic() > deadline:
                raise NotReleased(f"{self._device.name}: {format_bytes(free)} are free, not {format_bytes(free_bytes)}")
            await asyncio.sleep(_POLL_S)
        return hidden_bytes

    async def _gone(self, worker: WorkerProcess) -> None:
        """Waits until a dead process holds nothing any more. Raises NotReleased."""
        deadline = time.monotonic() + self._settings.release_s
        while held := await asyncio.to_thread(self._device.process_bytes, worker.pid):
            if time.monotonic() > deadline:
                raise NotReleased(
                    f"{worker.spec.model}: {self._device.name} still shows {format_bytes(held)} for its ended "
                    f"worker (pid {worker.pid})"
                )
            await asyncio.sleep(_POLL_S)

    def _worker_spec(self, model: Model) -> WorkerSpec:
        # A new socket for every start: nothing that still talks to the old worker reaches the new one.
        path = self._folder / f"{model.number}-{model.generation}.sock"
        if len(str(path)) > _SOCKET_PATH_BYTES:
            raise ConfigError(f"{path}: too long for a unix socket ({_SOCKET_PATH_BYTES} bytes); name a shorter folder")
        return dataclasses.replace(
            model.spec.worker,
            socket_path=str(path),
            device=self._device.name,
            device_memory_bytes=self._ledger.total_bytes,
            busy_requests=model.figures.busy.value,
        )

    def _log_of(self, model: Model) -> Path:
        return log_path(self._log_folder, model.name)


def does_not_fit(model: Model, total_bytes: int) -> str:
    needs, needed = model.needs, model.certain_bytes
    parts = ""
    if needs is not None:
        rest = needed - needs.weights_bytes - needs.kv_bytes
        other = f", other {format_bytes(rest)}" if rest > 0 else ""
        parts = f" (weights {format_bytes(needs.weights_bytes)}, KV {format_bytes(needs.kv_bytes)}{other})"
    least = " at least" if model.known_from == "estimate" else ""
    return (
        f"{model.name}: needs{least} {format_bytes(needed)}{parts}, the device's budget is {format_bytes(total_bytes)} "
        "in all: raise the budget, or lower max_model_len, max_num_seqs or the KV pool"
    )


def _whom_for(model: Model) -> str:
    """Why it is brought in."""
    waiting = len(model.queue)
    if not waiting:
        return "wanted" if model.wanted else "ahead of need"
    oldest_s = model.queue.oldest_wait_s(time.monotonic())
    return f"{waiting} waiting, the oldest for {oldest_s:.1f} s"


def _alive(model: Model) -> WorkerProcess:
    if model.worker is None or model.state.process is not Process.ALIVE:
        raise WorkerDied(f"{model.name}: its worker is gone")
    return model.worker


def _stages(hello: Hello) -> dict[str, Any]:
    """Where a start went, where its worker says that."""
    return {"stages": dict(hello.stages)} if hello.stages else {}
