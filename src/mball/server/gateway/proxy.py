"""A request goes to its model's worker; the worker's bytes come back as they are."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json

import aiohttp
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mball.errors import MballError, Unavailable
from mball.memory.manager import Manager
from mball.server.gateway.access import Key
from mball.server.gateway.requests import Call
from mball.server.http import ClientLeft, error_body, unless_disconnected

_log = structlog.get_logger(__name__)
_FORWARDED_HEADERS = ("content-type", "content-length", "cache-control", "retry-after")
_DONE = b"data: [DONE]\n\n"
_CONNECT_TIMEOUT_S = 10.0


class Workers:
    """HTTP sessions to the workers' unix sockets, one per socket."""

    def __init__(self) -> None:
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    def session(self, socket_path: str) -> aiohttp.ClientSession:
        session = self._sessions.get(socket_path)
        if session is None:
            # A worker's answer may take as long as the request may; the request's own deadline bounds it.
            session = self._sessions[socket_path] = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(socket_path, limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
                auto_decompress=False,
            )
        return session

    async def close(self) -> None:
        sessions, self._sessions = list(self._sessions.values()), {}
        for session in sessions:
            await session.close()


class Forward(Response):
    """Waits until the model is on the device, then streams the worker's answer.

    A client that leaves, waiting or streaming, ends it at once: the connection to the worker closes and the worker
    frees the sequence. A worker that dies gives a 503 before the first byte; after it an error event ends a stream. One
    that had ended before the request reached it is replaced by the next.
    """

    def __init__(
        self,
        call: Call,
        key: Key,
        path: str,
        manager: Manager,
        workers: Workers,
        *,
        queue_timeout_s: float,
        timeout_s: float,
    ) -> None:
        super().__init__()
        self._call = call
        self._key = key
        self._path = path
        self._manager = manager
        self._workers = workers
        self._queue_timeout_s = queue_timeout_s
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientLeft):
            async with self._key.request():
                await unless_disconnected(self._serve(send), receive)

    async def _serve(self, send: Send) -> None:
        answer = _Answer(send, self._call.stream)
        try:
            async with asyncio.timeout(self._timeout_s):
                while not await self._hand_over(answer):
                    pass
        except TimeoutError:
            late = f"{self._call.model}: no whole answer within {self._timeout_s:.0f} s"
            await answer.fail(Unavailable(late, retry_after_s=self._manager.retry_after_s(self._call.model)))
        except (aiohttp.ClientError, ConnectionError) as error:
            _log.warning("worker lost", model=self._call.model, error=repr(error))
            lost = f"{self._call.model}: its worker ended while it answered; try again"
            await answer.fail(Unavailable(lost, retry_after_s=self._manager.retry_after_s(self._call.model)))

    async def _hand_over(self, answer: _Answer) -> bool:
        """Whether a worker took the request. False once one that could not be reached is known to have ended."""
        async with self._manager.admit(self._call.model, deadline_s=self._queue_timeout_s) as ticket:
            session = self._workers.session(ticket.socket_path)
            # A BytesIO is written piece by piece, where bytes would be one write however many they are.
            data = io.BytesIO(self._call.body)
            headers = {"content-type": "application/json"}
            try:
                async with session.post(f"http://worker{self._path}", data=data, headers=headers) as upstream:
                    await answer.relay(upstream)
            except aiohttp.ClientConnectorError as error:
                try:
                    async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                        await ticket.lost.wait()
                except TimeoutError:
                    raise error from None
                return False
            return True


class _Answer:
    """The client's side of one answer: exactly one outcome."""

    def __init__(self, send: Send, stream: bool) -> None:
        self._send = send
        self._stream = stream
        self._started = False
        self._end = b""

    async def relay(self, upstream: aiohttp.ClientResponse) -> None:
        headers = [(k.encode(), upstream.headers[k].encode()) for k in _FORWARDED_HEADERS if k in upstream.headers]
        chunks = upstream.content.iter_any()
        first = await anext(chunks, b"")
        await self._send({"type": "http.response.start", "status": upstream.status, "headers": headers})
        self._started = True
        await self._send({"type": "http.response.body", "body": first, "more_body": True})
        self._end = first[-len(_DONE) :]
        async for chunk in chunks:
            self._end = (self._end + chunk)[-len(_DONE) :]
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: MballError) -> None:
        """An error response where nothing was sent; else an error event where it is a stream, and the end."""
        if not self._started:
            raise error
        if self._stream and self._end == _DONE:
            # It was whole: its worker ended between the last event and the end of the body.
            await self._send({"type": "http.response.body", "body": b""})
        elif self._stream:
            event = f"data: {json.dumps(error_body(error))}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event})
        else:
            # A body cut short of its content-length: the connection closes and the client sees it.
            raise ConnectionAbortedError(str(error))
