"""A request goes to its model's worker; the worker's bytes come back as they are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mball.errors import DeadlineExceeded, Draining, MballError, RequestError, Unavailable
from mball.memory.manager import Manager
from mball.server import http, tenants
from mball.server.config import Config
from mball.server.gateway import request_ids
from mball.server.gateway.access import Key
from mball.server.gateway.metrics import CLIENT_LEFT, TAIL_BYTES, Request
from mball.server.gateway.requests import Call
from mball.server.gateway.tracing import Tracing
from mball.server.gateway.upstream import CONNECT_TIMEOUT_S, Answer, Unreachable, Workers
from mball.server.http import ClientLeft, error_body_of, is_whole, stream_error, stream_error_of, unless_disconnected

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Head = list[tuple[bytes, bytes]]

_log = structlog.get_logger(__name__)
_FORWARDED_HEADERS = frozenset({b"content-type", b"content-length", b"cache-control", b"retry-after"})
_EVENTS: Head = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
_PROGRESS_S = 0.5
_PIECE = b"data: "
_BYTES_OF_A_TOKEN = 4
_MOST_OF_AN_ERROR = 64 * 1024


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
        request_id: str,
        manager: Manager,
        workers: Workers,
        measured: Request,
        config: Config,
        tracing: Tracing | None = None,
    ) -> None:
        """`config`: as it is when the request comes. Raises Forbidden for a priority that the key may not have."""
        super().__init__()
        self._call = call
        self._key = key
        self._path = path
        self._request_id = request_id
        self._manager = manager
        self._workers = workers
        self._measured = measured
        self._config = config
        self._tracing = tracing
        self._span: Span | None = None
        self._priority = key.priority(call.priority)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(send, self._path, self._call.stream, self._measured)
        code = 500
        if self._tracing is not None:
            self._span = self._tracing.begin(Headers(scope=scope), self._path, self._request_id)
        try:
            with self._key.request():
                await self._serve_alive(answer, receive)
            code = answer.code
        except ClientLeft:
            code = CLIENT_LEFT
        except asyncio.CancelledError:
            # The time to drain is over: whoever asked is told so.
            code = Draining.status
            try:
                await answer.fail(Draining("the server shuts down, and this took longer than it could wait"))
            except Draining as error:
                await http.error_response(error)(scope, receive, send)
            raise
        except RequestError as error:
            code = error.status
            raise
        finally:
            tokens = self._measured.end(code, answer.tail)
            self._tell(code, tokens)
            if answer.asked:
                # One that was cut off, or says nothing, is counted by what can be seen of it.
                self._key.spend(len(self._call.body) // _BYTES_OF_A_TOKEN + answer.pieces if tokens is None else tokens)

    def _tell(self, code: int, tokens: int | None) -> None:
        told = self._measured.told()
        if self._config.log_requests:
            key, stream = self._key.name or None, self._call.stream
            _log.info("request", path=self._path, key=key, code=code, stream=stream, tokens=tokens, **told)
        if self._tracing is not None and self._span is not None:
            self._tracing.end(self._span, code, tokens, told)

    async def _serve_alive(self, answer: _Answer, receive: Receive) -> None:
        # A server says "disconnected" of a whole answer, too: nothing waits in there after its end.
        serving = unless_disconnected(self._serve(answer), receive)
        every_s = _PROGRESS_S if self._call.progress else self._config.sse_keepalive_s
        if every_s is None or not self._call.stream:
            await serving
            return
        comments: asyncio.Task[None] | None = None

        def begin() -> None:
            nonlocal comments
            comments = asyncio.create_task(answer.keep_alive(self._news, every_s), name="keep-alive")

        timer = asyncio.get_running_loop().call_later(every_s, begin)
        try:
            await serving
        finally:
            timer.cancel()
            if comments is not None:
                await self._end(comments)

    async def _end(self, comments: asyncio.Task[None]) -> None:
        comments.cancel()
        await asyncio.wait({comments})
        if not comments.cancelled() and (error := comments.exception()) is not None:
            _log.info("no comment", model=self._call.model, error=repr(error))

    def _news(self) -> bytes:
        """What a stream that waits is told: a comment, or an event where it asked for those."""
        model = self._call.model
        if not self._call.progress:
            return f": {json.dumps(model)} is being brought in, or at the prompt\n\n".encode()
        return b"event: mball.progress\n" + _event(self._manager.progress(model))

    async def _serve(self, answer: _Answer) -> None:
        longest_s, own_s = self._config.request_timeout_s, self._call.timeout_s
        left_s = longest_s if own_s is None else own_s - (time.monotonic() - self._call.began_s)
        try:
            async with asyncio.timeout(min(longest_s, left_s)):
                while not await self._hand_over(answer):
                    pass
        except TimeoutError:
            if left_s < longest_s:
                where = "while it was answered" if answer.asked else "while it waited for its model"
                late = f"{self._call.model}: no whole answer within the {own_s:g} s that it was given; ended {where}"
                await answer.fail(DeadlineExceeded(late))
            else:
                late = f"{self._call.model}: no whole answer within {longest_s:.0f} s"
                await answer.fail(Unavailable(late, retry_after_s=self._manager.retry_after_s(self._call.model)))
        except ConnectionError as error:
            _log.warning("worker lost", model=self._call.model, error=repr(error))
            lost = f"{self._call.model}: its worker ended while it answered; try again"
            await answer.fail(Unavailable(lost, retry_after_s=self._manager.retry_after_s(self._call.model)))
        except MballError as error:
            await answer.fail(error)

    async def _hand_over(self, answer: _Answer) -> bool:
        """Whether a worker took the request. False once one that could not be reached is known to have ended."""
        wait_s = self._config.queue_timeout_s
        async with self._manager.admit(self._call.model, deadline_s=wait_s, priority=self._priority) as ticket:
            self._measured.admitted()
            answer.asked = True
            headers = [(tenants.HEADER, tenants.tenant(self._key.name)), (request_ids.HEADER, self._request_id)]
            if self._tracing is not None and self._span is not None:
                headers += self._tracing.parent(self._span)
            try:
                async with self._workers.post(
                    self._call.model, ticket.socket_path, self._path, self._call.body, headers
                ) as upstream:
                    await answer.relay(upstream)
            except Unreachable as error:
                try:
                    async with asyncio.timeout(CONNECT_TIMEOUT_S):
                        await ticket.lost.wait()
                except TimeoutError:
                    raise error from None
                return False
            return True


class _Answer:
    """The client's side of one answer: exactly one outcome. `code`: its status, 503 where it was cut off; `tail`: its
    last bytes; `asked`: a worker was asked for it; `pieces`: events of a stream so far."""

    def __init__(self, send: Send, path: str, stream: bool, measured: Request) -> None:
        self.code = 503
        self.tail = b""
        self.asked = False
        self.pieces = 0
        self._send = send
        self._path = path
        self._stream = stream
        self._measured = measured
        self._started = False
        self._arrived = asyncio.Event()

    async def keep_alive(self, news: Callable[[], bytes], every_s: float) -> None:
        """Comments, which clients pass over and proxies see, until the worker's first bytes are there."""
        while not self._arrived.is_set():
            await self._start(200, _EVENTS)
            await self._send({"type": "http.response.body", "body": news(), "more_body": True})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await self._arrived.wait()

    async def _start(self, status: int, headers: Head) -> None:
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def relay(self, upstream: Answer) -> None:
        chunk = await upstream.read()
        self._arrived.set()
        self._measured.first()
        if self._started and upstream.status != 200:
            await self._refused(upstream, chunk)
            return
        await self._start(upstream.status, [h for h in upstream.headers if h[0] in _FORWARDED_HEADERS])
        while not upstream.ended:
            await self._pass_on(chunk, more=True)
            chunk = await upstream.read()
        await self._pass_on(chunk, more=False)
        self.code = upstream.status

    async def _pass_on(self, chunk: bytes, *, more: bool) -> None:
        self.tail = chunk[-TAIL_BYTES:] if len(chunk) >= TAIL_BYTES else (self.tail + chunk)[-TAIL_BYTES:]
        self.pieces += chunk.count(_PIECE)
        await self._send({"type": "http.response.body", "body": chunk, "more_body": more})

    async def _refused(self, upstream: Answer, body: bytes) -> None:
        """A worker's error after a 200: the last event."""
        while chunk := await upstream.read():
            body = (body + chunk)[:_MOST_OF_AN_ERROR]
        try:
            fields = http.parse_object(body)
        except MballError:
            fields = error_body_of(self._path, MballError(f"the worker answered with {upstream.status}"))
        await self._send({"type": "http.response.body", "body": stream_error_of(fields, self._path)})
        self.code = upstream.status

    async def fail(self, error: MballError) -> None:
        """An error response where nothing was sent; else an error event where it is a stream, and the end."""
        if not self._started:
            raise error
        self._arrived.set()
        self.code = error.status if isinstance(error, RequestError) else 500
        if self._stream and is_whole(self._path, self.tail):
            # It was whole: its worker ended between the last event and the end of the body.
            self.code = 200
            await self._send({"type": "http.response.body", "body": b""})
        elif self._stream:
            await self._send({"type": "http.response.body", "body": stream_error(error, self._path)})
        else:
            # A body cut short of its content-length: the connection closes and the client sees it.
            raise ConnectionAbortedError(str(error))


def _event(fields: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()
