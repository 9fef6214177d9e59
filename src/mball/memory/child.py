"""A child process, from its birth until it and its group are gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable

_SWEEP_POLL_S = 0.01


class Child:
    """Leads a process group of its own. Watched by pidfd, so neither a signal handler nor a poll is needed.

    `reap` waits for the process, which has ended, and gives its exit code.
    """

    def __init__(self, pid: int, reap: Callable[[], int], *, sweep_s: float) -> None:
        self.pid = pid
        self.exited = asyncio.Event()
        self.exit_code: int | None = None
        self._reap = reap
        self._sweep_s = sweep_s
        self._sweeping: asyncio.Task[None] | None = None
        self._on_exit: list[Callable[[], None]] = []
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._has_exited)

    @classmethod
    def adopted(cls, pid: int, *, sweep_s: float) -> Child:
        """One that another process forked and that is this one's child now."""
        return cls(pid, lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), sweep_s=sweep_s)

    def on_exit(self, told: Callable[[], None]) -> None:
        """Calls `told` once the process has ended, at once where it has already."""
        if self.exited.is_set():
            told()
        else:
            self._on_exit.append(told)

    async def wait(self, deadline_s: float) -> bool:
        """Whether it has ended by the deadline."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline_s)):
                await self.exited.wait()
        return self.exited.is_set()

    def signal(self, number: int) -> None:
        """To the whole group, where it has not ended."""
        if not self.exited.is_set():
            self._signal(number)

    async def end(self, term_s: float, kill_s: float) -> bool:
        """TERM, then KILL, to the group. Whether it has ended."""
        for number, deadline_s in ((signal.SIGTERM, term_s), (signal.SIGKILL, kill_s)):
            self.signal(number)
            if await self.wait(deadline_s):
                break
        await self.swept()
        return self.exited.is_set()

    async def swept(self) -> None:
        """Until nothing of its group is left to be waited for, or that has taken too long."""
        if self._sweeping is not None:
            await asyncio.wait({self._sweeping})

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _has_exited(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # While the leader is unreaped its group's number can't be another's: now is the time to end what it left.
        self._signal(signal.SIGKILL)
        self.exit_code = self._reap()
        self.exited.set()
        self._sweeping = loop.create_task(self._sweep(), name=f"sweep after {self.pid}")
        for told in self._on_exit:
            told()

    async def _sweep(self) -> None:
        """Waits for what it had forked, which a subreaper has inherited."""
        deadline = time.monotonic() + self._sweep_s
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < deadline:
                pid, _ = os.waitpid(-self.pid, os.WNOHANG)  # noqa: ASYNC222 - it does not block
                if not pid:
                    await asyncio.sleep(_SWEEP_POLL_S)
