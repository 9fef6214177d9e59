"""Ten thousand requests through reloads of the configuration and a drain: each is answered, and once."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from pathlib import Path

from starlette.types import Message, Scope

from mball.device.simulated import SimulatedDevice
from mball.memory.manager import Manager
from mball.memory.spec import ModelSpec
from mball.server.config import Config
from mball.server.gateway.app import create_app
from mball.server.gateway.live import Live
from mball.server.reload import Reloader
from tests.fake_worker import Knobs, command
from tests.memory.conftest import QUICK, Running, model

REQUESTS = 10_000
LAST = 300
"""So many are still to come when the server is told to shut down."""
CLIENTS = 32
GENERATIONS = ({"a": 2, "b": 2}, {"a": 3, "b": 2}, {"a": 3, "c": 2}, {"a": 4, "b": 3, "c": 2})
"""Models by name with the tokens that they answer with: added, changed and removed, one after another."""


def specs(generation: int) -> list[ModelSpec]:
    small = {"weights_bytes": 1 << 20, "kv_bytes": 1 << 20}
    return [model(name, Knobs(tokens=n, **small)) for name, n in GENERATIONS[generation].items()]


class Client:
    """Asks the gateway as a server would, without the cost of a socket; all that comes back is counted."""

    def __init__(self, name: str) -> None:
        self.body = json.dumps({"model": name, "messages": []}).encode()
        self.status: list[int] = []
        self.answer = b""
        self.ends = 0

    def scope(self) -> Scope:
        path = "/v1/chat/completions"
        common = {"type": "http", "http_version": "1.1", "asgi": {"version": "3.0"}, "scheme": "http", "root_path": ""}
        return {**common, "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": []}

    async def receive(self) -> Message:
        if self.body:
            body, self.body = self.body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        assert not self.ends
        if message["type"] == "http.response.start":
            self.status.append(message["status"])
        else:
            self.answer += message.get("body", b"")
            self.ends += not message.get("more_body")


async def test_each_is_answered_once(device: SimulatedDevice, runtime_dir: Path) -> None:
    manager = Manager(
        specs(0),
        [(device, device.total_bytes)],
        dram_bytes=0,
        runtime_dir=runtime_dir,
        command_for=lambda _: command(),
        settings=QUICK,
    )
    config = Config.model_validate({"models": ["/models/any"]})
    live, generation = Live(config), 0
    app = create_app(manager, config, live)
    reloader = Reloader(Path("none"), lambda: config, lambda _: specs(generation), live, manager)
    numbers, begun = itertools.count(), 0
    outcomes: list[tuple[str, int, int, Client]] = []

    async def asking() -> None:
        nonlocal begun
        while (number := next(numbers)) < REQUESTS:
            begun += 1
            name, first = "abc"[number % 3], generation
            client = Client(name)
            await app(client.scope(), client.receive, client.send)
            outcomes.append((name, first, generation, client))

    async def until(count: int) -> None:
        await Running(manager).until(lambda: begun > count, 300)

    await manager.start()
    try:
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(asking())
            for number in range(1, len(GENERATIONS)):
                await until((REQUESTS - LAST) * number // len(GENERATIONS))
                generation = number
                await reloader.reload()
            await until(REQUESTS - LAST)
            manager.begin_drain()
    finally:
        await manager.close(10)

    assert (begun, len(outcomes)) == (REQUESTS, REQUESTS)
    assert {(len(client.status), client.ends) for *_, client in outcomes} == {(1, 1)}
    found = Counter(client.status[0] for *_, client in outcomes)
    assert found.keys() == {200, 404, 503}
    assert 0 < found[503] <= LAST + CLIENTS
    for name, first, last, client in outcomes:
        meant = [GENERATIONS[i].get(name) for i in range(max(0, first - 1), last + 1)]
        if client.status == [200]:
            [choice] = json.loads(client.answer)["choices"]
            assert len(choice["message"]["content"].split()) in meant
        elif client.status == [404]:
            assert None in meant
