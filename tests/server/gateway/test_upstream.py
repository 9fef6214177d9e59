from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mball.server.gateway.upstream import Answer, Unreachable, Workers

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\ncontent-length: 5\r\n\r\nhello"


@dataclass
class Peer:
    """A worker of canned answers. What it got, and the connections that it had and that ended."""

    path: str
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    ended: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))


Start = Callable[..., contextlib.AbstractAsyncContextManager[Peer]]


@pytest.fixture
def peer(tmp_path: Path, workers: Workers) -> Start:
    @contextlib.asynccontextmanager
    async def start(*answers: bytes, name: str = "1", closes: bool = False) -> AsyncIterator[Peer]:
        """The first of its connections' requests get `answers`, in turn; b"" is none."""
        found = Peer(str(tmp_path / name))
        left = list(answers)

        serving: set[asyncio.Task[None] | None] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            serving.add(asyncio.current_task())
            found.connections += 1
            try:
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    while left:
                        head = await reader.readuntil(b"\r\n\r\n")
                        size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                        found.requests.append(head + await reader.readexactly(size))
                        writer.write(left.pop(0))
                        await writer.drain()
                    if not closes:
                        await reader.read()
            finally:
                found.ended.release()
                writer.transport.abort()

        server = await asyncio.start_unix_server(serve, found.path, limit=1 << 23)
        try:
            yield found
        finally:
            server.close()
            workers.close()
            async with asyncio.timeout(30):
                await asyncio.gather(*(task for task in serving if task is not None), return_exceptions=True)

    return start


@pytest.fixture
def workers() -> Workers:
    return Workers()


async def whole(answer: Answer) -> bytes:
    parts = []
    while part := await answer.read():
        parts.append(part)
    return b"".join(parts)


async def ask(workers: Workers, peer: Peer, body: bytes = b"{}", model: str = "m") -> tuple[int, bytes]:
    async with asyncio.timeout(30), workers.post(model, peer.path, "/v1/x", body, [("x-who", "me")]) as answer:
        content = await whole(answer)
        return answer.status, content


async def test_what_is_sent_and_what_comes_back(workers: Workers, peer: Start) -> None:
    async with peer(OK) as worker, workers.post("m", worker.path, "/v1/x", b'{"a": 1}', [("x-who", "me")]) as answer:
        assert await whole(answer) == b"hello"
        assert answer.status == 200
        assert answer.headers == [(b"content-type", b"text/plain"), (b"content-length", b"5")]
        head, _, body = worker.requests[0].partition(b"\r\n\r\n")
        assert body == b'{"a": 1}'
        assert head.split(b"\r\n") == [
            b"POST /v1/x HTTP/1.1",
            b"host: worker",
            b"content-type: application/json",
            b"content-length: 8",
            b"x-who: me",
        ]


async def test_chunks_are_taken_apart(workers: Workers, peer: Start) -> None:
    chunked = b"HTTP/1.1 404 Not Found\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
    async with peer(chunked) as worker:
        assert await ask(workers, worker) == (404, b"onetwo")


async def test_a_connection_is_used_again_and_one_that_ended_is_not(workers: Workers, peer: Start) -> None:
    async with peer(OK, OK, closes=True) as worker:
        assert await ask(workers, worker) == (200, b"hello")
        assert await ask(workers, worker) == (200, b"hello")
        assert worker.connections == 1
        async with asyncio.timeout(30):
            await worker.ended.acquire()
        await asyncio.sleep(0)
        with pytest.raises(ConnectionError):
            await ask(workers, worker)
        assert worker.connections == 2


async def test_one_that_says_close_is_not_used_again(workers: Workers, peer: Start) -> None:
    last = OK.replace(b"Content-Type: text/plain", b"connection: close")
    async with peer(last, OK) as worker:
        await ask(workers, worker)
        await ask(workers, worker)
        assert worker.connections == 2


async def test_one_that_says_more_than_was_asked_is_not_used_again(workers: Workers, peer: Start) -> None:
    async with peer(OK + OK, OK) as worker:
        assert await ask(workers, worker) == (200, b"hello")
        assert await ask(workers, worker) == (200, b"hello")
        assert worker.connections == 2


async def test_who_leaves_before_the_end_cuts_the_connection(workers: Workers, peer: Start) -> None:
    async with peer(OK[:-1]) as worker:
        async with workers.post("m", worker.path, "/", b"{}", []) as answer:
            assert await answer.read() == b"hell"
        async with asyncio.timeout(30):
            await worker.ended.acquire()


@pytest.mark.parametrize(
    "answer", [OK[:-1], OK[:20], b"", b"no HTTP\r\n\r\n", OK.replace(b"content-length: 5", b"x: y")]
)
async def test_an_answer_that_is_cut_off_or_none_is_an_error(workers: Workers, peer: Start, answer: bytes) -> None:
    async with peer(answer, closes=True) as worker:
        with pytest.raises(ConnectionError):
            await ask(workers, worker)


async def test_nobody_at_the_socket_is_told_apart(workers: Workers, tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        await ask(workers, Peer(str(tmp_path / "nobody")))


async def test_a_large_body_arrives_whole(workers: Workers, peer: Start) -> None:
    body = b"x" * (3 << 20)
    async with peer(OK) as worker:
        assert await ask(workers, worker, body) == (200, b"hello")
        assert worker.requests[0].endswith(b"\r\n\r\n" + body)


async def test_a_reader_that_does_not_read_holds_the_worker_up(workers: Workers, peer: Start) -> None:
    size = 64 << 20
    content = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + bytes(size)
    async with (
        asyncio.timeout(60),
        peer(content) as worker,
        workers.post("m", worker.path, "/", b"{}", []) as answer,
    ):
        first = await answer.read()
        while not answer.paused:  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)
        assert len(first) + len(await answer.read()) < size // 8
        assert len(await whole(answer)) > size // 2


async def test_connections_to_the_worker_before_the_last_are_closed(workers: Workers, peer: Start) -> None:
    async with (
        peer(OK, name="1") as first,
        peer(OK, name="2") as second,
        peer(OK, name="3") as third,
        peer(OK, name="4") as other,
    ):
        for one in (first, second):
            await ask(workers, one)
        await ask(workers, other, model="another")
        await ask(workers, third)
        async with asyncio.timeout(30):
            await first.ended.acquire()
        assert second.ended.locked()
        assert other.ended.locked()
        workers.close()
        async with asyncio.timeout(30):
            await asyncio.gather(*(one.ended.acquire() for one in (second, third, other)))
