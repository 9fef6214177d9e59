from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mball.device import memfd
from mball.errors import SwapForeign, SwapMiss, SwapRefused
from mball.swap.disk import Disk, aligned, reopened
from mball.swap.service import SwapService
from mball.swap.slots import Slots
from mball.swap.store import open_store
from mball.units import MiB
from tests.swap.stores import MODEL, SIZE, SLOT, block, content, image, settings

WAIT_S = 60.0


class SlowDisk(Disk):
    """Waits before every read and write until it is let go."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, direct=True)
        self.go = threading.Event()
        self.go.set()
        self.waits = threading.Semaphore(0)

    def preadv(self, parts: Sequence[memoryview], at: int) -> int:
        self._wait()
        return super().preadv(parts, at)

    def pwritev(self, parts: Sequence[memoryview], at: int) -> int:
        self._wait()
        return super().pwritev(parts, at)

    def _wait(self) -> None:
        if not self.go.is_set():
            self.waits.release()
        self.go.wait(WAIT_S)


def slow(path: Path, **changed: object) -> tuple[SwapService, SlowDisk]:
    made: list[SlowDisk] = []

    def opens(fd: int, *, writable: bool = True) -> Disk:
        disk = reopened(fd)
        made.append(SlowDisk(os.dup(disk.fd)))
        made[0].direct = disk.direct
        disk.close()
        return made[0]

    return SwapService(open_store(settings(path, **changed), open_disk=opens)), made[0]


async def test_an_image_from_a_memfd_and_back(tmp_path: Path) -> None:
    service = await SwapService.open(settings(tmp_path / "swap"))
    want = image("a", 9 * SLOT + 5)
    source, target = memfd.create("a", want.nbytes), memfd.create("b", want.nbytes)
    os.pwrite(source, content("a", want.nbytes), 0)

    async def put() -> int:
        return await service.put_image(want.key, MODEL, source, want.nbytes, saved_s=1.0, rate=1.0, deadline_s=WAIT_S)

    assert not service.has_image(want.key, MODEL)
    assert await put() > want.nbytes
    assert await put() == 0
    assert service.has_image(want.key, MODEL)
    assert await service.read_image(want.key, MODEL, target, deadline_s=WAIT_S) == want.nbytes
    assert os.pread(target, want.nbytes, 0) == content("a", want.nbytes)
    part = aligned(SLOT)
    assert await service.read_image(want.key, MODEL, part, offset=SLOT, nbytes=SLOT, deadline_s=WAIT_S) == SLOT
    assert part == content("a", want.nbytes)[SLOT : 2 * SLOT]
    assert service.drop_image(want.key)
    with pytest.raises(SwapMiss, match="absent"):
        await service.read_image(want.key, MODEL, target, deadline_s=WAIT_S)
    assert await service.close()
    for fd in (source, target):
        os.close(fd)


async def test_blocks_of_a_worker(tmp_path: Path) -> None:
    service = await SwapService.open(settings(tmp_path / "swap"))
    wants = [block("0"), block("1", parent="0"), block("2", parent="1")]
    leases = await service.lease("w", wants, deadline_s=WAIT_S)
    slots = Slots.from_wire(service.store.worker_fd(), service.store.slots.to_wire())
    ids = []
    for number, lease in enumerate(leases):
        assert lease is not None
        slots.write(lease.place, content(str(number), SLOT))
        ids.append(lease.id)
    assert await service.commit("w", ids, deadline_s=WAIT_S) == 3
    assert await service.lease("w", wants, deadline_s=WAIT_S) == [None, None, None]
    assert await service.flush(deadline_s=WAIT_S)
    with pytest.raises(SwapRefused, match="in all"):
        await service.lease("w", [block("large", SIZE)], deadline_s=WAIT_S)
    slots.disk.close()
    assert await service.close()


async def test_the_loop_goes_on_while_the_disk_stands_still(tmp_path: Path) -> None:
    service, disk = slow(tmp_path / "swap")
    want = image("a", 4 * SLOT)
    fd = memfd.create("a", want.nbytes)
    put = asyncio.create_task(
        service.put_image(want.key, MODEL, fd, want.nbytes, saved_s=1.0, rate=1.0, deadline_s=WAIT_S)
    )
    disk.go.clear()
    gaps, last = [0.0], time.perf_counter()
    assert await asyncio.to_thread(disk.waits.acquire, timeout=WAIT_S)
    for _ in range(200):
        service.store.has(want.key, MODEL)
        service.store.status()
        await asyncio.sleep(0.001)
        gaps.append(time.perf_counter() - last)
        last = time.perf_counter()
    assert not put.done()
    assert max(gaps) < 5.0
    disk.go.set()
    assert await put > want.nbytes
    os.close(fd)
    assert await service.close()


async def test_a_read_that_takes_too_long_is_a_miss_and_a_write_refused(tmp_path: Path) -> None:
    service, disk = slow(tmp_path / "swap")
    want, other = image("a", 4 * SLOT), image("b", 40 * SLOT)
    fd = memfd.create("a", other.nbytes)
    await service.put_image(want.key, MODEL, fd, want.nbytes, saved_s=1.0, rate=1.0, deadline_s=WAIT_S)
    disk.go.clear()
    with pytest.raises(SwapMiss, match="busy"):
        await service.read_image(want.key, MODEL, fd, deadline_s=0.05)
    with pytest.raises(SwapRefused, match="busy"):
        await service.put_image(other.key, MODEL, fd, other.nbytes, saved_s=1.0, rate=1.0, deadline_s=0.05)
    os.close(fd)
    disk.go.set()
    assert await service.close(WAIT_S)


async def test_more_than_can_wait_is_refused_at_once(tmp_path: Path) -> None:
    service, disk = slow(tmp_path / "swap")
    want = image("a", SLOT)
    fd = memfd.create("a", want.nbytes)
    await service.put_image(want.key, MODEL, fd, want.nbytes, saved_s=1.0, rate=1.0, deadline_s=WAIT_S)
    disk.go.clear()
    memory = [aligned(SLOT) for _ in range(80)]
    reads = [asyncio.create_task(service.read_image(want.key, MODEL, one, deadline_s=WAIT_S)) for one in memory]
    done, _ = await asyncio.wait(reads, timeout=WAIT_S, return_when=asyncio.FIRST_EXCEPTION)
    assert all(isinstance(task.exception(), SwapMiss) for task in done)
    disk.go.set()
    results = await asyncio.gather(*reads, return_exceptions=True)
    assert results.count(SLOT) == 64
    os.close(fd)
    assert await service.close()


async def test_a_disk_that_hangs_at_the_end_is_left_behind(tmp_path: Path) -> None:
    service, disk = slow(tmp_path / "swap")
    want = image("a", 4 * SLOT)
    fd = memfd.create("a", want.nbytes)
    disk.go.clear()
    with pytest.raises(SwapRefused):
        await service.put_image(want.key, MODEL, fd, want.nbytes, saved_s=1.0, rate=1.0, deadline_s=0.05)
    assert not await service.close(0.2)
    disk.go.set()
    os.close(fd)


async def test_opening_raises_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "swap").write_bytes(b"a thesis")
    with pytest.raises(SwapForeign, match="left as it is"):
        await SwapService.open(settings(tmp_path / "swap"))


async def test_leases_that_nobody_waits_for_any_more_are_given_back(tmp_path: Path) -> None:
    service, disk = slow(tmp_path / "swap", daily_write_bytes=MiB)
    book = service.store._book
    before = book.next_generation
    disk.go.clear()
    with pytest.raises(SwapRefused, match="busy"):
        await service.lease("w", [block("0"), block("1")], deadline_s=0.1)
    disk.go.set()
    async with asyncio.timeout(WAIT_S):
        while book.next_generation < before + 2 or service.store.status()["leased_slots"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(await service.lease("w", [block("0")], deadline_s=WAIT_S)) == 1
    assert await service.close()
