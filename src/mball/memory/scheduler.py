"""Carries out what the policy decides, one transition at a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from mball.errors import (
    DeviceError,
    DeviceOutOfMemory,
    MballError,
    ModelDoesNotFit,
    ModelFailed,
    TransitionError,
    Unavailable,
    VerbFailed,
    WorkerDied,
    WorkerNotStarted,
)
from mball.memory.allowance import Allowance
from mball.memory.estimate import estimate, streamed
from mball.memory.events import Events
from mball.memory.images import Images
from mball.memory.look import Bring, Look, Standing
from mball.memory.model import Model
from mball.memory.planner import SERVES_ON, Move
from mball.memory.policy import decide
from mball.memory.process import WorkerProcess
from mball.memory.settings import Settings
from mball.memory.states import Process
from mball.memory.transition import does_not_fit
from mball.units import format_bytes

if TYPE_CHECKING:
    from mball.memory.devices import Devices
    from mball.memory.slot import Slot

_log = structlog.get_logger(__name__)
_HEARTBEAT_S = 5.0
_RETIRED = "it is configured no longer"


class Scheduler:
    """One loop over all models of a device. It never waits for a move: moves are tasks, and `wake` tells of changes."""

    def __init__(self, slot: Slot, devices: Devices, images: Images, settings: Settings, events: Events) -> None:
        self._slot = slot
        self._devices = devices
        self._models = slot.models
        self._ledger = slot.ledger
        self._transitions = slot.transitions
        self._lease = slot.lease
        self._images = images
        self._settings = settings
        self._events = events
        self._allowance = Allowance(settings.swap_time_share, settings.swap_saved_s, time.monotonic())
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting = 0
        self._begun = False
        self._undone = True
        self._filling: set[str] = set()
        self._unfilled: set[str] = set()

    @property
    def filling(self) -> bool:
        """Whether an image is being filled."""
        return bool(self._filling)

    def wake(self) -> None:
        self._wake.set()

    def passed(self) -> None:
        """A request went in by an open door, or out: of use only to those that wait for a device, or to leave it."""
        if self._undone:
            self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._wake.clear()
            wait_s = self._step(time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(wait_s, _HEARTBEAT_S)):
                    await self._wake.wait()

    async def close(self) -> None:
        """Cancels the moves under way (`run` is cancelled already); what they leave is the caller's to stop."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _step(self, now: float) -> float:
        """Begins what can begin now. Returns in how many seconds to look again if nothing changes before."""
        for model in self._models.values():
            self._images.swap.look(model)
        gather_s = self._devices.gather(now)
        wanting = [m for m in self._models.values() if len(m.queue) or m.wanted]
        for model in wanting:
            if self._slot.lost is not None and model.settled and not model.on_device:
                why = f"{model.name}: its device does not answer: {self._slot.lost}"
                self._refuse(model, ModelFailed, why, self._settings.cool_down_s)
            elif model.settled and not model.on_device and model.not_before_s <= now:
                self._give_up_if_hopeless(model)
        for model in self._models.values():
            if model.retired and model.unused and model.settled and model.leaves_at_s <= now:
                self._leave(model, partial(self._dismiss, model))
        decision = decide(self._look(now), self._settings)
        for name in decision.gone:
            self._went(self._models[name])
        for name in decision.grow:
            self._ledger.promise(name, self._models[name].measured_bytes)
        for name in decision.forget:
            self._models[name].wanted = False
        for name in decision.crowded:
            self._refuse_if_it_never_fits(self._models[name])
        for start in decision.starts:
            self._launch(self._models[start.model], start.nbytes)
        for fill in decision.fills:
            self._fill(self._models[fill.model], now, decided=True)
        if decision.send:
            leaving = [self._models[move.model] for move in decision.send if move.kind not in SERVES_ON]
            self._begin(self._send(decision.send), leaving)
        if decision.bring is not None:
            model = self._models[decision.bring.model]
            model.arriving = True
            leaving = [self._models[move.model] for move in decision.bring.moves if move.kind not in SERVES_ON]
            self._begin(self._bring(model, decision.bring), [model, *leaving])
        self._gate(decision.gates, now)
        self._undone = any(map(_undone, self._models.values()))
        return min(decision.again_s, gather_s)

    def _look(self, now: float) -> Look:
        return Look(
            self._ledger.free_bytes,
            [self._standing(model, now) for model in self._models.values()],
            busy=self._begun or self._lease.busy,
            starting=self._starting,
            dram_free_bytes=self._images.ledger.free_bytes,
            excess_bytes=self._ledger.excess_bytes,
            elsewhere=self._devices.elsewhere(self._slot),
            reading=self._devices.reading(self._slot),
            saved_s=self._allowance.at(now),
        )

    def _standing(self, model: Model, now: float) -> Standing:
        held, hello, keep_alive_s = self._ledger.held(model.name), model.hello, model.spec.keep_alive_s
        context_bytes = model.starting_bytes + (0 if model.context_bytes else self._slot.device.context_bytes)
        fills = model.image is None and hello is not None and model.name not in self._unfilled
        # An image of memory that is not there would be one of nothing, unless the swap store has it.
        fills = fills and (model.on_device or model.stored or not model.spec.worker.starts_awake)
        return Standing(
            model.candidate(held),
            model.number,
            model.state.process,
            on_device=model.on_device,
            settled=model.settled,
            arriving=model.arriving,
            is_open=model.queue.is_open,
            queued=len(model.queue),
            wanted=model.wanted,
            held_bytes=held,
            needed_bytes=model.needed_bytes,
            context_bytes=context_bytes,
            over_bytes=max(0, model.measured_bytes - held) if model.on_device else 0,
            ready_in_s=max(0.0, model.not_before_s - now),
            idle_left_s=None if keep_alive_s is None else model.queue.last_used_s + keep_alive_s - now,
            unload=model.unload is not None,
            gated_s=None if model.gated_s is None else now - model.gated_s,
            image_wanted_bytes=hello.image_bytes if hello is not None and fills else 0,
            filling=model.name in self._filling,
            stored=model.stored,
        )

    def _give_up_if_hopeless(self, model: Model) -> None:
        """What no plan here can help: too many failures, too large, better off elsewhere, or a worker that can't be
        stopped."""
        match model.state.process:
            case Process.GONE if model.crashes_in_row >= self._settings.start_attempts:
                self._fail(model, f"{model.name}: {model.crashes_in_row} failures in a row, the last: {model.error}")
            case Process.GONE if model.certain_bytes > (most := self._devices.most_bytes(model)):
                self._fail(model, does_not_fit(model, most), fits=False)
            case Process.ALIVE if model.needed_bytes > self._ledger.total_bytes:
                if model.needed_bytes > (most := self._devices.most_bytes(model)):
                    self._fail(model, does_not_fit(model, most), fits=False)
                else:
                    self._move_out(model, "it is too large for this device, and another has room")
            case Process.ALIVE if (better := self._devices.better(model)) is not None:
                self._move_out(model, f"a start on {better.name} serves it sooner")
            case Process.STOPPING:
                model.not_before_s = time.monotonic() + self._settings.cool_down_s
                self._spawn(self._transitions.stop(model, "it could not be stopped before"), f"stop {model.name}")

    def _leave(self, model: Model, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Its worker ends."""
        if not self._begun and not self._lease.busy and model.name not in self._filling:
            self._begin(work(), [model])

    def _move_out(self, model: Model, why: str) -> None:
        """So that it can be placed anew."""
        self._leave(model, partial(self._transitions.stop, model, why))

    async def _dismiss(self, model: Model) -> None:
        # One that could not be ended is tried again, not at once.
        model.leaves_at_s = time.monotonic() + self._settings.backoff_s
        await self._transitions.stop(model, _RETIRED)
        await self._images.drop(model, _RETIRED)
        self._went(model)
        if model.farewell is not None:
            model.farewell(model)

    def _went(self, model: Model) -> None:
        if model.unload is not None:
            model.unload.set_result(None)
            model.unload = None

    def _fill(self, model: Model, now: float, *, decided: bool) -> None:
        """Others go on switching meanwhile. Where a decided one comes to nothing, the next promotion is from the
        source."""
        task = None if model.name in self._filling else self._images.keep(model, self._devices.models, now)
        if task is not None:
            self._filling.add(model.name)
            task.add_done_callback(lambda _: self._filled(model, decided))

    def _filled(self, model: Model, decided: bool) -> None:
        self._filling.discard(model.name)
        if decided and (model.image is None or not model.image.ready):
            self._unfilled.add(model.name)
        self._wake.set()

    def _launch(self, model: Model, nbytes: int) -> None:
        self._ledger.promise(model.name, self._ledger.held(model.name) + nbytes)
        self._starting += 1
        model.moving = True
        self._spawn(self._start(model), f"start {model.name}")

    async def _start(self, model: Model) -> None:
        try:
            await self._transitions.start(model)
            if model.on_device:
                self._arrived(model)
        except ModelDoesNotFit:
            # On a larger device it may fit: the next step places it anew.
            if model.certain_bytes > (most := self._devices.most_bytes(model)):
                why = does_not_fit(model, most)
                if not await self._streams(model, most, why):
                    self._fail(model, why, fits=False)
        except WorkerNotStarted as error:
            model.error = str(error)
            if error.final:
                self._fail(model, str(error))
            else:
                self._count_crash(model, None)
        except MballError as error:
            model.error = str(error)
            self._count_crash(model, None)
        finally:
            self._starting -= 1
            model.moving = False

    async def _streams(self, model: Model, most_bytes: int, why: str) -> bool:
        """From its next start on a part of it is streamed, if it fits so and not otherwise."""
        spec = replace(model.spec.worker, device=self._slot.device.name, device_memory_bytes=None)
        if (better := await asyncio.to_thread(streamed, spec, most_bytes)) is None:
            return False
        found = await asyncio.to_thread(estimate, replace(better, device_memory_bytes=most_bytes))
        model.stream(better)
        model.estimate = found
        self._events.record("streams", model.name, why, level="warning")
        return True

    async def _comes_colder(self, model: Model, room_bytes: int, refuse: Callable[[], None], why: str) -> None:
        try:
            if not await self._streams(model, room_bytes, why):
                refuse()
        finally:
            model.moving = False

    async def _bring(self, model: Model, bring: Bring) -> None:
        """One transition: victims out, proof, then the model in, canary, open."""
        began, worker = time.monotonic(), model.worker
        async with self._lease.hold() as epoch:
            try:
                for move in bring.moves:
                    await self._execute(move, epoch, f"{format_bytes(bring.nbytes)} for {model.name}: {move.reason}")
            except MballError as error:
                # A victim's failure is not this model's: the next step plans anew, without it or with what it left.
                model.not_before_s = time.monotonic() + self._settings.backoff_s
                _log.warning("no room made", model=model.name, error=str(error))
                return
            if bring.verb == "start":
                self._launch(model, bring.nbytes)
                return
            try:
                await self._transitions.promote(model, epoch)
            except DeviceOutOfMemory as error:
                # The room went elsewhere: the next step plans anew.
                _log.warning("not promoted", model=model.name, error=str(error))
                return
            except VerbFailed as error:
                self._fail(model, f"{model.name}: could not be loaded: {error}")
                return
            except MballError as error:
                # It died, hung or gave no token: another worker may do better, a few times.
                _log.warning("not promoted", model=model.name, error=str(error))
                model.error = str(error)
                self._count_crash(model, worker)
                if worker is not None and isinstance(error, WorkerDied):
                    model.error = await worker.epitaph()
                return
        now = time.monotonic()
        swap_s = model.figures.last_swap_s = now - began
        self._allowance.spend(swap_s * model.needed_bytes / self._ledger.total_bytes, now)
        self._arrived(model)

    def _arrived(self, model: Model) -> None:
        """It is on the device: whoever waits for it may enter."""
        model.wanted = False
        self._unfilled.discard(model.name)
        if model.worker is not None and not model.worker.exited.is_set():
            model.queue.open(model.worker.spec.socket_path)
            self._fill(model, time.monotonic(), decided=False)

    async def _execute(self, move: Move, epoch: int, reason: str) -> None:
        victim = self._models[move.model]
        match move.kind:
            case "balloon":
                await self._transitions.balloon(victim, move.frees_bytes, epoch, reason)
            case "layers":
                await self._transitions.balloon(victim, move.frees_bytes, epoch, reason, gently=False)
            case "stop":
                await self._transitions.stop(victim, reason)
            case "drop":
                await self._images.drop(victim, reason)
            case _:
                await self._transitions.demote(victim, epoch, reason)

    def worker_exited(self, model: Model, worker: WorkerProcess) -> None:
        """The process has ended: those inside are told at once; its bytes are given back once proven free."""
        if model.worker is not worker or model.state.process is Process.STOPPING:
            return
        model.queue.lose()
        self._count_crash(model, worker)
        self._spawn(self._after_exit(model, worker), f"after the exit of {model.name}")

    async def _after_exit(self, model: Model, worker: WorkerProcess) -> None:
        model.error = await worker.epitaph()
        async with model.lock:
            if model.worker is worker:
                await self._transitions.bury(model)

    def _count_crash(self, model: Model, worker: WorkerProcess | None) -> None:
        """The next start waits, longer each time."""
        if worker is not None:
            if worker.crash_counted:
                return
            worker.crash_counted = True
        model.counters.crashes += 1
        model.crashes_in_row += 1
        backoff_s = self._settings.backoff_s * 2 ** (model.crashes_in_row - 1)
        model.not_before_s = time.monotonic() + backoff_s
        why = f"{model.crashes_in_row} in a row; not started again for {backoff_s:.2f} s: {model.error or 'it ended'}"
        self._events.record("worker failed", model.name, why, level="warning", in_a_row=model.crashes_in_row)

    def _fail(self, model: Model, why: str, *, fits: bool = True) -> None:
        """Its waiters get the reason, and so does whoever comes before the cool-down is over."""
        model.error = why
        model.wanted = False
        cool_down_s = self._settings.cool_down_s
        model.not_before_s = time.monotonic() + cool_down_s if fits else float("inf")

        def failure() -> MballError:
            if not fits:
                return ModelDoesNotFit(why)
            return ModelFailed(why, retry_after_s=max(1.0, model.not_before_s - time.monotonic()))

        model.failure = failure
        if model.state.process is Process.GONE:
            model.state = model.state.to(Process.FAILED)
        model.queue.refuse(failure)
        self._events.record("failed", model.name, why, level="error", cool_down_s=cool_down_s)

    def _refuse_if_it_never_fits(self, model: Model) -> None:
        """Whatever is moved: what is pinned stays, and so does what others hold."""
        alive = model.state.process is Process.ALIVE
        unknown_bytes = 0 if model.context_bytes else self._slot.device.context_bytes
        wanted = model.needed_bytes if alive else model.starting_bytes + unknown_bytes
        nbytes = wanted - self._ledger.held(model.name)
        pinned = {m.name: self._ledger.held(m.name) for m in self._models.values() if m.pinned and m is not model}
        left = self._ledger.limit_bytes - sum(pinned.values()) - self._ledger.held(model.name)
        if nbytes <= left or self._comes_with_less(model, nbytes - left):
            return
        names = [name for name, held in pinned.items() if held]
        beside, ways = ([f"pinned {', '.join(names)}"], ["unpin one"]) if names else ([], [])
        if foreign_bytes := self._ledger.total_bytes - self._ledger.limit_bytes:
            beside.append(f"{format_bytes(foreign_bytes)} that other processes hold")
            ways.append("end those")
        lacks = f"{model.name}: needs {format_bytes(nbytes)} more, but {format_bytes(max(0, left))} are left beside"
        retry_after_s = self._settings.cool_down_s if foreign_bytes else None
        why = f"{lacks} {' and '.join(beside)}: {' or '.join(ways)}"
        refuse = partial(self._refuse, model, ModelDoesNotFit, why, retry_after_s)
        # What others hold may go again, and layers that are cold stay so.
        room_bytes = left + foreign_bytes
        worker = model.spec.worker
        stays = alive or worker.streamed or not worker.starts_awake
        if stays or nbytes <= room_bytes or self._devices.roomier(model, self._slot):
            refuse()
            return
        model.moving = True
        self._spawn(self._comes_colder(model, room_bytes, refuse, why), f"layers of {model.name}")

    def _comes_with_less(self, model: Model, lacking_bytes: int) -> bool:
        """Whether one whose layers may be streamed can do without so much; then it comes so."""
        hello, tight_bytes = model.hello, model.arrives_without_bytes + lacking_bytes
        if model.state.process is not Process.ALIVE or hello is None or tight_bytes > hello.layer_bytes:
            return False
        model.tight_bytes = tight_bytes
        why = f"{format_bytes(lacking_bytes)} less than it would take: those that never leave have the room"
        self._events.record("streams more", model.name, why)
        self.wake()
        return True

    def _refuse(self, model: Model, kind: type[Unavailable], why: str, retry_after_s: float | None) -> None:
        """Those that wait now: it may come another time."""
        model.queue.refuse(lambda: kind(why, retry_after_s=retry_after_s))
        model.wanted = False

    def _gate(self, gates: set[str], now: float) -> None:
        """Shuts the doors that have to be shut for a drain, and opens those that no longer have to."""
        for model in self._models.values():
            if not model.on_device or model.worker is None:
                model.gated_s = None
            elif not model.settled:
                continue
            elif model.name in gates and (model.gated_s is None or now - model.gated_s < self._settings.drain_s):
                if model.gated_s is None:
                    model.gated_s = now
                    model.queue.close()
                    self._events.record("gated", model.name, "it is to leave", in_flight=model.queue.in_flight)
            elif model.gated_s is not None:
                self._events.record("gate opened", model.name, "it may stay", in_flight=model.queue.in_flight)
                model.gated_s = None
                model.queue.open(model.worker.spec.socket_path)

    async def _send(self, moves: list[Move]) -> None:
        async with self._lease.hold() as epoch:
            for move in moves:
                await self._execute(move, epoch, move.reason)

    def _begin(self, work: Coroutine[Any, Any, None], models: list[Model]) -> None:
        """A transition of these models: one at a time, decided here and now, so nobody enters a victim meanwhile."""
        self._begun = True
        open_ones = [(model, model.worker) for model in models if model.queue.is_open]
        for model in models:
            model.moving = True
            model.queue.close()

        def ended(_: object) -> None:
            self._begun = False
            for model in models:
                model.moving = model.arriving = False
            for model, worker in open_ones:
                # It was to leave, and stayed: the transition came to nothing before its turn.
                if model.on_device and worker is not None and model.worker is worker and not worker.exited.is_set():
                    model.queue.open(worker.spec.socket_path)

        names = ", ".join(model.name for model in models) or "balloons"
        self._spawn(work, f"transition of {names}").add_done_callback(ended)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._wake.set()
        error = None if task.cancelled() else task.exception()
        if isinstance(error, (TransitionError, DeviceError)):
            _log.error("move failed", move=task.get_name(), error=str(error))
        elif error is not None:
            _log.error("move failed", move=task.get_name(), exc_info=error)


def _undone(model: Model) -> bool:
    """Whether something about it can become possible as requests end."""
    leaves = model.gated_s is not None or model.unload is not None or model.retired
    return leaves or ((len(model.queue) > 0 or model.wanted) and not model.queue.is_open)
