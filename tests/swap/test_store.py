from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from mball.device import memfd
from mball.errors import SwapMiss, SwapRefused
from mball.swap.disk import aligned
from mball.swap.place import digest
from mball.swap.slots import Slots
from mball.swap.store import open_store
from mball.units import MiB
from tests.swap.stores import MODEL, SIZE, SLOT, block, content, get, image, open_at, settings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "swap"


def filled(name: str, nbytes: int) -> int:
    fd = memfd.create(name, nbytes)
    os.pwrite(fd, content(name, nbytes), 0)
    memfd.seal(fd)
    return fd


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, SLOT, SLOT + 1, 5 * SLOT, 37 * SLOT - 777])
def test_an_image_comes_back_now_and_after_a_restart(path: Path, nbytes: int) -> None:
    fd = filled("a", nbytes)
    want = image("a", nbytes)
    store = open_at(path)
    assert store.put(want, fd) > nbytes
    assert get(store, want) == content("a", nbytes)
    assert store.close()
    store = open_at(path)
    assert get(store, want) == content("a", nbytes)
    again = memfd.create("again", nbytes)
    assert store.get(want.key, MODEL, again) == nbytes
    assert os.pread(again, nbytes, 0) == content("a", nbytes)
    store.close()
    for one in (fd, again):
        os.close(one)


def test_the_second_demotion_of_an_image_writes_nothing(path: Path) -> None:
    store = open_at(path)
    want = image("a", 10 * SLOT)
    fd = filled("a", want.nbytes)
    store.put(want, fd)
    written = store.counters["written_bytes"]
    assert store.put(want, fd) == 0
    store.close()
    store = open_at(path)
    assert store.put(want, fd) == 0
    assert store.counters["written_bytes"] == 0
    assert written > want.nbytes
    store.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, SLOT), (SLOT, 2 * SLOT), (1, 10), (SLOT - 1, 2), (4096, 3 * SLOT), (5 * SLOT - 3, 10)]
)
@pytest.mark.parametrize("shift", [0, 1])
def test_any_range_into_any_memory(path: Path, offset: int, nbytes: int, shift: int) -> None:
    store = open_at(path)
    want = image("a", 5 * SLOT + 7)
    whole = content("a", want.nbytes)
    unaligned = aligned(want.nbytes + 1)
    unaligned[1:] = whole
    store.put(want, unaligned[1:])
    memory = aligned(nbytes + 2)
    assert store.get(want.key, MODEL, memory[shift:], offset=offset, nbytes=nbytes) == nbytes
    assert memory[shift : shift + nbytes] == whole[offset : offset + nbytes]
    assert not any(memory[shift + nbytes :]), "nothing beyond is touched"
    with pytest.raises(ValueError, match="of an entry of"):
        store.get(want.key, MODEL, memory, offset=want.nbytes, nbytes=1)
    store.close()


def test_another_models_key_is_a_miss(path: Path) -> None:
    store = open_at(path)
    want = block("a")
    store.put(want, content("a", SLOT))
    with pytest.raises(SwapMiss, match="absent"):
        store.get(want.key, digest("another"), aligned(SLOT))
    assert store.counters["misses:absent"] == 1
    store.close()


def test_an_image_is_spread_over_the_gaps(path: Path) -> None:
    store = open_at(path)
    names = [str(number) for number in range(store.layout.slots)]
    for name in names:
        store.put(block(name), content(name, SLOT))
    for name in names[::2]:
        store.drop(block(name).key)
    store.flush()
    want = image("a", 40 * SLOT)
    store.put(want, content("a", want.nbytes))
    assert len(store.find(want.key, MODEL).extents) == 40
    assert get(store, want) == content("a", want.nbytes)
    assert all(get(store, block(name)) == content(name, SLOT) for name in names[1::2])
    store.close()


def test_a_full_store_gives_way_to_what_is_worth_more_alone(path: Path) -> None:
    store = open_at(path)
    for number in range(store.layout.slots):
        store.put(block(str(number), saved_s=5.0), content(str(number), SLOT))
    with pytest.raises(SwapRefused, match="worth more"):
        store.put(block("cheap", saved_s=0.001), content("cheap", SLOT))
    assert store.counters["refused:full"] == 1
    store.put(block("dear", saved_s=500.0), content("dear", SLOT))
    assert get(store, block("dear", saved_s=500.0)) == content("dear", SLOT)
    assert 1 <= store.counters["evictions"] <= 3
    store.close()


