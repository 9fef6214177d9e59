"""HTTP/1.1 to a worker's unix socket: what the gateway asks of it, on connections that are kept, and no more.

Requests are POSTs with a body of a known length; the parser is llhttp, as in the server.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import httptools

Headers = list[tuple[bytes, bytes]]

CONNECT_TIMEOUT_S = 10.0
_MOST_UNREAD = 256 * 1024
_PIECE_BYTES = 256 * 1024
_IDLE_S = 2.0
"""A worker may close a connection that is idle, and a request that meets that would be lost with it."""
_MOST_IDLE = 64
_SOCKETS = 2


class Unreachable(ConnectionError):
    """Nobody listens at the socket: no byte of the request was sent."""


class Answer(asyncio.Protocol):
    """One connection, and the answer that comes on it. `status` and `headers` (lower-case names) are there with the
    first bytes of the body, or its end."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.idle_since_s = 0.0
        self._parser: httptools.HttpResponseParser | None = None
        self._whole = False
        self._keeps = False
        self._parts: list[bytes] = []
        self._unread = 0
        self.paused = False
        self._lost: ConnectionError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._writing = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        if self._lost is None:
            self._lost = ConnectionResetError(f"the worker closed the connection: {error or 'end of file'}")
        self._wake()
        self.resume_writing()

    def pause_writing(self) -> None:
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def data_received(self, data: bytes) -> None:
        try:
            if self._parser is None or self._whole:
                raise httptools.HttpParserError("nobody asked for it")
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._lost = ConnectionAbortedError(f"the worker's answer is not HTTP: {error!r}")
            self._transport.abort()
        if self._unread > _MOST_UNREAD and not self.paused:
            self.paused = True
            self._transport.pause_reading()
        self._wake()

    def on_message_begin(self) -> None:
        if self._whole:
            raise httptools.HttpParserError("one answer was asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._parser is not None:
            self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._unread += len(body)

    def on_message_complete(self) -> None:
        self._whole = True
        self._keeps = self._parser is not None and self._parser.should_keep_alive()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def ask(self, head: bytes, body: bytes) -> None:
        """Sends a request. Raises ConnectionError."""
        self._parser = httptools.HttpResponseParser(self)
        self.status, self.headers = 0, []
        self._whole, self._writing = False, True
        if len(body) <= _PIECE_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            for at in range(0, len(body), _PIECE_BYTES):
                self._transport.write(body[at : at + _PIECE_BYTES])
                if self._writable is not None:
                    await self._writable
                if self._lost is not None:
                    raise self._lost
        self._writing = False

    async def read(self) -> bytes:
        """What has come of the body, waiting for some; b"" at its end. Raises ConnectionError where it is cut off."""
        while not self._parts:
            if self._whole:
                return b""
            if self._lost is not None:
                raise self._lost
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts, self._unread = [], 0
        if self.paused:
            self.paused = False
            self._transport.resume_reading()
        return data

    @property
    def ended(self) -> bool:
        """Whether all of its body was read."""
        return self._whole and not self._parts

    def reusable(self) -> bool:
        """Whether it can carry another request."""
        sound = self._whole and self._keeps and not self._writing and not self._parts and self._lost is None
        return sound and not self._transport.is_closing()

    def abort(self) -> None:
        self._transport.abort()


class _Socket:
    """Connections to one socket."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._idle: deque[Answer] = deque()
        self._closed = False

    async def connect(self) -> Answer:
        while self._idle:
            kept = self._idle.pop()
            if kept.reusable() and time.monotonic() - kept.idle_since_s < _IDLE_S:
                return kept
            kept.abort()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, answer = await asyncio.get_running_loop().create_unix_connection(Answer, self._path)
        except (OSError, TimeoutError) as error:
            raise Unreachable(f"{self._path}: {error!r}") from None
        return answer

    def give_back(self, answer: Answer) -> None:
        if answer.reusable() and not self._closed and len(self._idle) < _MOST_IDLE:
            answer.idle_since_s = time.monotonic()
            self._idle.append(answer)
        else:
            answer.abort()

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().abort()


class Workers:
    """Connections to the workers' sockets: of each model those of the last two, as a request may still be on its way to
    the worker before."""

    def __init__(self) -> None:
        self._sockets: dict[str, OrderedDict[str, _Socket]] = {}

    @asynccontextmanager
    async def post(
        self, model: str, socket_path: str, path: str, body: bytes, headers: Iterable[tuple[str, str]]
    ) -> AsyncIterator[Answer]:
        """The answer to a JSON body. Whoever leaves before its end cuts the connection, which the worker sees.

        Raises Unreachable, and ConnectionError where the connection is lost.
        """
        sock = self._socket(model, socket_path)
        answer = await sock.connect()
        try:
            more = "".join(f"{name}: {value}\r\n" for name, value in headers)
            head = (
                f"POST {path} HTTP/1.1\r\nhost: worker\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n{more}\r\n"
            )
            await answer.ask(head.encode("ascii"), body)
            yield answer
        finally:
            sock.give_back(answer)

    def _socket(self, model: str, path: str) -> _Socket:
        sockets = self._sockets.setdefault(model, OrderedDict())
        if (sock := sockets.get(path)) is not None:
            sockets.move_to_end(path)
            return sock
        sock = sockets[path] = _Socket(path)
        if len(sockets) > _SOCKETS:
            sockets.popitem(last=False)[1].close()
        return sock

    def close(self) -> None:
        for sockets in self._sockets.values():
            for sock in sockets.values():
                sock.close()
        self._sockets.clear()
