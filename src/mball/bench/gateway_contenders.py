"""One contender of `mball bench gateway` in its turn: rates, added latency, first bytes, memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop

from mball.bench import gateway_servers as servers
from mball.bench.contenders import Cannot, in_turn
from mball.bench.gateway_client import Answer, Connection, asks, closed_loop, open_loop
from mball.bench.gateway_servers import Server
from mball.bench.gateway_worker import ANSWER, word
from mball.units import KiB, MiB

CONNECTIONS = (1, 32)
_WARM = 200
_PACE_MS = 10
_PACED_CHUNKS = 8
_SPARE = 1.2
"""At a rate that a server can hardly answer, or can't, its queue alone is measured."""


@dataclass(frozen=True, slots=True)
class Spec:
    """`seconds` of each rate and window; `windows` of the gateway, each beside one of the worker directly; `rate`:
    requests a second in a window; `streams` that are open at once; `growth`: requests over which memory is seen to grow
    (0: not)."""

    contender: str
    venv: str = ""
    seconds: float = 4.0
    windows: int = 5
    rate: float = 200.0
    paced_rate: float = 50.0
    streams: int = 1000
    growth: int = 20_000

    def command(self) -> list[str]:
        return [sys.executable, "-m", "mball.bench.gateway_contenders", json.dumps(asdict(self))]


def _turn(spec: Spec) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(servers.direct())
        server, facts = worker, {}
        if spec.contender == servers.MBALL:
            server = stack.enter_context(servers.mball())
        elif spec.contender == servers.BARE:
            server = stack.enter_context(servers.bare())
        elif spec.contender == servers.LITELLM:
            facts = {"version": servers.install_litellm(Path(spec.venv))}
            server = stack.enter_context(servers.litellm(Path(spec.venv), worker.port))
        return {**uvloop.run(_measured(spec, server, worker)), "facts": facts}


async def _measured(spec: Spec, server: Server, worker: Server) -> dict[str, Any]:
    measures: dict[str, Any] = {"digests": await _said(server)}
    await closed_loop(server.port, server.key, asks(stream=False), 4, seconds=0, least=_WARM)
    for kind, body in (("json", asks(stream=False)), ("stream", asks(stream=True))):
        for connections in CONNECTIONS:
            rate = await closed_loop(server.port, server.key, body, connections, seconds=spec.seconds)
            measures[f"{kind}_{connections}_rps"] = rate
    if server is not worker:
        json_body, paced = asks(stream=False), asks(stream=True, chunks=_PACED_CHUNKS, pace_ms=_PACE_MS)
        if measures["json_32_rps"] > _SPARE * spec.rate:
            measures |= await _added("added", spec, spec.rate, json_body, server, worker, lambda answer: answer.whole_s)
        if measures["stream_32_rps"] > _SPARE * spec.paced_rate:
            first = await _added("first", spec, spec.paced_rate, paced, server, worker, lambda answer: answer.first_s)
            measures |= first
        measures |= await _memory(spec, server)
    return measures


async def _said(server: Server) -> dict[str, str]:
    """The texts of both kinds of answers."""
    connection = await Connection.open(server.port, server.key)
    whole = await connection.ask(asks(stream=False))
    stream = await connection.ask(asks(stream=True))
    connection.close()
    events = [line[6:] for line in bytes(stream.body).split(b"\n") if line.startswith(b"data: {")]
    deltas = [json.loads(event)["choices"] for event in events]
    return {
        "json": json.loads(bytes(whole.body))["choices"][0]["message"]["content"],
        "stream": "".join(choices[0]["delta"].get("content") or "" for choices in deltas if choices),
    }


def reference() -> dict[str, str]:
    return {"json": ANSWER, "stream": "".join(word(number) for number in range(64))}


async def _added(
    name: str,
    spec: Spec,
    rate: float,
    body: bytes,
    server: Server,
    worker: Server,
    measure: Callable[[Answer], float],
) -> dict[str, float]:
    """Milliseconds above the worker called directly in a window next to it; the median over the windows."""
    found: dict[str, list[float]] = {"p50": [], "p99": []}
    for number in range(spec.windows):
        times = {}
        for one in (server, worker) if number % 2 else (worker, server):
            times[one.port] = await open_loop(one.port, one.key, body, rate, spec.seconds, measure)
        for which, share in (("p50", 0.50), ("p99", 0.99)):
            mine, direct = (_at(times[one.port], share) for one in (server, worker))
            found[which].append((mine - direct) * 1000)
    return {f"{name}_{which}_ms": statistics.median(values) for which, values in found.items()}


def _at(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


async def _memory(spec: Spec, server: Server) -> dict[str, float]:
    """What each open stream takes, and what stays of many requests."""
    process = psutil.Process(server.pid)
    measures = {}
    if spec.streams:
        body = asks(stream=True, chunks=1000, pace_ms=1000)
        before = process.memory_info().rss
        async with _open_streams(server, body, spec.streams):
            measures["stream_kib"] = (process.memory_info().rss - before) / KiB / spec.streams
    if spec.growth:
        body = asks(stream=False)
        await closed_loop(server.port, server.key, body, 8, seconds=0, least=spec.growth // 2)
        before = process.memory_info().rss
        await closed_loop(server.port, server.key, body, 8, seconds=0, least=spec.growth)
        measures["growth_mib"] = (process.memory_info().rss - before) / MiB
    return measures


@contextlib.asynccontextmanager
async def _open_streams(server: Server, body: bytes, count: int) -> Any:
    """Each has begun to come."""
    opened = [await Connection.open(server.port, server.key) for _ in range(count)]
    try:
        for connection in opened:
            connection.begin(body)
        waits: list[Awaitable[Any]] = [connection.first.wait() for connection in opened]
        async with asyncio.timeout(120):
            await asyncio.gather(*waits)
        yield
    except TimeoutError:
        raise Cannot(f"{count} streams did not all begin within 120 s") from None
    finally:
        for connection in opened:
            connection.close()


def main(argument: str) -> dict[str, Any]:
    spec = Spec(**json.loads(argument))
    return in_turn(lambda _: _turn(spec))


if __name__ == "__main__":
    # This file as a module, too: its exceptions must be those that the other modules raise.
    from mball.bench import gateway_contenders

    sys.stdout.write(json.dumps(gateway_contenders.main(sys.argv[1])) + "\n")
