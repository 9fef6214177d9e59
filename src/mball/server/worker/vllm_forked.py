"""vLLM's server as its worker's child: started afresh, or forked before and told now what to serve."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from mball.loader.vllm_names import SERVER


class Server(Protocol):
    """As subprocess.Popen has it."""

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


Start = Callable[[Sequence[str], Mapping[str, str]], Server]
"""Of vLLM's options, and the environment of its processes. Raises OSError."""


def fresh(arguments: Sequence[str], environment: Mapping[str, str]) -> Server:
    """In this interpreter."""
    return subprocess.Popen([sys.executable, "-m", SERVER, *arguments], stdin=subprocess.DEVNULL, env=environment)


class ForkedServer:
    """A child that was forked, and waits for the JSON of what to serve at the other end of `tell`. Thread-safe."""

    def __init__(self, pid: int, tell: int) -> None:
        """Raises OSError."""
        self._pid = pid
        self._tell = tell
        self._pidfd = os.pidfd_open(pid)
        self._lock = threading.Lock()
        self._code: int | None = None

    def begin(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Server:
        with os.fdopen(self._tell, "wb") as pipe:
            pipe.write(json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode())
        return self

    def poll(self) -> int | None:
        with self._lock:
            if self._code is None:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
            return self._code

    def wait(self, timeout: float | None = None) -> int:
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        ended.poll(None if timeout is None else 1000 * timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("vllm", timeout or 0.0)
        return code

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd, number)
