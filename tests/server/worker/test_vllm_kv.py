"""vLLM's KV in the swap store: real vLLM on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mball.errors import WorkerNotStarted
from mball.memory.spec import WorkerSpec
from mball.units import MiB
from tests.demo_models import demo_model
from tests.vllm_bed import bed, damage_all

BLOCKS = 6
STORE_BYTES = 96 * MiB
PROMPT = " ".join(f"On day {day} it rained and the river rose by {day * 7 % 13} inches." for day in range(1, 50))


def spec_in(folder: Path) -> WorkerSpec:
    return WorkerSpec(
        "smol",
        str(demo_model("smollm2-135m")),
        socket_path=str(folder / "1.sock"),
        max_model_len=1024,
        max_num_seqs=2,
        kv_cache_bytes=96 * MiB,
        kv_arena_bytes=64 * MiB,
        engine="vllm",
        engine_args={"enforce_eager": True},
    )


async def test_more_than_the_rows_have_room_for_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(WorkerNotStarted, match=r"/dev/shm.*--shm-size"):
        async with bed(tmp_path, replace(spec_in(tmp_path), kv_arena_bytes=1 << 50), STORE_BYTES):
            raise AssertionError("it started")


async def test_kv_goes_to_the_store_and_comes_back(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    async with bed(tmp_path, spec, STORE_BYTES) as first:
        assert (tmp_path / "1.kv").stat().st_mode & 0o077 == 0
        text, cached = await first.ask(PROMPT)
        assert cached == 0
        counts = await first.until("stored_blocks", BLOCKS)
        assert not counts.get("failed_loads")
        assert not list(Path("/dev/shm").glob("vllm_offload_mball-*"))

    async with bed(tmp_path, replace(spec, socket_path=str(tmp_path / "2.sock")), STORE_BYTES) as second:
        # Worker and manager are others now, and the store is what it was.
        assert await second.ask(PROMPT) == (text, BLOCKS * 128)
        counts = await second.counts()
        assert counts["loaded_blocks"] == BLOCKS
        assert not counts.get("failed_loads")

        # Another tenant's are others, though it asks the same.
        found = counts["found_blocks"]
        assert await second.ask(PROMPT, "another tenant") == (text, 0)
        assert (await second.counts())["found_blocks"] == found
        await second.until("stored_blocks", BLOCKS)

        await second.forgets()
        assert await second.ask(PROMPT, "another tenant") == (text, BLOCKS * 128)

        # A damaged block is no token's.
        await second.forgets()
        damage_all(second.service)
        assert await second.ask(PROMPT) == (text, 0)
        assert (await second.counts())["failed_loads"] >= 1
        assert second.service.store.counters["misses:checksum"] >= 1

        # A store that takes nothing more, and one that is gone.
        second.service.store._read_only = "for a test"
        await second.forgets()
        assert (await second.ask(PROMPT, "a third"))[0] == text
        await second.until("refused_blocks", 1)
        await second.service.close(10)
        await second.forgets()
        assert (await second.ask(PROMPT, "a fourth"))[0] == text

        # A manager that does not answer.
        second.answering.clear()
        assert (await second.ask(PROMPT, "a fifth"))[0] == text
        assert (await second.counts())["late_lookups"] >= 1
