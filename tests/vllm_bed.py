"""A vLLM worker, and the manager's side of the swap store in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from mball.memory.control import Message
from mball.memory.events import Events
from mball.memory.process import WorkerProcess
from mball.memory.settings import Settings
from mball.memory.spec import WorkerSpec
from mball.memory.swap_broker import SwapBroker
from mball.memory.swap_keeper import SwapKeeper
from mball.server.engine_path import search_path
from mball.swap.disk import aligned
from mball.swap.service import SwapService
from mball.units import KiB
from tests.swap.stores import settings
from tests.vllm_python import vllm_python

DEADLINE_S = 60.0


@dataclass
class Bed:
    """`answering` cleared: the manager's side answers no more."""

    worker: WorkerProcess
    service: SwapService
    answering: asyncio.Event
    epoch: int = 0

    async def ask(self, prompt: str | list[int], salt: str | None = None) -> tuple[str, int]:
        """A greedy answer, and how many tokens of the prompt were not computed."""
        body: dict[str, Any] = {"model": self.worker.spec.model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        if salt is not None:
            body["cache_salt"] = salt
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(self.worker.spec.socket_path)) as session,
            session.post("http://worker/v1/completions", json=body) as answer,
        ):
            assert answer.status == 200, await answer.text()
            said = await answer.json()
        details = said["usage"].get("prompt_tokens_details") or {}
        return said["choices"][0]["text"], details.get("cached_tokens") or 0

    async def counts(self) -> dict[str, int]:
        return (await self.worker.call("status", deadline_s=DEADLINE_S))["kv"]

    async def until(self, name: str, count: int) -> dict[str, int]:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if (counts := await self.counts()).get(name, 0) >= count:
                    return counts
                await asyncio.sleep(0.1)

    async def forgets(self) -> None:
        """Asleep and awake again: neither the device nor the memory before the store has a block left."""
        self.epoch += 1
        await self.worker.call("demote", deadline_s=DEADLINE_S, epoch=self.epoch)
        await self.worker.call("promote", deadline_s=DEADLINE_S, epoch=self.epoch)


@asynccontextmanager
async def bed(folder: Path, spec: WorkerSpec, size_bytes: int) -> AsyncIterator[Bed]:
    """A worker and a store, each opened anew."""
    keeper = SwapKeeper(settings(folder / "store", size_bytes=size_bytes, slot_bytes=512 * KiB), Events())
    assert await keeper.open()
    assert keeper.service is not None
    broker = SwapBroker(keeper, 30.0)
    answers, answering = broker.answers("w"), asyncio.Event()
    answering.set()

    async def answer(message: Message) -> Message:
        await answering.wait()
        return await answers(message)

    try:
        worker, _ = await WorkerProcess.start(
            [str(vllm_python()), "-m", "mball.server.worker.vllm_process"],
            spec,
            extra_environment={"PYTHONPATH": search_path(folder / "path")},
            log=folder / "vllm.log",
            settings=Settings(start_s=400),
            answer=answer,
        )
        try:
            await broker.introduce(worker)
            yield Bed(worker, keeper.service, answering)
        finally:
            await worker.stop(Settings(verb_s=20))
            broker.gone("w")
    finally:
        await keeper.close()


def damage_all(service: SwapService) -> None:
    """One byte of each block."""
    store, page = service.store, aligned(4 * KiB)
    for entry in store._book.entries.values():
        at = store.layout.slot_at(entry.place.extents[0].first) + 8 * KiB
        store.slots.disk.read([page], at)
        page[100] ^= 1
        store.slots.disk.write([page], at)
