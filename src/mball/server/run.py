"""Runs the gateway: its socket, its signals, and a server as a context for the batch CLI, the demo and tests."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2 as httpx
import structlog
import uvicorn

from mball.errors import ConfigError, MballError
from mball.memory.manager import Manager
from mball.server.catalog import build_manager, model_specs
from mball.server.config import Config, load_config
from mball.server.gateway.app import create_app
from mball.server.gateway.live import Live
from mball.server.gateway.protocol import Protocol
from mball.server.notify import Notifier
from mball.server.reload import Reloader
from mball.server.tls import options

_log = structlog.get_logger(__name__)
_READY_TIMEOUT_S = 120.0
_STOP_MARGIN_S = 30.0
_GARBAGE = 10_000
"""So many objects more than before, and cycles are looked for. Those of requests under way come and go by themselves,
and are thousands where hundreds are answered."""


class _Server(uvicorn.Server):
    """On the first signal the waiting requests get their 503 and those under way go on; on the second all ends."""

    def __init__(self, config: uvicorn.Config, manager: Manager, notifier: Notifier, reloader: Reloader | None) -> None:
        super().__init__(config)
        self._manager = manager
        self._notifier = notifier
        self._reloader = reloader
        self._on_terminal = _on_terminal()
        self._tasks: list[asyncio.Task[None]] = []

    async def main_loop(self) -> None:
        self._tasks.append(asyncio.create_task(self._notifier.stay_alive(), name="watchdog"))
        if self._reloader is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hung_up)
            self._tasks.append(asyncio.create_task(self._reloader.run(), name="reload"))
        _spare_the_collector()
        self._notifier.ready()
        await super().main_loop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                _log.error("a task of the server failed", exc_info=result)

    def _hung_up(self) -> None:
        """A terminal that closes says it, too: then nobody is left who could end the server."""
        if self._on_terminal and not _on_terminal():
            self.handle_exit(signal.SIGTERM, None)
        elif self._reloader is not None:
            self._reloader.ask()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._notifier.stopping()
        self._manager.begin_drain()
        super().handle_exit(sig, frame)


def _spare_the_collector() -> None:
    """What was loaded stays, and is gone through no more: that takes tens of milliseconds, which requests wait."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where the address can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise ConfigError(f"{host}:{port}: {error.strerror or error}; name another address or `--port`") from None
    return sock


def _on_terminal() -> bool:
    return os.isatty(sys.stderr.fileno())


def serve(
    config: Config,
    sock: socket.socket,
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    build: Callable[[Config, Path], Manager] = build_manager,
) -> None:
    """Serves until SIGTERM or SIGINT, with the manager that `build` makes. Blocks; owns `sock`. Raises DeviceInUse,
    MballError.

    The configuration is read anew from `file`, and under `flags`, as that changes and on SIGHUP.
    """
    notifier, live = Notifier(), Live(config)
    admin = None if config.admin is None else bind(config.admin.host, config.admin.port)
    sockets = [sock] if admin is None else [sock, admin]
    if file is not None:
        # Until it can be heeded: the default would end the process.
        signal.signal(signal.SIGHUP, lambda *_: None)
    with _runtime_dir(config) as runtime_dir:
        tls = options(config.tls)
        manager = build(config, runtime_dir)
        manager.claim()
        settings = uvicorn.Config(
            create_app(manager, config, live, admin_port=None if admin is None else admin.getsockname()[1]),
            log_config=None,
            access_log=False,
            proxy_headers=False,
            loop="uvloop",
            http=Protocol,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=max(1, round(config.drain_timeout_s)),
            timeout_keep_alive=30,
            **tls,
        )
        reloader = None
        if file is not None:
            read = partial(load_config, file, flags)
            specs = partial(model_specs, runtime_dir=runtime_dir)
            reloader = Reloader(file, read, specs, live, manager, notifier.reloading, lambda: settings.ssl)
        server = _Server(settings, manager, notifier, reloader)
        try:
            server.run(sockets=sockets)
        finally:
            for each in sockets:
                each.close()
        if not server.started:
            raise MballError("the server could not start; the log above says why")


@contextlib.contextmanager
def _runtime_dir(config: Config) -> Iterator[Path]:
    """A private folder for sockets: unix socket paths are short (107 bytes), so not below the user's own folders."""
    if config.runtime_dir is not None:
        config.runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        config.runtime_dir.chmod(0o700)
        yield config.runtime_dir
        return
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(tempfile.mkdtemp(prefix="mball-", dir=base if base and Path(base).is_dir() else None))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Running:
    """A server in a process of its own."""

    url: str
    pid: int


@contextlib.contextmanager
def running_server(arguments: list[str], *, log: Path | None = None) -> Iterator[Running]:
    """`mball serve` with these arguments in a process of its own, on a free port, from when it answers.

    It is stopped at the end, its workers with it, also where this process is killed. Raises MballError where it does
    not come up.
    """
    with bind("127.0.0.1", 0) as sock, _log_file(log) as output:
        command = [sys.executable, "-m", "mball", "serve", "--fd", str(sock.fileno()), "--parent", str(os.getpid())]
        command += arguments
        process = subprocess.Popen(command, pass_fds=[sock.fileno()], stdout=output, stderr=output)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        sock.close()
        try:
            _wait_until_it_answers(process, url)
            yield Running(url, process.pid)
        finally:
            _stop(process)


@contextlib.contextmanager
def _log_file(path: Path | None) -> Iterator[int | None]:
    if path is None:
        yield None
        return
    with path.open("ab") as file:
        yield file.fileno()


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str) -> None:
    # The socket listens already, so the first request waits in its backlog until the server takes it.
    try:
        httpx.get(f"{url}/health", timeout=_READY_TIMEOUT_S).raise_for_status()
    except httpx.HTTPError as error:
        code = process.poll()
        what = f"it ended with code {code}" if code is not None else str(error)
        raise MballError(f"the server did not come up: {what}") from None


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=_READY_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=_STOP_MARGIN_S)
