"""A load generator small enough to share two cores with what it measures: connections that ask one thing at a time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httptools

from mball.bench.contenders import Cannot

_PATH = b"/v1/chat/completions"
_DONE = b"[DONE]"
ANSWER_S = 60.0
"""How long one answer may take."""


def asks(*, stream: bool, chunks: int = 64, pace_ms: int = 0) -> bytes:
    """A chat request's body."""
    text = f"Say something. chunks={chunks} pace_ms={pace_ms}"
    fields = {"model": "bench", "messages": [{"role": "user", "content": text}], "stream": stream, "max_tokens": 128}
    return json.dumps(fields).encode()


@dataclass(slots=True)
class Answer:
    """`first_s`: from where the request is sent to the first byte of its answer's body; `whole_s`: to its last."""

    status: int = 0
    first_s: float = 0.0
    whole_s: float = 0.0
    body: bytearray = field(default_factory=bytearray)


class Connection(asyncio.Protocol):
    """One keep-alive connection. `ask` is called by one task at a time."""

    def __init__(self, head: bytes) -> None:
        self._head = head
        self._answer = Answer()
        self._done: asyncio.Future[Answer] | None = None
        self.first = asyncio.Event()

    @classmethod
    async def open(cls, port: int, key: str) -> Connection:
        head = b"POST %s HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n" % _PATH
        head += b"authorization: Bearer %s\r\ncontent-length: " % key.encode()
        _, made = await asyncio.get_running_loop().create_connection(lambda: cls(head), "127.0.0.1", port)
        return made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(Cannot(f"it closed a connection: {error}"))

    def close(self) -> None:
        self._done = None
        self._transport.close()

    def begin(self, body: bytes) -> asyncio.Future[Answer]:
        self._answer = Answer()
        self.first.clear()
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._began = time.perf_counter()
        self._transport.write(b"%s%d\r\n\r\n%s" % (self._head, len(body), body))
        return self._done

    async def ask(self, body: bytes) -> Answer:
        """Raises Cannot for anything but a whole answer with 200."""
        done = self.begin(body)
        answer = await done
        if answer.status != 200:
            raise Cannot(f"it answered {answer.status}: {bytes(answer.body[:200])!r}")
        if b'"stream": true' in body and _DONE not in answer.body[-32:]:
            raise Cannot("a stream that did not end with [DONE]")
        return answer

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if not self._answer.body:
            self._answer.first_s = time.perf_counter() - self._began
            self.first.set()
        self._answer.body += body

    def on_message_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        self._answer.whole_s = time.perf_counter() - self._began
        if self._done is not None and not self._done.done():
            self._done.set_result(self._answer)


async def closed_loop(port: int, key: str, body: bytes, connections: int, *, seconds: float, least: int = 0) -> float:
    """Requests a second: each connection asks again as soon as it was answered, for so long and until `least` were."""
    opened = [await Connection.open(port, key) for _ in range(connections)]
    count = 0
    began = time.perf_counter()

    async def go(connection: Connection) -> None:
        nonlocal count
        while time.perf_counter() - began < seconds or count < least:
            await connection.ask(body)
            count += 1

    async with asyncio.timeout(seconds + ANSWER_S + least / 20):
        await asyncio.gather(*map(go, opened))
    took = time.perf_counter() - began
    for connection in opened:
        connection.close()
    return count / took


async def open_loop(
    port: int, key: str, body: bytes, rate: float, seconds: float, measure: Callable[[Answer], float]
) -> list[float]:
    """Seconds of each request, sorted; they begin `rate` a second, whatever becomes of those before, with the time
    that one was sent late in its own."""
    free = [await Connection.open(port, key) for _ in range(4)]
    loop = asyncio.get_running_loop()
    began = loop.time()
    found: list[float] = []

    async def one(due: float) -> None:
        late = loop.time() - due
        connection = free.pop() if free else await Connection.open(port, key)
        found.append(late + measure(await connection.ask(body)))
        free.append(connection)

    tasks: list[asyncio.Task[None]] = []
    async with asyncio.timeout(seconds + ANSWER_S):
        for number in range(int(rate * seconds)):
            due = began + number / rate
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(due)))
        await asyncio.gather(*tasks)
    for connection in free:
        connection.close()
    return sorted(found)
