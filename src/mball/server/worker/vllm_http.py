"""A client of vLLM's server, over its unix socket. Standard library only: it runs in vLLM's interpreter."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from mball.errors import TransitionError

_QUOTED = 500


class VllmClient:
    """Each call takes a connection and a thread of its own."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path

    async def get(self, path: str, *, deadline_s: float) -> Any:
        """Raises TransitionError, also where nobody answers yet."""
        return await asyncio.to_thread(self._call, "GET", path, None, deadline_s)

    async def post(self, path: str, body: Mapping[str, Any] | None = None, *, deadline_s: float) -> Any:
        """The JSON of the answer, None for an empty one. Raises TransitionError."""
        return await asyncio.to_thread(self._call, "POST", path, body, deadline_s)

    async def rpc(self, method: str, args: Sequence[Any] = (), *, deadline_s: float) -> list[Any]:
        """What each of the engine's processes answers. Raises TransitionError."""
        body = {"method": method, "args": list(args), "timeout": deadline_s}
        answer = await self.post("/collective_rpc", body, deadline_s=deadline_s)
        return list(answer["results"]) if answer else []

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None, deadline_s: float) -> Any:
        connection = _UnixConnection(self._socket_path, deadline_s)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"content-type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise TransitionError(f"vLLM did not answer {path}: {error!r}") from None
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise TransitionError(f"vLLM answered {path} with {response.status}: {text[:_QUOTED]}")
        return json.loads(text) if text else None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("vllm", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
