from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from mball.server.gateway.protocol import Joined, Protocol
from mball.server.http import MballError, error_response, read_body
from mball.server.run import bind


class Quick(Protocol):
    receive_s = 0.2


async def _echo_size(scope: Scope, receive: Receive, send: Send) -> None:
    try:
        body = await read_body(Request(scope, receive), 1 << 30)
        await PlainTextResponse(str(len(body)))(scope, receive, send)
    except MballError as error:
        await error_response(error)(scope, receive, send)


@contextlib.asynccontextmanager
async def connected(protocol: type[Protocol]) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(_echo_size, http=protocol, ws="none", lifespan="off", log_config=None))
    serving = asyncio.create_task(server._serve([sock]))
    reader, writer = await asyncio.open_connection(*sock.getsockname())
    try:
        async with asyncio.timeout(60):
            yield reader, writer
    finally:
        writer.close()
        server.should_exit = True
        await serving
        sock.close()


async def answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    return head.split(b" ")[1] + b" " + await reader.readexactly(size)


@pytest.mark.parametrize("name", [b"x-%05d", b"x"])
async def test_a_flood_of_headers_is_refused(name: bytes) -> None:
    """Many of them, and one without an end."""
    async with connected(Protocol) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\n")
        many = b"".join(b"x-%05d: %s\r\n" % (n, b"y" * 90) for n in range(700))
        writer.write(many if name != b"x" else b"x: " + b"y" * 70_000)
        assert (await reader.read()).startswith(b"HTTP/1.1 431 ")


async def test_a_large_head_and_a_larger_body_in_one_piece_are_taken() -> None:
    async with connected(Protocol) as (reader, writer):
        for _ in range(2):
            head = b"POST / HTTP/1.1\r\nhost: x\r\nx: %s\r\ncontent-length: 200000\r\n\r\n" % (b"y" * 60_000)
            writer.write(head + bytes(200_000))
            assert await answer(reader) == b"200 200000"


@pytest.mark.parametrize("sent", [b"", b"POST / HTTP/1.1\r\nx: "])
async def test_a_head_that_does_not_come_is_given_up(sent: bytes) -> None:
    async with connected(Quick) as (reader, writer):
        writer.write(sent)
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_does_not_come_is_given_up_and_one_that_comes_slowly_is_not() -> None:
    async with connected(Quick) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
        for _ in range(10):
            writer.write(bytes(10_000))
            await asyncio.sleep(0.05)
        assert await answer(reader) == b"200 100000"
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\nx")
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""


async def test_a_connection_between_two_requests_may_wait() -> None:
    async with connected(Quick) as (reader, writer):
        for _ in range(2):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\nx")
            assert await answer(reader) == b"200 1"
            await asyncio.sleep(3 * Quick.receive_s)


class Sent(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True


async def test_a_head_goes_out_with_what_follows_it_at_once_and_else_alone() -> None:
    sent, loop = Sent(), asyncio.get_running_loop()
    joined = Joined(sent, loop)
    for data in (b"head ", b"body", b" more"):
        joined.write(data)
    assert sent.writes == [b"head body", b" more"]
    await asyncio.sleep(0)
    assert len(sent.writes) == 2
    joined = Joined(sent, loop)
    joined.write(b"head of a stream")
    await asyncio.sleep(0)
    joined.write(b"its first event")
    assert sent.writes[2:] == [b"head of a stream", b"its first event"]
    joined = Joined(sent, loop)
    joined.write(b"head without a body")
    joined.close()
    assert sent.writes[4:] == [b"head without a body"]
    assert sent.closed
