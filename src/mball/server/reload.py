"""A new configuration while requests are served: on SIGHUP, and when its file changes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from mball.device import inotify
from mball.errors import ConfigError, MballError
from mball.memory.manager import Manager
from mball.memory.spec import ModelSpec
from mball.server import tls
from mball.server.config import Config
from mball.server.gateway.live import Live

_log = structlog.get_logger(__name__)

LIVE = frozenset(
    {
        "models",
        "api_keys",
        "max_body_bytes",
        "max_queue",
        "queue_timeout_s",
        "request_timeout_s",
        "sse_keepalive_s",
        "log_requests",
        "reload_on_change",
    }
)
"""Settings that change while it serves; the others take a restart."""


class Reloader:
    """Takes a new configuration whole, or not at all.

    `read` gives it as it is now, `specs` the models of one; `told` is called with True before, and with False after.
    `context` gives what HTTPS is served with, whose certificate is read anew each time (None: it is HTTP).
    """

    def __init__(
        self,
        file: Path,
        read: Callable[[], Config],
        specs: Callable[[Config], list[ModelSpec]],
        live: Live,
        manager: Manager,
        told: Callable[[bool], None] = lambda _: None,
        context: Callable[[], ssl.SSLContext | None] = lambda: None,
    ) -> None:
        self._file = file
        self._read = read
        self._specs = specs
        self._live = live
        self._manager = manager
        self._told = told
        self._context = context
        self._asked = asyncio.Event()
        self._touched = asyncio.Event()
        self._digest: bytes | None = None

    def ask(self) -> None:
        """For one, whether or not the file has changed."""
        self._asked.set()
        self._touched.set()

    async def run(self) -> None:
        """Until cancelled."""
        self._digest = await asyncio.to_thread(self._file_digest)
        with self._watching():
            while True:
                await self._touched.wait()
                self._touched.clear()
                asked = self._asked.is_set()
                self._asked.clear()
                digest = await asyncio.to_thread(self._file_digest)
                changed, self._digest = digest != self._digest, digest
                if asked or (changed and self._live.config.reload_on_change):
                    await self.reload()

    async def reload(self) -> None:
        """What is wrong with the new one stands in the log, in one line."""
        self._told(True)
        try:
            await self._reload()
        except (MballError, OSError, ValueError, TypeError, RuntimeError) as error:
            _log.error("configuration refused: the one before stays in force", reason=str(error))
        finally:
            self._told(False)

    async def _reload(self) -> None:
        wanted = await asyncio.to_thread(self._read)
        if not wanted.models:
            raise ConfigError(f"{self._file}: no model to serve")
        before = self._live.config
        changed = {name for name in Config.model_fields if getattr(wanted, name) != getattr(before, name)}
        if before.tls is not None and wanted.tls is not None:
            changed.discard("tls")
        fixed = {name: getattr(before, name) for name in changed - LIVE}
        config = wanted.model_copy(update=fixed)
        changes = await self._manager.prepare(await asyncio.to_thread(self._specs, config))
        await asyncio.to_thread(tls.options, config.tls)
        if config.tls is not None and (context := self._context()) is not None:
            tls.renew(context, config.tls)
        # Nothing waits between these two: a request sees all of the one, or all of the other.
        self._live.apply(config)
        self._manager.change(changes, max_queue=config.max_queue)
        if fixed:
            _log.warning("some settings wait for a restart", settings=sorted(fixed))
        _log.info("configuration reloaded", models=str(changes), keys=len(config.api_keys))

    def _file_digest(self) -> bytes | None:
        """None where it can't be read."""
        try:
            return hashlib.sha256(self._file.read_bytes()).digest()
        except OSError:
            return None

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        loop, fd = asyncio.get_running_loop(), -1
        try:
            fd = inotify.watch({self._file.absolute().parent, self._file.resolve().parent})
        except OSError as error:
            _log.warning("the configuration is not watched: SIGHUP reloads it", reason=str(error))
            yield
            return

        def touched() -> None:
            inotify.drain(fd)
            self._touched.set()

        loop.add_reader(fd, touched)
        try:
            yield
        finally:
            loop.remove_reader(fd)
            os.close(fd)
