"""Blocks leave a pool, and what comes back is what left: through the arena, through a store, whatever fails."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from mball.errors import SwapMiss
from mball.swap.block_store import BlockStore
from mball.swap.kv_disk import Loading
from mball.swap.kv_local import LocalBlocks
from mball.swap.kv_shelf import Held
from mball.swap.kv_tier import KVTier
from mball.swap.place import Place, digest
from mball.swap.policy import Worth
from mball.swap.store import SwapStore, open_store
from mball.units import KiB, MiB
from tests.swap.stores import settings

BLOCK = 6 * KiB + 512
"""Neither whole pages nor whole blocks of a disk."""
TOKENS = 4
MODEL = digest("a model")
DEADLINE_S = 30.0
NOW_S = 1e6

TierFor = Callable[..., KVTier]


class Bed:
    """A tier and a pool of so many blocks whose bytes tell their key."""

    def __init__(self, tier: KVTier, blocks: int = 16) -> None:
        self.tier = tier
        self.pool = torch.zeros((blocks, BLOCK), dtype=torch.uint8)
        tier.attach(self.pool)

    def leave(self, keys: Sequence[bytes], heat: float = 1.0) -> None:
        """A chain that is in the pool from its block 0 on is evicted."""
        gone = []
        for number, key in enumerate(keys):
            self.pool[number] = content(key)
            parent = keys[number - 1] if number else None
            gone.append(Held(key, number, parent, number, Worth(1.0, heat, NOW_S)))
        self.tier.spill(gone)
        self.tier.order(range(len(keys)))
        self.pool.zero_()

    def back(self, keys: Sequence[bytes]) -> int:
        """How many came back; each is what left."""
        held = self.tier.hold(keys, 0)
        if held:
            self.tier.restore(held, range(len(held)))
        for number, key in enumerate(keys[: len(held)]):
            assert torch.equal(self.pool[number], content(key)), "another block's bytes came back"
        self.pool.zero_()
        return len(held)

    def load(self, keys: Sequence[bytes]) -> Loading | None:
        """Waits for it."""
        loading = self.tier.begin(keys, None, 0)
        if loading is not None:
            waited = threading.Event()
            for _ in range(600):
                if loading.done:
                    return loading
                waited.wait(0.05)
            raise AssertionError("a load did not end")
        return None


def content(key: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(random.Random(key).randbytes(BLOCK)), dtype=torch.uint8)


def chain(name: str, count: int) -> list[bytes]:
    return [digest(name, str(number)) for number in range(count)]


@pytest.fixture
def tier_for() -> Iterator[TierFor]:
    opened: list[KVTier] = []

    def make(blocks: int = 64) -> KVTier:
        tier = KVTier(MODEL, block_tokens=TOKENS, block_bytes=BLOCK, arena_bytes=blocks * 8 * KiB, clock=lambda: NOW_S)
        opened.append(tier)
        return tier

    yield make
    for tier in opened:
        assert tier.close(DEADLINE_S)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SwapStore]:
    with_blocks = open_store(settings(tmp_path / "store", size_bytes=4 * MiB, slot_bytes=8 * KiB))
    yield with_blocks
    with_blocks.close()


def stored(tier: KVTier, store: BlockStore, keys: Sequence[bytes]) -> None:
    """A chain used twice is in the store, and no longer in the arena."""
    bed = Bed(tier)
    tier.use_store(store)
    tier.touch(keys)
    tier.touch(keys)
    bed.leave(keys)
    assert tier.use_store(None, DEADLINE_S)
    tier.use_store(store)
    arena = tier._room.arena
    for held in list(arena.shelf):
        arena.drop(held)


def test_what_left_comes_back_and_the_least_valuable_gave_way(tier_for: TierFor) -> None:
    bed = Bed(tier_for(blocks=6))
    bed.leave(chain("hot", 4), heat=3.0)
    bed.leave(chain("cold", 4), heat=1.0)
    assert bed.back(chain("hot", 4)) == 4
    assert bed.back(chain("cold", 4)) == 2, "of a chain its first blocks stay"
    bed.leave(chain("hotter", 5), heat=9.0)
    assert bed.back(chain("cold", 4)) == 0
    assert bed.back(chain("hotter", 5)) == 5


def test_where_computing_is_faster_nothing_is_copied(tier_for: TierFor) -> None:
    bed = Bed(tier_for())
    bed.leave(chain("a", 4))
    bed.tier.gate.loaded("dram", BLOCK, 1.0, bed.tier._room.clock())
    bed.tier.gate.computed(0, TOKENS, 1e-6)
    assert bed.back(chain("a", 4)) == 0
    bed.leave(chain("b", 4))
    counts = bed.tier.counts()
    assert (counts["dram:refused"], counts["not_spilled_blocks"], counts["spilled_blocks"]) == (1, 4, 4)


def test_at_the_second_use_blocks_go_to_the_store_and_come_back_in_another_process_s_tier(
    tier_for: TierFor, store: SwapStore
) -> None:
    first, keys = tier_for(), chain("a", 12)
    bed = Bed(first)
    first.use_store(LocalBlocks(store, "first"))
    first.touch(keys)
    bed.leave(keys)
    assert first.use_store(None, DEADLINE_S)
    assert store.status()["blocks"] == 0, "at the first use they stay in memory"
    stored(first, LocalBlocks(store, "first"), keys[:0])
    stored(first, LocalBlocks(store, "first"), keys)
    assert store.status()["blocks"] == 12
    assert first.gate.reload_s("store", BLOCK) is None, "another store may be slower"

    second = Bed(tier_for())
    second.tier.use_store(LocalBlocks(store, "second"))
    assert second.load(keys) is not None
    assert second.back(keys) == 12
    assert second.tier.gate.reload_s("store", BLOCK) is not None
    assert second.tier.begin(keys, None, 0) is None, "they are in the arena by now"
    other = KVTier(digest("another model"), block_tokens=TOKENS, block_bytes=BLOCK, arena_bytes=MiB)
    other.use_store(LocalBlocks(store, "other"))
    assert Bed(other).load(keys) is not None
    assert other.counts()["arena_blocks"] == 0, "another model's blocks"
    assert other.close(DEADLINE_S)


def test_the_rate_of_a_store_is_known_before_anyone_waits_for_it(tier_for: TierFor, store: SwapStore) -> None:
    bed, keys = Bed(tier_for()), chain("a", 8)
    bed.tier.use_store(LocalBlocks(store, "w"))
    bed.tier.touch(keys)
    bed.tier.touch(keys)
    bed.leave(keys)
    lane = bed.tier._disk._writes
    assert lane is not None
    assert lane.idle(DEADLINE_S)
    assert bed.tier.gate.reload_s("store", BLOCK) is not None
    assert bed.tier.counts()["arena_blocks"] == 8


def test_a_damaged_block_ends_the_chain_there(tier_for: TierFor, store: SwapStore, tmp_path: Path) -> None:
    tier, keys = tier_for(), chain("a", 10)
    stored(tier, LocalBlocks(store, "w"), keys)
    place = store.find(keys[6], MODEL)
    with (tmp_path / "store").open("r+b") as file:
        file.seek(store.layout.slot_at(place.extents[0].first) + 4096 + 100)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    bed = Bed(tier)
    assert bed.load(keys) is not None
    assert bed.back(keys) == 6
    assert tier.counts()["failed_loads"] == 1
    assert not store.has(keys[6], MODEL)


def test_slots_that_are_another_s_by_now_are_a_miss(tier_for: TierFor, store: SwapStore) -> None:
    tier, keys = tier_for(), chain("a", 3)

    class Mixed(LocalBlocks):
        """Evicted, and their slots given to another between finding and reading."""

        def find(self, keys: Sequence[bytes], model: bytes) -> list[Place]:
            found = super().find(keys, model)
            swapped = [found[1].extents, found[0].extents, found[2].extents]
            return [
                Place(place.key, place.model, place.generation, place.nbytes, extents)
                for place, extents in zip(found, swapped, strict=True)
            ]

    stored(tier, Mixed(store, "w"), keys)
    bed = Bed(tier)
    assert bed.load(keys) is not None
    assert bed.back(keys) == 0
    assert tier.counts()["failed_loads"] == 2


def test_a_full_and_a_read_only_store_refuse_and_nothing_else_happens(tier_for: TierFor, tmp_path: Path) -> None:
    small = open_store(settings(tmp_path / "small", size_bytes=MiB, slot_bytes=8 * KiB, daily_write_bytes=64 * KiB))
    tier = tier_for()
    stored(tier, LocalBlocks(small, "w"), chain("a", 12))
    refused = tier.counts()["refused_blocks"]
    assert 0 < refused == 12 - small.status()["blocks"]
    small._fail("planted")
    stored(tier, LocalBlocks(small, "w"), chain("b", 4))
    assert tier.counts()["refused_blocks"] == refused + 4
    bed = Bed(tier)
    bed.leave(chain("c", 3))
    assert bed.back(chain("c", 3)) == 3
    small.close()


def test_what_fails_in_a_store_is_a_miss(tier_for: TierFor, store: SwapStore) -> None:
    class Failing(LocalBlocks):
        def find(self, keys: Sequence[bytes], model: bytes) -> list[Place]:
            raise SwapMiss("closed", "its manager is gone")

    bed = Bed(tier_for())
    bed.tier.use_store(Failing(store, "w"))
    loading = bed.load(chain("a", 3))
    assert loading is not None
    assert bed.tier.counts()["failed_loads"] == 1


def test_a_slow_store_costs_one_piece(tier_for: TierFor, store: SwapStore) -> None:
    tier, keys = tier_for(), chain("a", 12)
    stored(tier, LocalBlocks(store, "w"), keys)
    tier._room.clock = lambda: 2e9
    tier.gate.computed(0, TOKENS, 1e-9)
    bed = Bed(tier)
    assert bed.load(keys) is not None
    assert bed.tier.counts()["loaded_blocks"] <= 12
    assert tier.gate.reload_s("store", BLOCK) is not None
    assert tier.begin(chain("b", 12), None, 0) is None, "it is known to be slower"
    assert tier.counts()["store:refused"] >= 1


def test_many_leave_and_come_back_at_once_and_none_is_another(tier_for: TierFor, store: SwapStore) -> None:
    """Slots and places are used again all the time: by the thread that steps, by one that reads and one that writes."""
    tier = tier_for(blocks=24)
    tier.gate.forced = True
    tier.use_store(LocalBlocks(store, "w"))
    bed, chosen = Bed(tier), random.Random(1)
    chains = [chain(name, 6) for name in "abcdefghijkl"]
    came = 0
    loadings: list[Loading] = []
    for _ in range(1500):
        keys = chosen.choice(chains)
        match chosen.randrange(3):
            case 0:
                tier.touch(keys)
                bed.leave(keys[: chosen.randrange(1, 7)], heat=chosen.uniform(0.5, 2.0))
            case 1:
                came += bed.back(keys)
            case _:
                loading = tier.begin(keys, None, 0)
                if loading is not None:
                    loadings.append(loading)
    assert tier.use_store(None, DEADLINE_S)
    assert all(loading.done for loading in loadings)
    for keys in chains:
        came += bed.back(keys)
    counts = tier.counts()
    assert came > 100
    assert counts["loaded_blocks"] > 10
    assert counts.get("failed_loads", 0) == 0
    arena = tier._room.arena
    assert all(held.pins == 0 for held in arena.shelf)
    assert len(arena.shelf) + len(arena._free) == 24, "a slot was lost"


def test_a_pool_that_goes_leaves_prefixes_first_as_far_as_there_is_time(tier_for: TierFor) -> None:
    tier = tier_for()
    bed, keys = Bed(tier, blocks=200), chain("a", 130)
    held = [Held(key, n, keys[n - 1] if n else None, n, Worth(1.0, 1.0, NOW_S)) for n, key in enumerate(keys)]
    for entry in held:
        bed.pool[entry.place] = content(entry.key)
    tier.retire(held[::-1], 60.0)
    assert tier.hold(keys, 0) == [], "there is no pool"
    again = Bed(tier, blocks=200)
    assert again.back(keys) == 64, "as many as the arena has slots for"
    tier.retire(held, -1.0)