def test_more_than_the_store_has_in_all(path: Path) -> None:
    store = open_at(path)
    with pytest.raises(SwapRefused, match="in all"):
        store.lease("w", image("a", SIZE))
    store.close()


def test_a_workers_life(path: Path) -> None:
    store = open_at(path)
    slots = Slots.from_wire(store.worker_fd(), store.slots.to_wire())
    first, second = store.lease("w", block("a", 3 * SLOT)), store.lease("w", block("b"))
    assert first is not None
    assert second is not None
    slots.write(first.place, content("a", 3 * SLOT))
    assert not store.has(first.place.key, MODEL), "not before it is committed"
    with pytest.raises(SwapRefused, match="busy"):
        store.lease("another", block("a", 3 * SLOT))
    assert store.commit("another", [first.id]) == 0
    assert store.commit("w", [first.id]) == 1
    place = type(first.place).from_wire(store.find(first.place.key, MODEL).to_wire())
    memory = aligned(2 * SLOT)
    slots.read(place, memory, SLOT)
    assert memory == content("a", 3 * SLOT)[SLOT:]
    assert store.release("w") == 1, "a dead worker's lease returns"
    assert store.commit("w", [second.id]) == 0
    assert store.status()["leased_slots"] == 0
    slots.disk.close()
    store.close()


def test_a_place_that_is_anothers_by_now_is_a_miss_and_damages_nothing(path: Path) -> None:
    store = open_at(path)
    store.put(block("a"), content("a", SLOT))
    place = store.find(block("a").key, MODEL)
    store.drop(place.key)
    store.flush()
    for number in range(store.layout.slots):
        store.put(block(str(number)), content(str(number), SLOT))
    with pytest.raises(SwapMiss) as miss:
        store.slots.read(place, aligned(SLOT))
    assert miss.value.reason == "stale"
    store.missed(place, miss.value)
    assert store.counters["misses:absent"] == 1
    assert len(store.status()["counters"]) > 0
    assert get(store, block("0")) == content("0", SLOT)
    store.close()


def test_ephemeral_leaves_nothing(tmp_path: Path) -> None:
    store = open_at(tmp_path, ephemeral=True)
    store.put(image("a", 5 * SLOT), content("a", 5 * SLOT))
    assert get(store, image("a", 5 * SLOT)) == content("a", 5 * SLOT)
    assert list(tmp_path.iterdir()) == []
    slots = Slots.from_wire(store.worker_fd(), store.slots.to_wire())
    slots.read(store.find(image("a", 1).key, MODEL), aligned(5 * SLOT))
    slots.disk.close()
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_day_of_writes_in_virtual_time_stays_under_the_budget_across_restarts(path: Path) -> None:
    limit, now, by_day = 3 * MiB, [86400.0 * 20000], dict[int, int]()
    refused: list[str] = []
    store = open_store(settings(path, daily_write_bytes=limit), clock=lambda: now[0])
    for number in range(16 * 60):
        now[0] += 60.0
        before = store.counters["written_bytes"]
        try:
            store.put(block(str(number), saved_s=1.0 + number), content("x", SLOT))
        except SwapRefused as error:
            refused.append(error.reason)
        day = int(now[0] // 86400)
        by_day[day] = by_day.get(day, 0) + store.counters["written_bytes"] - before
        if number % 100 == 99:
            before = store.counters["written_bytes"]
            store.close()
            by_day[day] += store.counters["written_bytes"] - before
            store = open_store(settings(path, daily_write_bytes=limit), clock=lambda: now[0])
    store.close()
    assert len(refused) > 100
    assert set(refused) == {"budget"}
    assert all(written <= limit for written in by_day.values())
    assert max(by_day.values()) > 0.8 * limit, "and it is used"


def test_many_threads_at_once(path: Path) -> None:
    """Blocks of several threads, evicting each other: what is read is what was written, or a miss."""
    store = open_at(path, threads=4)
    wrong: list[str] = []

    def work(seed: int) -> None:
        for number in range(60):
            name = f"{seed} {number}"
            want = block(name, 2 * SLOT, saved_s=1.0 + number)
            try:
                store.put(want, content(name, 2 * SLOT))
                if get(store, want) != content(name, 2 * SLOT):
                    wrong.append(name)
            except (SwapMiss, SwapRefused) as error:
                if error.reason not in ("absent", "busy", "full"):
                    wrong.append(f"{name}: {error}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
    assert store.counters["evictions"] > 0
    status = store.status()
    used = status["images"] + 2 * status["blocks"]
    assert status["free_slots"] + used == status["slots"]
    assert store.close()
    store = open_at(path)
    assert store.counters.all() == {}
    store.close()
