"""Tells systemd how the server is (sd_notify(3)); where it is no service's, nothing is told."""

from __future__ import annotations

import asyncio
import os
import socket
import time

import structlog

_log = structlog.get_logger(__name__)


class Notifier:
    """Takes its address out of the environment: workers are not asked to speak for the server."""

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", None)
        usec, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        wanted = usec.isdecimal() and pid in ("", str(os.getpid()))
        self._alive_every_s = int(usec) / 1e6 / 2 if wanted else None

    def ready(self) -> None:
        self._tell("READY=1")

    def reloading(self, begins: bool) -> None:
        """Whether it begins, or has ended."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}" if begins else "READY=1")

    def stopping(self) -> None:
        self._tell("STOPPING=1")

    async def stay_alive(self) -> None:
        """Says so twice in the time after which systemd ends a service that does not, for as long as its loop turns."""
        while self._alive_every_s is not None:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._alive_every_s)

    def _tell(self, what: str) -> None:
        if self._address is None:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.sendto(what.encode(), address)
        except OSError as error:
            _log.warning("systemd was not told", what=what, reason=str(error))
