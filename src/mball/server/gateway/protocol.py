"""HTTP/1.1 of the gateway's clients: uvicorn's on llhttp, which of itself bounds neither a request's head nor its
time."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mball.units import KiB


class Joined:
    """The transport of one answer, whose head goes out with what follows it in the same turn of the loop: each packet
    costs both sides as much as all else that is done with a small answer."""

    __slots__ = ("_head", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        if self._head is None:
            self._head = data
            self._loop.call_soon(self._flush)
        elif self._head:
            data, self._head = self._head + data, b""
            self._transport.write(data)
        else:
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def _flush(self) -> None:
        if self._head:
            self._transport.write(self._head)
            self._head = b""


class Protocol(HttpToolsProtocol):
    """A head of more than `max_head_bytes` is answered with 431. A request that has not come whole within `receive_s`
    and a second more for each `least_rate_bytes` of it is given up, with 408 where nothing of it was answered. So is a
    client that reads nothing of its answer for `send_s`."""

    max_head_bytes = 64 * KiB
    receive_s = 30.0
    send_s = 60.0
    least_rate_bytes = 16 * KiB

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._next_request()
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.send_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def data_received(self, data: bytes) -> None:
        if not self._in_head:
            self._received += len(data)
            super().data_received(data)
            return
        room = self.max_head_bytes - self._received
        self._received += len(data)
        super().data_received(data[:room])
        if len(data) > room and not self.transport.is_closing():
            self._go_on(data[room:])

    def _go_on(self, data: bytes) -> None:
        """With what is beyond the largest head."""
        if self._in_head:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        else:
            super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()
        self.cycle.transport = Joined(self.transport, self.loop)  # type: ignore[assignment]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop()
        self._next_request()

    def _next_request(self) -> None:
        self._in_head = True
        self._received = 0

    def _begin(self) -> None:
        self._began_s = self.loop.time()
        self._timer = self.loop.call_later(self.receive_s, self._look)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        left_s = self._began_s + self.receive_s + self._received / self.least_rate_bytes - self.loop.time()
        if left_s > 0 and not self._in_head:
            self._timer = self.loop.call_later(left_s, self._look)
            return
        self._timer = None
        if self._in_head:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.transport.abort()

    def _refuse(self, status: HTTPStatus) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # The answer before it is still on its way.
            self.transport.abort()
        elif not self.transport.is_closing():
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode())
            self.transport.close()
