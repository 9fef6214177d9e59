"""Failing, being killed, losing power at every change to the file: old or new, never a mix."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mball.errors import SwapError, SwapRefused, SwapUnavailable
from mball.swap.disk import Disk, reopened
from mball.swap.store import open_store
from tests.swap import scenario
from tests.swap.stores import SLOT, CountingDisk, content, counting, failing_at, get, image, open_at, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """In memory, where there is such a place: syncing costs nothing there."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="mball-test-") as folder:
        yield Path(folder)


def changes(folder: Path) -> int:
    """How many the scenario makes, when nothing fails."""
    count = 0

    def before(number: int, name: str) -> None:
        nonlocal count
        count += 1

    scenario.run(folder / "whole", counting(before))
    return count


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("for_good", [False, True])
def test_an_error_at_every_change(fast: Path, error: int, for_good: bool) -> None:
    count = changes(fast)
    assert count > 30
    found: set[frozenset[str]] = set()
    for number in range(1, count + 1):
        path = fast / str(number)
        durable: set[str] = set()

        def note(said: str, durable: set[str] = durable) -> None:
            if said.startswith("-"):
                durable.discard(said[1:])
            else:
                durable.add(said)

        # At opening: there is no store this time, and serving goes on without.
        with contextlib.suppress(SwapUnavailable):
            scenario.run(path, counting(failing_at(number, error, for_good=for_good)), note)
        found.add(frozenset(scenario.survived(path, durable)))
        path.unlink()
    assert len(found) > 5, "it failed at many stages"


def test_killed_at_every_change(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.swap.scenario", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count = int(done.stdout)
    assert count > 30
    for number in range(1, count + 1):
        scenario.survived(tmp_path / str(number), scenario.noted(tmp_path / str(number)))


class PowerLoss(CountingDisk):
    """Before every change: files as the disk may have them if the power went now. What was synced is there; of the
    rest any sectors, in any order. `keep` gets each with what had to survive."""

    def __init__(self, disk: Disk, keep: Callable[[bytes], None], draw: random.Random) -> None:
        super().__init__(disk, lambda number, name: self._lose())
        self._keep = keep
        self._draw = draw
        self._safe = bytearray(os.pread(reopened_plain(self.fd), self.nbytes, 0))
        self._pending: list[tuple[int, bytes]] = []

    def pwritev(self, parts: Sequence[memoryview], at: int) -> int:
        written = super().pwritev(parts, at)
        with self._lock:
            self._pending.append((at, b"".join(parts)[:written]))
        return written

    def sync(self) -> None:
        with self._lock:
            self.count += 1
            self._lose()
            Disk.sync(self)
            self._safe = bytearray(os.pread(reopened_plain(self.fd), self.nbytes, 0))
            self._pending = []

    def _lose(self) -> None:
        sectors = [(at + low, data[low : low + 512]) for at, data in self._pending for low in range(0, len(data), 512)]
        some = [[s for s in sectors if self._draw.random() < share] for share in (0.1, 0.5, 0.9)]
        for kept in ([], sectors, *some):
            self._draw.shuffle(kept)
            lost = bytearray(self._safe)
            lost.extend(bytes(max(0, self._draw.choice([len(lost), self.nbytes]) - len(lost))))
            for at, data in kept:
                if at < len(lost) or len(self._safe) == 0:
                    lost.extend(bytes(max(0, at + len(data) - len(lost))))
                    lost[at : at + len(data)] = data
            self._keep(bytes(lost))


def reopened_plain(fd: int) -> int:
    """Read through the page cache; closed with the next one."""
    global _plain
    if _plain >= 0:
        os.close(_plain)
    _plain = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    return _plain


_plain = -1


@pytest.mark.parametrize("seed", range(3))
def test_power_lost_at_every_change(fast: Path, seed: int) -> None:
    durable: set[str] = set()
    lost: list[tuple[bytes, set[str]]] = []
    seen: set[bytes] = set()
    draw = random.Random(seed)

    def keep(data: bytes) -> None:
        if data not in seen:
            seen.add(data)
            lost.append((data, set(durable)))

    def note(said: str) -> None:
        if said.startswith("-"):
            durable.discard(said[1:])
        else:
            durable.add(said)

    def open_disk(fd: int, *, writable: bool = True) -> Disk:
        return PowerLoss(reopened(fd, writable=writable), keep, draw)

    scenario.run(fast / "whole", open_disk, note)
    assert len(lost) > 80
    path = fast / "lost"
    for data, must in lost:
        path.write_bytes(data)
        scenario.survived(path, must)


def test_a_write_that_fails_makes_it_read_only_and_reading_goes_on(tmp_path: Path) -> None:
    failing = False

    def before(number: int, name: str) -> None:
        if failing:
            raise OSError(errno.EIO, "planted")

    store = open_store(settings(tmp_path / "swap"), open_disk=counting(before))
    store.put(image("a", 3 * SLOT), content("a", 3 * SLOT))
    failing = True
    with pytest.raises(SwapRefused, match="io"):
        store.put(image("b", 3 * SLOT), content("b", 3 * SLOT))
    failing = False
    assert store.read_only is not None
    with pytest.raises(SwapRefused, match="read_only"):
        store.put(image("c", SLOT), content("c", SLOT))
    assert get(store, image("a", 3 * SLOT)) == content("a", 3 * SLOT)
    assert store.counters["write_errors"] == 1
    assert store.status()["leased_slots"] == 0
    store.close()


def test_a_failed_sync_is_never_taken_for_a_good_one(tmp_path: Path) -> None:
    """The kernel says once that written pages are lost: what was committed before is not named."""
    syncs: list[int] = []

    def before(number: int, name: str) -> None:
        if name == "sync":
            syncs.append(number)
            if len(syncs) == 4:  # three are the making's
                raise OSError(errno.EIO, "planted")

    path = tmp_path / "swap"
    store = open_store(settings(path), open_disk=counting(before))
    with pytest.raises(SwapError, match="io"):
        store.put(image("a", SLOT), content("a", SLOT))
    store.close()
    assert len(syncs) == 4
    store = open_at(path)
    assert not store.has(image("a", SLOT).key, image("a", SLOT).model)
    store.close()


def test_a_writer_killed_in_the_middle(tmp_path: Path) -> None:
    """A real process, killed while it writes images one after another."""
    path = tmp_path / "swap"
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.swap.stores import *\n"
        "store = open_at(Path(sys.argv[1]))\n"
        "for n in range(10**6):\n"
        "    store.put(image(str(n), 20 * SLOT, saved_s=1.0 + n), content(str(n % 50), 20 * SLOT))\n"
        "    print(n, flush=True)\n"
    )
    for stop in (1, 3, 10, 25):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout as said:
            while int(said.readline()) < stop:
                pass
            process.send_signal(signal.SIGKILL)
            last = max([stop, *(int(line) for line in said if line.endswith("\n"))])
        process.wait(60)
        store = open_at(path)
        there = [n for n in range(last + 3) if store.has(image(str(n), 20 * SLOT).key, image("", 1).model)]
        assert last in there, "put has returned: it is on the disk"
        for number in there:
            assert get(store, image(str(number), 20 * SLOT)) == content(str(number % 50), 20 * SLOT)
        store.close()
        path.unlink()
