"""A script that forks a process of its own for each line that it reads, and says its id and then its exit code: so that
many can be killed without each having to import everything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from mball.device import prctl


def forked(lines: Iterator[str]) -> Iterator[str]:
    """In the script: each line is given out in a process of its own, which ends with the script."""
    for line in lines:
        if (pid := os.fork()) == 0:
            prctl.die_with_parent()
            os.dup2(2, 1)
            yield line
            os._exit(0)
        os.write(1, f"{pid}\n".encode())
        os.write(1, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())


class Forks:
    """The script, from the test's side."""

    def __init__(self, script: asyncio.subprocess.Process) -> None:
        if script.stdin is None or script.stdout is None:
            raise ValueError("it is spoken to by pipes")
        self._told = script.stdin
        self._says = script.stdout

    async def begin(self, line: str) -> int:
        """The process id."""
        self._told.write(line.encode() + b"\n")
        return int(await self._says.readline())

    async def code(self) -> int:
        """The exit code of the one that was begun, once it has ended."""
        return int(await self._says.readline())

    async def stop(self, pid: int) -> None:
        """As an operator does. Raises ValueError where it did not end well."""
        os.kill(pid, signal.SIGTERM)
        if (code := await self.code()) not in (0, -signal.SIGTERM):
            raise ValueError(f"it ended with {code}")

    async def kill(self, pid: int) -> None:
        """Raises ValueError where it had ended before."""
        os.kill(pid, signal.SIGKILL)
        if (code := await self.code()) != -signal.SIGKILL:
            raise ValueError(f"it ended with {code} before it was killed")


@contextlib.asynccontextmanager
async def forking(
    module: str, *arguments: object, log: Path, descriptors: tuple[int, ...] = ()
) -> AsyncIterator[Forks]:
    """The script, and all that it began, end with the block."""
    with log.open("wb") as file:
        script = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *map(str, arguments)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=file,
            pass_fds=descriptors,
        )
    try:
        yield Forks(script)
    finally:
        script.kill()
        await script.communicate()
