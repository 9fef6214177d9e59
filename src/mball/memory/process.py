"""The process allocator: starts a worker in its own process group, watches it, and ends it for certain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from mball.errors import MballError, TransitionError, WorkerDied, WorkerNotStarted
from mball.memory import control
from mball.memory.child import Child
from mball.memory.launch import Birth, Launch, environment, fresh
from mball.memory.settings import Settings
from mball.memory.spec import WorkerSpec
from mball.memory.worker_log import log_tail, open_log

_log = structlog.get_logger(__name__)
_EXIT_S = 1.0
_UNANSWERED = 3


@dataclass(frozen=True, slots=True)
class Hello:
    """What a worker says once it listens. Bytes: its idle private memory, and what it will want on the device.

    Of its weights it could do without `layer_bytes`, streamed instead. `resident`: it is on the device already.
    `image_key` names its image by its content (None: it can't be loaded from the swap store). `stages`: where its
    start went, in seconds. `host_bytes`: of host memory for layers and KV blocks that are not on the device, where that
    is other memory.
    """

    baseline_bytes: int
    weights_bytes: int
    kv_bytes: int
    image_bytes: int
    working_bytes: int | None
    resident: bool = False
    image_key: bytes | None = None
    layer_bytes: int = 0
    host_bytes: int = 0
    stages: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Hello:
        working, key = message.get("working_bytes"), message.get("image_key")
        return cls(
            baseline_bytes=int(message["baseline_bytes"]),
            weights_bytes=int(message["weights_bytes"]),
            kv_bytes=int(message["kv_bytes"]),
            image_bytes=int(message["image_bytes"]),
            working_bytes=None if working is None else int(working),
            resident=message.get("resident") is True,
            image_key=None if key is None else bytes.fromhex(key),
            layer_bytes=int(message.get("layer_bytes", 0)),
            host_bytes=int(message.get("host_bytes", 0)),
            stages={str(name): float(seconds) for name, seconds in message.get("stages", {}).items()},
        )


class WorkerProcess:
    """One worker, from its start to its exit. Made by `start`. `doing`: `start`, or the verb that it is at; `has_swap`:
    it was given the swap store."""

    def __init__(
        self, child: Child, spec: WorkerSpec, caller_socket: socket.socket, log: Path, answer: control.Answer
    ) -> None:
        self.spec = spec
        self.pid = child.pid
        self.exited = child.exited
        self.loaded_bytes = 0
        self.crash_counted = False
        self.has_swap = False
        self._child = child
        self._log = log
        self._hello: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()
        self._on_lost: list[Callable[[], None]] = []
        self._stopping = False
        self._unanswered = 0
        self.doing: str | None = "start"
        self._caller = control.Caller(control.Channel(caller_socket), self._event, self._late, self._silent, answer)

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        spec: WorkerSpec,
        *,
        extra_environment: Mapping[str, str],
        log: Path,
        settings: Settings,
        launch: Launch = fresh,
        answer: control.Answer = control.refuse,
    ) -> tuple[WorkerProcess, Hello]:
        """`answer` is given what the worker calls itself.

        Raises WorkerNotStarted, with the last lines of its log; then its process is gone.
        """
        opening = asyncio.create_task(asyncio.to_thread(open_log, log, limit_bytes=settings.log_bytes))
        try:
            out = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            raise
        except OSError as error:
            raise WorkerNotStarted(f"{spec.model}: {error}") from None
        try:
            ours, theirs = control.pair()
        except OSError as error:
            os.close(out)
            raise WorkerNotStarted(f"{spec.model}: {error}") from None
        try:
            child = await launch(Birth(command, spec, environment(spec, extra_environment), theirs, log, out))
        except OSError as error:
            ours.close()
            raise WorkerNotStarted(f"{spec.model}: {command[0]}: {error}") from None
        except asyncio.CancelledError:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(out)
        worker = cls(child, spec, ours, log, answer)
        try:
            hello = await worker._greeting(settings.start_s)
            worker.doing = None
            return worker, hello
        except BaseException:
            # A cancelled start, too, leaves no process.
            await asyncio.shield(worker.stop(settings, politely=False))
            raise

    def on_exit(self, told: Callable[[], None]) -> None:
        """Calls `told` once the process has ended, at once where it has already."""
        self._child.on_exit(told)

    def on_lost(self, told: Callable[[], None]) -> None:
        """Calls `told` once nothing can be asked of it any more, which may be a moment before it has ended."""
        self._on_lost.append(told)

    async def call(self, verb: str, *, deadline_s: float, fd: int | None = None, **arguments: Any) -> dict[str, Any]:
        """Raises VerbFailed, WorkerDied, TransitionError past the deadline.

        One that leaves its status unanswered again and again hangs, and is killed: those inside would wait for ever.
        """
        before, self.doing = self.doing, verb if verb != "status" else self.doing
        try:
            answer = await self._caller.call(verb, deadline_s=deadline_s, fd=fd, **arguments)
            self._unanswered = 0
            return answer
        except TimeoutError:
            self._unanswered += verb == "status"
            if self._unanswered >= _UNANSWERED:
                _log.warning("worker killed: it hangs", model=self.spec.model, pid=self.pid)
                self.kill()
            raise TransitionError(f"{self.spec.model}: no answer to {verb} within {deadline_s:.1f} s") from None
        except control.ChannelClosed:
            # Its exit is about to be seen: whoever watches for it learns of it before the caller does.
            await self.wait(_EXIT_S)
            raise WorkerDied(f"{self.spec.model}: the worker (pid {self.pid}) ended during {verb}") from None
        finally:
            self.doing = before

    async def stop(self, settings: Settings, *, politely: bool = True) -> None:
        """Stop verb, then TERM, then KILL, to the whole group. Raises TransitionError where even that did not help."""
        self._stopping = True
        if politely and not self.exited.is_set():
            since = time.monotonic()
            with contextlib.suppress(MballError):
                await self.call("stop", deadline_s=settings.verb_s)
            await self.wait(settings.verb_s - (time.monotonic() - since))
        if not await self._child.end(settings.term_s, settings.kill_s):
            raise TransitionError(f"{self.spec.model}: worker {self.pid} could not be killed")
        await self._caller.close()

    async def wait(self, deadline_s: float) -> bool:
        """Whether it has ended by the deadline."""
        return await self._child.wait(deadline_s)

    def kill(self) -> None:
        """At once, without waiting."""
        self._child.signal(signal.SIGKILL)

    async def epitaph(self) -> str:
        """How it ended, with the end of its log, for an error's text."""
        lines = await asyncio.to_thread(log_tail, self._log)
        return f"its worker (pid {self.pid}) ended with code {self.exit_code}; the end of {self._log}:\n{lines}"

    @property
    def exit_code(self) -> int | None:
        return self._child.exit_code

    async def _greeting(self, deadline_s: float) -> Hello:
        ended = asyncio.ensure_future(self.exited.wait())
        either: set[asyncio.Future[Any]] = {self._hello, ended}
        try:
            await asyncio.wait(either, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if self._hello.done():
            return self._hello.result()
        self._hello.cancel()
        if not self.exited.is_set():
            raise WorkerNotStarted(f"{self.spec.model}: its worker gave no hello in {deadline_s:.0f} s")
        raise WorkerNotStarted(f"{self.spec.model}: {await self.epitaph()}")

    def _event(self, message: Mapping[str, Any]) -> None:
        match message.get("event"):
            case "hello" if not self._hello.done():
                try:
                    self._hello.set_result(Hello.of(message))
                except (KeyError, TypeError, ValueError) as error:
                    self._hello.set_exception(WorkerNotStarted(f"{self.spec.model}: a hello without {error}"))
            case "failed" if not self._hello.done():
                text = f"{self.spec.model}: {message.get('error')}"
                self._hello.set_exception(WorkerNotStarted(text, final=True))
            case "progress":
                self.loaded_bytes = int(message.get("loaded_bytes", 0))

    def _late(self, asked: Mapping[str, Any]) -> None:
        """It has done under an old epoch what nobody waits for any more: what it holds is not what is promised."""
        if not self._stopping:
            _log.warning("worker killed: it answered late", model=self.spec.model, pid=self.pid, **asked)
            self.kill()

    def _silent(self) -> None:
        """The kernel closes the channel before the connections of those inside: who comes now is not to go there."""
        for told in self._on_lost:
            told()
        if not self._stopping:
            self.kill()


def _close_opened(opening: asyncio.Task[int]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())
