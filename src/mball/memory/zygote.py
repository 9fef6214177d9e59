"""The manager's side of a zygote: one process for each interpreter, which has done the slow imports and forks workers.

zygote → manager   {"event": "hello", "pid": …}           its imports are done, and it may fork
                   {"event": "failed", "error": …}        it may not; it ends after that
manager → zygote   {"id": 1, "verb": "fork", "spec": …, "environment": …,
                   "zygote_environment": …, "log": …, "manager": pid}, and the
                   worker's end of its control channel
zygote → manager   {"id": 1, "result": {"pid": …}}        its worker, which is the manager's child by now
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from mball.errors import MballError, TransitionError
from mball.memory import control
from mball.memory.child import Child
from mball.memory.settings import Settings
from mball.memory.spec import WorkerSpec
from mball.memory.worker_log import open_log

_ROOM = "." * 2048
_READ_AT_LOAD = ("LD_", "MALLOC_", "GLIBC_", "GOMP_", "KMP_", "OMP_", "PYTHON")
_SET_LATER = frozenset({"OMP_NUM_THREADS"})

_log = structlog.get_logger(__name__)


class NotForked(TransitionError):
    """The zygote can't fork this worker now; a fresh process can be started in its stead."""


class Zygote:
    """Started at once and kept alive: where it ends or hangs it is begun anew, later each time.

    `environment` is its own; what a worker's has other than it is set after the fork.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        settings: Settings,
        born: Callable[[Child], None],
        lost: Callable[[int], object],
    ) -> None:
        """`born` is told of each of its lives, `lost` the pid of a worker that nobody waits for any more."""
        self._command = [*command, "--room", _ROOM]
        self._environment = dict(environment)
        self._log = log
        self._settings = settings
        self._born = born
        self._lost = lost
        self._child: Child | None = None
        self._caller: control.Caller | None = None
        self._ready = asyncio.Event()
        self._why: str | None = None
        self._final = False
        self._forked = False
        self._warned = False
        self._task = asyncio.create_task(self._keep(), name="zygote")

    async def fork(self, spec: WorkerSpec, environment: Mapping[str, str], channel: socket.socket, log: Path) -> int:
        """The pid of a new worker, which is this process's child. Raises NotForked.

        Waits for a zygote that is still importing: a fresh start would do the same imports beside it.
        """
        ours = self._environment
        fixed = [k for k in environment if _read_at_load(k) and environment[k] != ours.get(k)]
        if fixed:
            raise NotForked(f"{', '.join(fixed)} can be set in a fresh process alone")
        caller = await self._when_ready()
        calling = asyncio.create_task(
            caller.call(
                "fork",
                deadline_s=self._settings.start_s,
                fd=channel.fileno(),
                spec=spec.to_json(),
                environment=dict(environment),
                zygote_environment=dict(ours),
                log=str(log),
                manager=os.getpid(),
            )
        )
        try:
            async with asyncio.timeout(self._settings.fork_s):
                done = await asyncio.shield(calling)
        except (MballError, TimeoutError, ValueError) as error:
            why = str(error) or f"it did not answer in {self._settings.fork_s:.0f} s"
            if not isinstance(error, ValueError):
                self._end(why)
            calling.add_done_callback(self._abandon)
            raise NotForked(why) from None
        except asyncio.CancelledError:
            calling.add_done_callback(self._abandon)
            raise
        self._forked = True
        return int(done["pid"])

    def _abandon(self, calling: asyncio.Task[control.Message]) -> None:
        if not calling.cancelled() and calling.exception() is None:
            self._lost(int(calling.result()["pid"]))

    async def _when_ready(self) -> control.Caller:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.start_s):
                await self._ready.wait()
        if self._caller is None or self._why is not None:
            raise NotForked(self._why or f"it was not ready after {self._settings.start_s:.0f} s")
        return self._caller

    def _end(self, why: str) -> None:
        self._why = why
        if self._child is not None:
            self._child.signal(signal.SIGKILL)

    async def _keep(self) -> None:
        """One life after another, until it says itself that it will never be fit."""
        backoff_s = self._settings.backoff_s
        while not self._final:
            self._forked = False
            try:
                await self._live()
            except (OSError, MballError) as error:
                self._why = str(error)
            self._why = self._why or f"it ended; {self._log} may say why"
            self._ready.set()
            _log.warning("zygote ended; workers start afresh, at the cost of their imports", reason=self._why)
            backoff_s = self._settings.backoff_s if self._forked else min(2 * backoff_s, self._settings.max_backoff_s)
            if not self._final:
                await asyncio.sleep(backoff_s)

    async def _live(self) -> None:
        ours, theirs = control.pair()
        hello: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def heard(message: control.Message) -> None:
            if message.get("event") == "failed":
                self._why, self._final = str(message.get("error")), True
            elif not hello.done():
                hello.set_result(None)

        out = await asyncio.to_thread(open_log, self._log, flags=os.O_TRUNC)
        try:
            # Spawned by this very thread: its parent-death signal comes when the spawning thread ends.
            popen = subprocess.Popen(  # noqa: ASYNC220
                [*self._command, "--control-fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=[theirs.fileno()],
                env=self._environment,
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(out)
        child = self._child = Child(popen.pid, popen.wait, sweep_s=self._settings.kill_s)
        self._born(child)
        caller = control.Caller(control.Channel(ours), heard)
        began = time.monotonic()
        ended = asyncio.ensure_future(child.exited.wait())
        try:
            either: set[asyncio.Future[Any]] = {hello, ended}
            await asyncio.wait(either, timeout=self._settings.start_s, return_when=asyncio.FIRST_COMPLETED)
            if hello.done():
                _log.info("zygote ready", pid=child.pid, start_s=round(time.monotonic() - began, 3))
                self._caller, self._why = caller, None
                self._ready.set()
                await ended
        finally:
            self._caller = None
            ended.cancel()
            hello.cancel()
            await child.end(0.0, self._settings.kill_s)
            await caller.close()

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


def _read_at_load(name: str) -> bool:
    return name.startswith(_READ_AT_LOAD) and name not in _SET_LATER
