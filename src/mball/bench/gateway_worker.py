"""A worker program that answers at once: what is left of a request's time is the gateway's.

`--port-fd N`: it serves that socket by itself, for a peer or the load generator to call. `--control-fd N --spec JSON`:
it is MBALL's worker. A request says in its text what it wants: `chunks=64 pace_ms=10`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
from typing import Any

import httptools
import uvloop

from mball.device import prctl
from mball.memory import control
from mball.memory.spec import WorkerSpec

_WANTED = re.compile(rb"chunks=(\d+) pace_ms=(\d+)")
_USAGE = {"prompt_tokens": 8, "completion_tokens": 64, "total_tokens": 72}
ANSWER = "The answer that every request gets, some two dozen tokens long, so that it is like one of a small model."


def word(number: int) -> str:
    """What a stream's chunk says."""
    return f"word {number} "


def _object(kind: str, choice: dict[str, Any], **more: Any) -> bytes:
    choice = {"index": 0, "finish_reason": None, **choice}
    fields = {"id": "chatcmpl-bench", "object": kind, "created": 1, "model": "bench", "choices": [choice], **more}
    return json.dumps(fields).encode()


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(number: int) -> bytes:
    delta = {"delta": {"role": "assistant", "content": word(number)}}
    return _framed(b"data: " + _object("chat.completion.chunk", delta) + b"\n\n")


_BODY = _object(
    "chat.completion", {"message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}, usage=_USAGE
)
_WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENTS = [_event(number) for number in range(64)]
_LAST = _object("chat.completion.chunk", {"delta": {}, "finish_reason": "stop"}, usage=_USAGE)
_END = _framed(b"data: " + _LAST + b"\n\n") + _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_READY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class Worker(asyncio.Protocol):
    """One connection; a stream ends with it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._parser = httptools.HttpRequestParser(self)
        self._streaming: asyncio.Task[None] | None = None
        self._body = b""

    def connection_lost(self, error: Exception | None) -> None:
        if self._streaming is not None:
            self._streaming.cancel()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if not self._body:
            self._transport.write(_READY)
        elif not self._url.endswith(b"completions"):
            self._transport.write(_WHOLE)
        elif b'"stream": true' in self._body or b'"stream":true' in self._body:
            found = _WANTED.search(self._body)
            chunks, pace_ms = (int(found[1]), int(found[2])) if found else (64, 0)
            self._streaming = asyncio.create_task(self._stream(chunks, pace_ms / 1000))
        else:
            self._transport.write(_WHOLE)

    async def _stream(self, chunks: int, pace_s: float) -> None:
        """Each chunk is a write of its own, as an engine's step is."""
        self._transport.write(_HEAD)
        for number in range(chunks):
            await asyncio.sleep(pace_s)
            self._transport.write(_EVENTS[number % len(_EVENTS)])
        self._transport.write(_END)


async def _serve_alone(port_fd: int) -> None:
    sock, loop = socket.socket(fileno=port_fd), asyncio.get_running_loop()
    make = loop.create_unix_server if sock.family == socket.AF_UNIX else loop.create_server
    server = await make(Worker, sock=sock)
    await server.serve_forever()


async def _serve_manager(control_fd: int, spec: WorkerSpec) -> None:
    """The least that the manager asks of a worker."""
    stopping = asyncio.Event()

    async def done(message: control.Message, fd: int | None) -> control.Message:
        if message["verb"] == "stop":
            stopping.set()
        return {"weights_bytes": 1, "kv_bytes": 1, "released_bytes": 2, "total_s": 0.0, "load_s": 0.0, "ok": True}

    server = await asyncio.get_running_loop().create_unix_server(Worker, spec.socket_path)
    channel = control.Channel(socket.socket(fileno=control_fd))
    hello = {"event": "hello", "pid": os.getpid(), "baseline_bytes": 1, "weights_bytes": 1, "kv_bytes": 1}
    await channel.send({**hello, "image_bytes": 0, "working_bytes": 1})
    verbs: dict[str, control.Handler] = dict.fromkeys(
        ("promote", "demote", "canary", "status", "threads", "drop_image", "stop"), done
    )
    serving = asyncio.create_task(control.serve(channel, verbs, control.Asker(channel)))
    ended = asyncio.create_task(stopping.wait())
    await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
    serving.cancel()
    await asyncio.wait({serving})
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port-fd", type=int)
    parser.add_argument("--control-fd", type=int)
    parser.add_argument("--spec")
    arguments = parser.parse_args()
    prctl.die_with_parent()
    if arguments.port_fd is not None:
        uvloop.run(_serve_alone(arguments.port_fd))
    else:
        uvloop.run(_serve_manager(arguments.control_fd, WorkerSpec.from_json(arguments.spec)))


if __name__ == "__main__":
    main()
