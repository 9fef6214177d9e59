"""Generated answers over HTTP: whole, or as server-sent events while the tokens come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mball.errors import MballError
from mball.server.http import ClientLeft, unless_disconnected
from mball.server.worker.formats import Format, Usage
from mball.server.worker.generation import Delta, Generation

SEND_TIMEOUT_S = 60.0
"""A reader that takes nothing for so long loses its answer, and its slot goes to others."""


class Answer(Response):
    """Runs the generation for as long as its client stays; then none of its sequences is left in the engine."""

    def __init__(
        self, running: AbstractAsyncContextManager[Generation], form: Format, *, prompt_tokens: int, stream: bool
    ) -> None:
        super().__init__()
        self._running = running
        self._form = form
        self._prompt_tokens = prompt_tokens
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientLeft):
            if self._stream:
                await unless_disconnected(self._send_events(send), receive)
            else:
                response = await unless_disconnected(self._whole(), receive)
                await response(scope, receive, send)

    async def _whole(self) -> Response:
        async with self._running as generation:
            choices = [Delta(index) for index in range(generation.size)]
            async for deltas in generation.deltas():
                for delta in deltas:
                    choice = choices[delta.index]
                    choice.text += delta.text
                    choice.tokens += delta.tokens
                    choice.finish_reason = delta.finish_reason or choice.finish_reason
                    choice.stop = delta.stop
            usage = self._usage(generation)
        return JSONResponse(self._form.whole(choices, usage))

    async def _send_events(self, send: Send) -> None:
        events = self._events()
        try:
            first = await anext(events)
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await _send_body(send, first)
            try:
                async for event in events:
                    await _send_body(send, event)
            except MballError as error:
                await _send_body(send, self._form.failure(error))
            await _send_body(send, b"", more=False)
        finally:
            await events.aclose()

    async def _events(self) -> AsyncGenerator[bytes]:
        async with self._running as generation:
            opened = False
            async for deltas in generation.deltas():
                for opening in [] if opened else self._form.opening():
                    yield opening
                opened = True
                for delta in deltas:
                    for event in self._form.events(delta):
                        yield event
            closing = self._form.closing(self._usage(generation))
        for event in closing:
            yield event

    def _usage(self, generation: Generation) -> Usage:
        return Usage(self._prompt_tokens, generation.completion_tokens, generation.cached_tokens)


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    try:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await send({"type": "http.response.body", "body": body, "more_body": more})
    except TimeoutError:
        raise ClientLeft(f"the client read nothing for {SEND_TIMEOUT_S:.0f} s") from None
