"""vLLM's allocations put to sleep and woken: an allocator like its own, of this process's memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from mball.device import memfd
from mball.device.mapping import Mapping as Pages
from mball.loader.vllm_compat import Cumem
from mball.memory.vllm_sleeper import Sleeper
from mball.units import MiB
from tests.memory.test_engine_image import Memory


@dataclass
class Allocation:
    handle: tuple[int, int, int, int]
    tag: str
    is_asleep: bool = False


class Allocator:
    """`order`: tags in the order in which they got memory."""

    def __init__(self) -> None:
        self.pages: dict[int, Pages] = {}
        self.allocations: dict[int, Allocation] = {}
        self.order: list[str] = []

    def take(self, tag: str, value: int, nbytes: int = MiB) -> int:
        pages = Pages(nbytes)
        ctypes.memset(pages.address, value, nbytes)
        self.pages[pages.address] = pages
        self.allocations[pages.address] = Allocation((0, nbytes, pages.address, 0), tag)
        return pages.address

    def map(self, handle: tuple[int, int, int, int]) -> None:
        assert self.allocations[handle[2]].is_asleep
        self.order.append(self.allocations[handle[2]].tag)

    def unmap(self, handle: tuple[int, int, int, int]) -> None:
        assert not self.allocations[handle[2]].is_asleep
        self.pages[handle[2]].forget(0, handle[1])

    def cumem(self) -> Cumem:
        return Cumem(lambda: self.allocations, self.map, self.unmap)

    def holds(self, address: int, value: int) -> bool:
        nbytes = self.allocations[address].handle[1]
        return ctypes.string_at(address, nbytes) == bytes([value]) * nbytes


class PoolMemory(Memory):
    """The weights of an allocator."""

    def __init__(self, allocator: Allocator) -> None:
        super().__init__()
        self.allocator = allocator

    def segments(self) -> dict[int, int]:
        found = self.allocator.allocations
        return {a: data.handle[1] for a, data in found.items() if data.tag == "weights" and not data.is_asleep}


@pytest.fixture
def allocator() -> Iterator[Allocator]:
    made = Allocator()
    yield made
    for pages in made.pages.values():
        pages.close()


@pytest.fixture
def memory(allocator: Allocator) -> Iterator[PoolMemory]:
    made = PoolMemory(allocator)
    yield made
    for pages in made.pages:
        pages.close()


@pytest.fixture
def sleeper(allocator: Allocator, memory: PoolMemory) -> Sleeper:
    return Sleeper(allocator.cumem(), memory)


def filled(sleeper: Sleeper, nbytes: int) -> None:
    fd = memfd.create("pool", nbytes)
    sleeper.vault.fill(fd, 0)
    os.close(fd)
    assert sleeper.vault.filling is not None
    sleeper.vault.filling.settle()
    assert sleeper.vault.filling.state == "ready"


@pytest.mark.parametrize("image", [False, True])
def test_all_but_the_kv_cache_is_kept(sleeper: Sleeper, allocator: Allocator, memory: PoolMemory, image: bool) -> None:
    kv, weights, runtime = allocator.take("kv_cache", 1), allocator.take("weights", 2), allocator.take("runtime", 3)
    if image:
        filled(sleeper, MiB)
    before = memory.copied
    for _ in range(2):
        sleeper.sleep(1)
        assert all(data.is_asleep for data in allocator.allocations.values())
        assert allocator.holds(weights, 0)
        sleeper.wake(None)
        assert allocator.holds(weights, 2)
        assert allocator.holds(runtime, 3)
        assert allocator.holds(kv, 0)
    assert allocator.order[-1] == "kv_cache"
    assert memory.copied - before == 2 * (MiB if image else 2 * MiB)


def test_what_may_come_later_comes_when_it_is_asked_for(sleeper: Sleeper, allocator: Allocator) -> None:
    kv, weights, runtime = allocator.take("kv_cache", 1), allocator.take("weights", 2), allocator.take("runtime", 3)
    sleeper.sleep(1)
    sleeper.wake(["weights"])
    assert allocator.allocations[kv].is_asleep
    assert allocator.holds(weights, 2)
    assert allocator.holds(runtime, 3)
    sleeper.wake(["kv_cache"])
    assert allocator.order == ["weights", "runtime", "kv_cache"]


def test_forgotten_weights_come_back_empty_and_the_rest_does_not(sleeper: Sleeper, allocator: Allocator) -> None:
    weights, runtime = allocator.take("weights", 2), allocator.take("runtime", 3)
    filled(sleeper, MiB)
    sleeper.sleep(2)
    sleeper.wake(["weights"])
    assert allocator.holds(weights, 0)
    assert allocator.holds(runtime, 3)


def test_allocations_come_and_go_between(sleeper: Sleeper, allocator: Allocator) -> None:
    gone, stays = allocator.take("weights", 1), allocator.take("weights", 2)
    filled(sleeper, 2 * MiB)
    del allocator.allocations[gone]
    comes = allocator.take("weights", 3, 3 * MiB)
    sleeper.sleep(1)
    assert sleeper.mapped_bytes() == (0, 0)
    sleeper.wake(None)
    assert allocator.holds(stays, 2)
    assert allocator.holds(comes, 3)
    assert sleeper.mapped_bytes() == (4 * MiB, 0)


@pytest.mark.parametrize("image", [False, True])
def test_what_sleeps_already_is_left_alone(sleeper: Sleeper, allocator: Allocator, image: bool) -> None:
    kv, weights = allocator.take("kv_cache", 1), allocator.take("weights", 2)
    if image:
        filled(sleeper, MiB)
    sleeper.forget(["kv_cache"])
    assert allocator.allocations[kv].is_asleep
    sleeper.sleep(1)
    sleeper.sleep(1)
    sleeper.wake(None)
    sleeper.wake(None)
    assert allocator.holds(weights, 2)
