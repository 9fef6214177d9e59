"""A log's lines as they are written."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from mball.device import inotify

_BACK_BYTES = 8192
_READ_BYTES = 64 * 1024
"""At once, and the longest line: one that is longer comes in pieces."""


async def follow(path: Path, until: asyncio.Event) -> AsyncIterator[str]:
    """The last lines of a log that may not be there yet, and all that come after them, also where another takes its
    place. Ends once `until` is set. Raises OSError where its folder can't be watched."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    fd = inotify.watch([path.parent], unfinished=True)

    def touched() -> None:
        inotify.drain(fd)
        changed.set()

    loop.add_reader(fd, touched)
    reader = _Reader(path)
    ending = asyncio.ensure_future(until.wait())
    try:
        while not until.is_set():
            changed.clear()
            lines = await asyncio.to_thread(reader.read)
            for line in lines:
                yield line
            if not lines:
                waiting = asyncio.ensure_future(changed.wait())
                await asyncio.wait({waiting, ending}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
    finally:
        ending.cancel()
        loop.remove_reader(fd)
        os.close(fd)
        reader.close()


class _Reader:
    """Blocks for a moment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._begun = False
        self._rest = b""

    def read(self) -> list[str]:
        """What has come since; nothing where nothing has."""
        data = self._next()
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) >= _READ_BYTES:
            lines, self._rest = [*lines, self._rest], b""
        return [line.decode(errors="replace") for line in lines]

    def _next(self) -> bytes:
        if self._file is None:
            self._open()
        if self._file is None:
            return b""
        if data := self._file.read(_READ_BYTES):
            return data
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino:
                self.close()
                self._open()
                return b"" if self._file is None else self._file.read(_READ_BYTES)
        return b""

    def _open(self) -> None:
        with contextlib.suppress(OSError):
            self._file = self._path.open("rb")
            if not self._begun and self._file.seek(0, os.SEEK_END) > _BACK_BYTES:
                self._file.seek(-_BACK_BYTES, os.SEEK_END)
                self._file.readline()
            elif not self._begun:
                self._file.seek(0)
        self._begun = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
