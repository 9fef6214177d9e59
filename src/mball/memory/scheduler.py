"""Decides what moves next: who waits longest is served first, with the cheapest moves that the plan finds."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Mapping
from typing import Any

import structlog

from mball.device.device import Device
from mball.errors import (
    DeviceOutOfMemory,
    MballError,
    ModelDoesNotFit,
    ModelFailed,
    TransitionError,
    WorkerDied,
    WorkerNotStarted,
)
from mball.memory.images import Images
from mball.memory.lease import Lease
from mball.memory.ledger import Ledger
from mball.memory.model import Model
from mball.memory.planner import Demand, Move, Snapshot, next_change_s, plan
from mball.memory.process import WorkerProcess
from mball.memory.settings import Settings
from mball.memory.states import Process
from mball.memory.transition import Transitions, does_not_fit
from mball.units import format_bytes

_log = structlog.get_logger(__name__)
_HEARTBEAT_S = 5.0


class Scheduler:
    """One loop over all models of a device. It never waits for a move: moves are tasks, and `wake` tells of changes."""

    def __init__(
        self,
        models: Mapping[str, Model],
        device: Device,
        ledger: Ledger,
        images: Images,
        transitions: Transitions,
        lease: Lease,
        settings: Settings,
    ) -> None:
        self._models = models
        self._device = device
        self._ledger = ledger
        self._images = images
        self._transitions = transitions
        self._lease = lease
        self._settings = settings
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting = 0
        self._begun = False

    def wake(self) -> None:
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
        again: list[float] = []
        gates = self._send_away(now, again)
        if self._busy:
            gates |= {m.name for m in self._models.values() if m.gated_s is not None}
        kept = sum(max(0, m.needed_bytes - self._ledger.held(m.name)) for m in self._models.values() if m.arriving)
        for model in sorted(self._wanting(), key=lambda m: (-m.queue.oldest_wait_s(now), m.number)):
            if model.not_before_s > now:
                again.append(model.not_before_s - now)
                continue
            goal = self._goal(model)
            if goal is None or (goal[1] == "promote" and self._busy):
                continue
            nbytes, verb = goal
            demand = Demand(model.name, nbytes, model.queue.oldest_wait_s(now), self._settings.max_wait_s)
            snapshot = self._snapshot(kept, gates)
            moves = plan(snapshot, demand)
            if moves != [] and not len(model.queue):
                model.wanted = False  # preloading takes no other's place
            elif moves is None:
                self._refuse_if_pinned_out(model, nbytes)
                change = next_change_s(snapshot, demand)
                again += [] if change is None else [change]
                kept += max(0, nbytes - sum(c.demote_bytes + c.stop_bytes for c in snapshot.candidates if not c.pinned))
            elif any(move.kind == "drain" for move in moves):
                # The idle ones too: whoever entered one of them would have to be waited for next.
                gates |= {move.model for move in moves}
                kept += max(0, nbytes - sum(move.frees_bytes for move in moves))
            elif verb == "start" and not moves:
                self._launch(model, nbytes)
            elif not self._busy:
                kept += max(0, nbytes - sum(move.frees_bytes for move in moves))
                model.arriving = True
                self._begin(self._bring(model, nbytes, verb, moves), [model, *self._named(moves)])
        again += self._gate(gates, now)
        return min(again, default=_HEARTBEAT_S)

    @property
    def _busy(self) -> bool:
        return self._begun or self._lease.busy

    def _named(self, moves: list[Move]) -> list[Model]:
        return [self._models[move.model] for move in moves]

    def _wanting(self) -> list[Model]:
        return [
            model
            for model in self._models.values()
            if (len(model.queue) or model.wanted) and not (model.queue.is_open or model.on_device)
        ]

    def _send_away(self, now: float, again: list[float]) -> set[str]:
        """Begins to demote what is to leave for its own sake; returns whose doors have to be shut for that first."""
        gates: set[str] = set()
        for model in self._models.values():
            if not model.settled:
                continue
            reason = None
            if model.unload is not None:
                reason = "unloaded on request"
                if not model.on_device:
                    model.unload.set_result(None)
                    model.unload = None
                    continue
            elif model.on_device and model.measured_bytes > self._ledger.held(model.name):
                reason = self._relieve(model)
            elif model.on_device and model.spec.keep_alive_s is not None and not model.pinned and model.unused:
                left_s = model.queue.last_used_s + model.spec.keep_alive_s - now
                again += [left_s] if left_s > 0 else []
                reason = f"not used for {model.spec.keep_alive_s:.0f} s (keep_alive_s)" if left_s <= 0 else None
            if reason is None:
                continue
            if model.queue.in_flight:
                gates.add(model.name)
            elif not self._busy:
                model.queue.close()
                self._begin(self._demote([(model, reason)]), [model])
        return gates

    def _relieve(self, model: Model) -> str | None:
        """The model holds more than it was promised: promise it, make room for it, or else it has to leave."""
        over = model.measured_bytes - self._ledger.held(model.name)
        moves = plan(self._snapshot(0, set()), Demand(model.name, over, float("inf"), 0.0))
        why = f"{model.name} holds {format_bytes(over)} more than it was promised"
        if moves == []:
            self._ledger.promise(model.name, model.measured_bytes)
            return None
        if moves is None or any(move.kind == "drain" for move in moves):
            return f"{why}, and nothing idle can make room"
        if not self._busy:
            _log.warning("over budget", model=model.name, over_bytes=over)
            self._begin(self._demote([(victim, why) for victim in self._named(moves)]), self._named(moves))
        return None

    def _goal(self, model: Model) -> tuple[int, str] | None:
        """Bytes to be promised and the move that wants them; None where nothing is to be done now."""
        if not model.settled:
            return None
        match model.state.process:
            case Process.GONE if model.crashes_in_row >= self._settings.start_attempts:
                self._fail(model, f"{model.name}: {model.crashes_in_row} failures in a row, the last: {model.error}")
            case Process.GONE if self._starting < self._settings.max_starts:
                return model.context_bytes or self._device.context_bytes, "start"
            case Process.ALIVE if model.needed_bytes > self._ledger.total_bytes:
                self._fail(model, does_not_fit(model, self._ledger.total_bytes), fits=False)
            case Process.ALIVE:
                return model.needed_bytes - self._ledger.held(model.name), "promote"
            case Process.STOPPING:
                model.not_before_s = time.monotonic() + self._settings.cool_down_s
                self._spawn(self._transitions.stop(model, "it could not be stopped before"), f"stop {model.name}")
        return None

    def _snapshot(self, kept_bytes: int, taken: set[str]) -> Snapshot:
        movable = (
            m
            for m in self._models.values()
            if m.name not in taken and m.settled and m.unload is None and m.state.process is Process.ALIVE
        )
        return Snapshot(
            self._ledger.free_bytes - kept_bytes, tuple(m.candidate(self._ledger.held(m.name)) for m in movable)
        )

    def _launch(self, model: Model, nbytes: int) -> None:
        self._ledger.promise(model.name, nbytes)
        self._starting += 1
        model.moving = True
        self._spawn(self._start(model), f"start {model.name}")

    async def _start(self, model: Model) -> None:
        try:
            await self._transitions.start(model)
        except ModelDoesNotFit as error:
            self._fail(model, str(error), fits=False)
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

    async def _bring(self, model: Model, nbytes: int, verb: str, moves: list[Move]) -> None:
        """One transition: victims out, proof, then the model in, canary, open."""
        began, worker = time.monotonic(), model.worker
        async with self._lease.hold() as epoch:
            try:
                for move in moves:
                    victim = self._models[move.model]
                    reason = f"{format_bytes(nbytes)} for {model.name}: {move.reason}"
                    if move.kind == "stop":
                        await self._transitions.stop(victim, reason)
                    else:
                        await self._transitions.demote(victim, epoch, reason)
                if verb == "start":
                    self._launch(model, nbytes)
                    return
                await self._transitions.promote(model, epoch)
            except (DeviceOutOfMemory, WorkerDied) as error:
                # The room went elsewhere, or the worker died: the next step plans anew.
                _log.warning("not promoted", model=model.name, error=str(error))
                if worker is not None and isinstance(error, WorkerDied):
                    self._count_crash(model, worker)
                    model.error = await worker.epitaph()
                return
            except MballError as error:
                self._fail(model, f"{model.name}: could not be loaded: {error}")
                return
        model.figures.last_swap_s = time.monotonic() - began
        model.wanted = False
        if model.worker is not None and not model.worker.exited.is_set():
            model.queue.open(model.worker.spec.socket_path)
            self._images.keep(model, self._models.values(), time.monotonic())

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
        _log.warning("worker failed", model=model.name, in_a_row=model.crashes_in_row, error=model.error)

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
        _log.error("model failed", model=model.name, reason=why, cool_down_s=cool_down_s)

    def _refuse_if_pinned_out(self, model: Model, nbytes: int) -> None:
        pinned = {m.name: self._ledger.held(m.name) for m in self._models.values() if m.pinned and m is not model}
        left = self._ledger.total_bytes - sum(pinned.values()) - self._ledger.held(model.name)
        if nbytes > left:
            names = ", ".join(name for name, held in pinned.items() if held)
            lacks = f"{model.name}: needs {format_bytes(nbytes)} more, but {format_bytes(left)} are left beside pinned"
            model.queue.refuse(lambda: ModelDoesNotFit(f"{lacks} {names}: unpin one"))
            model.wanted = False

    def _gate(self, gates: set[str], now: float) -> list[float]:
        """Shuts the doors that have to be shut for a drain, and opens those that no longer have to."""
        again = []
        for model in self._models.values():
            if not model.on_device or not model.settled or model.worker is None:
                model.gated_s = None
            elif model.name in gates and (model.gated_s is None or now - model.gated_s < self._settings.drain_s):
                if model.gated_s is None:
                    model.gated_s = now
                    model.queue.close()
                    _log.info("gated", model=model.name, in_flight=model.queue.in_flight)
                again.append(model.gated_s + self._settings.drain_s - now)
            elif model.gated_s is not None:
                _log.info("gate opened", model=model.name, drained=model.queue.in_flight == 0)
                model.gated_s = None
                model.queue.open(model.worker.spec.socket_path)
        return again

    async def _demote(self, victims: list[tuple[Model, str]]) -> None:
        async with self._lease.hold() as epoch:
            for victim, reason in victims:
                await self._transitions.demote(victim, epoch, reason)

    def _begin(self, work: Coroutine[Any, Any, None], models: list[Model]) -> None:
        """A transition of these models: one at a time, decided here and now, so nobody enters a victim meanwhile."""
        self._begun = True
        for model in models:
            model.moving = True
            model.queue.close()

        def ended(_: object) -> None:
            self._begun = False
            for model in models:
                model.moving = model.arriving = False

        self._spawn(work, f"transition of {models[0].name}").add_done_callback(ended)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._wake.set()
        error = None if task.cancelled() else task.exception()
        if isinstance(error, TransitionError):
            _log.error("move failed", move=task.get_name(), error=str(error))
        elif error is not None:
            _log.error("move failed", move=task.get_name(), exc_info=error)
