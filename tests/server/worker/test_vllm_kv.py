"""vLLM's KV in the swap store: real vLLM on the CPU, and the manager's side of the store in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp

from mball.memory.events import Events
from mball.memory.process import WorkerProcess
from mball.memory.settings import Settings
from mball.memory.spec import WorkerSpec
from mball.memory.swap_broker import SwapBroker
from mball.memory.swap_keeper import SwapKeeper
from mball.server.engine_path import search_path
from mball.swap.disk import aligned
from mball.swap.service import SwapService
from mball.units import KiB, MiB
from tests.demo_models import demo_model
from tests.swap.stores import settings
from tests.vllm_python import vllm_python

BLOCKS = 6
PROMPT = " ".join(f"On day {day} it rained and the river rose by {day * 7 % 13} inches." for day in range(1, 50))
DEADLINE_S = 60.0


@dataclass
class Bed:
    worker: WorkerProcess
    service: SwapService
    epoch: int = 0

    async def ask(self, salt: str | None = None) -> tuple[str, int]:
        """A greedy answer, and how many tokens of the prompt were not computed."""
        body = {"model": "smol", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
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
async def bed(folder: Path, spec: WorkerSpec) -> AsyncIterator[Bed]:
    """A worker and a store, each opened anew."""
    keeper = SwapKeeper(settings(folder / "store", size_bytes=96 * MiB, slot_bytes=512 * KiB), Events())
    assert await keeper.open()
    assert keeper.service is not None
    broker = SwapBroker(keeper, 30.0)
    worker, _ = await WorkerProcess.start(
        [str(vllm_python()), "-m", "mball.server.worker.vllm_process"],
        spec,
        extra_environment={"PYTHONPATH": search_path(folder / "path")},
        log=folder / "vllm.log",
        settings=Settings(start_s=400),
        answer=broker.answers("w"),
    )
    try:
        await broker.introduce(worker)
        yield Bed(worker, keeper.service)
    finally:
        await worker.stop(Settings(verb_s=20))
        broker.gone("w")
        await keeper.close()


def damage_all(service: SwapService) -> None:
    """One byte of each block."""
    store, page = service.store, aligned(4 * KiB)
    for entry in store._book.entries.values():
        at = store.layout.slot_at(entry.place.extents[0].first) + 8 * KiB
        store.slots.disk.read([page], at)
        page[100] ^= 1
        store.slots.disk.write([page], at)


async def test_kv_goes_to_the_store_and_comes_back(tmp_path: Path) -> None:
    spec = WorkerSpec(
        "smol",
        str(demo_model("smollm2-135m")),
        socket_path=str(tmp_path / "1.sock"),
        max_model_len=1024,
        max_num_seqs=2,
        kv_cache_bytes=96 * MiB,
        kv_arena_bytes=64 * MiB,
        engine="vllm",
        engine_args={"enforce_eager": True, "enable_prompt_tokens_details": True},
    )
    async with bed(tmp_path, spec) as first:
        assert (tmp_path / "1.kv").stat().st_mode & 0o077 == 0
        text, cached = await first.ask()
        assert cached == 0
        counts = await first.until("stored_blocks", BLOCKS)
        assert not counts.get("failed_loads")
        assert not list(Path("/dev/shm").glob("vllm_offload_mball-*"))

    async with bed(tmp_path, replace(spec, socket_path=str(tmp_path / "2.sock"))) as second:
        # Worker and manager are others now, and the store is what it was.
        assert await second.ask() == (text, BLOCKS * 128)
        counts = await second.counts()
        assert counts["loaded_blocks"] == BLOCKS
        assert not counts.get("failed_loads")

        # Another tenant's are others, though it asks the same.
        found = counts["found_blocks"]
        assert await second.ask("another tenant") == (text, 0)
        assert (await second.counts())["found_blocks"] == found
        await second.until("stored_blocks", BLOCKS)

        await second.forgets()
        assert await second.ask("another tenant") == (text, BLOCKS * 128)

        # A damaged block is no token's.
        await second.forgets()
        damage_all(second.service)
        assert await second.ask() == (text, 0)
        assert (await second.counts())["failed_loads"] >= 1
        assert second.service.store.counters["misses:checksum"] >= 1

        # A store that takes nothing more, and one that is gone.
        second.service.store._read_only = "for a test"
        await second.forgets()
        assert (await second.ask("a third"))[0] == text
        await second.until("refused_blocks", 1)
        await second.service.close(10)
        await second.forgets()
        assert (await second.ask("a fourth"))[0] == text
