"""An engine's memory given up and brought back, with real memory of this process."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch

from mball.device import memfd
from mball.device.mapping import Mapping as Pages
from mball.errors import Cancelled, SwapMiss, TransitionError
from mball.loader.registered import PIECE_BYTES
from mball.memory import engine_image
from mball.memory.engine_image import EngineImage, Vault
from mball.memory.engine_stored import Stored
from mball.memory.fingerprint import fingerprints
from mball.memory.pace import Pace
from mball.units import MiB

HEADER_BYTES = 4096
SIZES = (3 * MiB, PIECE_BYTES + 2 * MiB, mmap.PAGESIZE)


class Registry:
    """What is registered, as a driver would know it."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        self.registered[address] = nbytes

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def covers(self, address: int, nbytes: int) -> bool:
        return any(begin <= address and address + nbytes <= begin + n for begin, n in self.registered.items())


class Memory:
    """Three segments. `copied`: bytes out of them; each copy is one that a driver would take."""

    def __init__(self) -> None:
        self.runtime = Registry()
        self.pages = [Pages(nbytes) for nbytes in SIZES]
        self.copied = 0
        self.gate = threading.Event()
        self.gate.set()
        self.busy = False
        self.begun: list[tuple[int, int, int]] = []
        for number, pages in enumerate(self.pages):
            ctypes.memset(pages.address, number + 1, pages.nbytes)

    def entered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def computes(self) -> bool:
        return self.busy

    def segments(self) -> Mapping[int, int]:
        return {pages.address: pages.nbytes for pages in self.pages}

    def fingerprints(self, segments: Mapping[int, int]) -> dict[int, int]:
        words = [self.words(a, n) for a, n in segments.items()]
        return dict(zip(segments, fingerprints(words), strict=True))

    def save(self, target: int, address: int, nbytes: int) -> None:
        self.gate.wait(30)
        ctypes.memmove(target, address, nbytes)
        self.copied += nbytes

    def load(self, address: int, source: int, nbytes: int) -> None:
        """As late as may be."""
        self.begun.append((address, source, nbytes))

    def finish(self) -> None:
        for copy in self.begun:
            ctypes.memmove(*copy)
        self.begun.clear()

    def lose(self) -> None:
        for pages in self.pages:
            pages.forget(0, pages.nbytes)

    def content(self) -> bytes:
        return b"".join(ctypes.string_at(pages.address, pages.nbytes) for pages in self.pages)

    @staticmethod
    def words(address: int, nbytes: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.int64)


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    for pages in made.pages:
        pages.close()


@pytest.fixture
def image_fd() -> Iterator[int]:
    fd = memfd.create("engine", sum(SIZES) + MiB)
    yield fd
    os.close(fd)


def swap(vault: Vault, memory: Memory) -> None:
    """Everything goes, and everything that is kept comes back."""
    memory.lose()
    for address in memory.segments():
        vault.bring_back(address)
    vault.finish(set(memory.segments()))


def lose_image(vault: Vault, memory: Memory, *, asleep: bool, still_wanted: Sequence[int] = ()) -> None:
    """The image goes while its memory is away, or before; then that is there again."""
    if asleep:
        vault.put_away(memory.segments())
        assert vault.drop(still_wanted)
    else:
        vault.drop()
        vault.forget(memory.segments())
    swap(vault, memory)


def filled(vault: Vault, fd: int, offset: int = 0) -> None:
    vault.fill(fd, offset)
    assert vault.filling is not None
    vault.filling.settle()
    assert vault.filling.error is None
    assert vault.filling.state == "ready"


def test_with_an_image_nothing_is_copied_when_memory_goes(memory: Memory, image_fd: int) -> None:
    before, vault = memory.content(), Vault(memory)
    filled(vault, image_fd, offset=MiB)
    assert memory.copied == sum(SIZES)
    memfd.seal(image_fd)
    for _ in range(3):
        assert vault.put_away(memory.segments()) == 0
        swap(vault, memory)
        assert memory.content() == before
    assert memory.copied == sum(SIZES)


def test_what_was_changed_since_is_copied_and_comes_back_as_it_was_last(memory: Memory, image_fd: int) -> None:
    vault = Vault(memory)
    filled(vault, image_fd)
    for value in (77, 78):
        ctypes.memset(memory.pages[1].address + SIZES[1] - 1, value, 1)
        changed = memory.content()
        assert vault.put_away(memory.segments()) == vault.aside_bytes == SIZES[1]
        swap(vault, memory)
        assert vault.aside_bytes == 0
        assert memory.content() == changed


def test_without_an_image_all_is_copied(memory: Memory) -> None:
    before, vault = memory.content(), Vault(memory)
    assert vault.put_away(memory.segments()) == sum(SIZES)
    swap(vault, memory)
    assert memory.content() == before


def test_what_is_not_put_away_is_not_brought_back(memory: Memory, image_fd: int) -> None:
    vault = Vault(memory)
    filled(vault, image_fd)
    swap(vault, memory)
    assert not any(memory.content())


def test_a_segment_that_came_later_is_copied(memory: Memory, image_fd: int) -> None:
    vault = Vault(memory)
    filled(vault, image_fd)
    memory.pages.append(Pages(MiB))
    ctypes.memset(memory.pages[-1].address, 9, MiB)
    before = memory.content()
    assert vault.put_away(memory.segments()) == MiB
    swap(vault, memory)
    assert memory.content() == before


def test_memory_that_is_to_go_waits_for_the_filling(memory: Memory, image_fd: int) -> None:
    before, vault = memory.content(), Vault(memory)
    memory.gate.clear()
    vault.fill(image_fd, 0)
    threading.Timer(0.2, memory.gate.set).start()
    assert vault.put_away(memory.segments()) == 0
    swap(vault, memory)
    assert memory.content() == before


@pytest.mark.parametrize("wanted", ["slept", "dropped"])
def test_a_filling_that_gives_way_is_hurried_where_it_is_waited_for(
    memory: Memory, image_fd: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take hours else."""
    monkeypatch.setattr(engine_image, "Pace", partial(Pace, share=1e-9, gives_way_s=1e9))
    memory.busy, before, vault = True, memory.content(), Vault(memory)
    vault.fill(image_fd, 0)
    if wanted == "slept":
        assert vault.put_away(memory.segments()) == 0
        swap(vault, memory)
        assert memory.content() == before
    else:
        vault.drop()
    assert bool(memory.runtime.registered) is (wanted == "slept")


def test_an_image_that_is_let_go_leaves_nothing_registered(memory: Memory, image_fd: int) -> None:
    vault = Vault(memory)
    filled(vault, image_fd)
    assert memory.runtime.registered
    assert not vault.drop()
    assert not memory.runtime.registered
    assert vault.filling is None


def test_with_an_image_go_weights_that_are_in_it_alone_but_for_those_still_wanted(
    memory: Memory, image_fd: int
) -> None:
    before, vault = memory.content(), Vault(memory)
    filled(vault, image_fd)
    vault.put_away(memory.segments())
    wanted = memory.pages[1]
    assert vault.drop([wanted.address + PIECE_BYTES + 5])
    os.ftruncate(image_fd, 0)
    swap(vault, memory)
    begin, end = SIZES[0], SIZES[0] + SIZES[1]
    assert memory.content()[begin:end] == before[begin:end]
    assert not any(memory.content()[:begin])
    assert not any(memory.content()[end:])


def test_an_image_stays_while_weights_are_away_that_were_changed(memory: Memory, image_fd: int) -> None:
    vault = Vault(memory)
    filled(vault, image_fd)
    ctypes.memset(memory.pages[1].address, 99, 1)
    changed = memory.content()
    vault.put_away(memory.segments())
    with pytest.raises(TransitionError, match=r"66\.0 MiB of the weights were changed"):
        vault.drop()
    swap(vault, memory)
    assert memory.content() == changed
    assert not vault.drop()


def test_a_filling_that_is_not_wanted_ends_and_leaves_nothing(memory: Memory, image_fd: int) -> None:
    vault = Vault(memory)
    memory.gate.clear()
    vault.fill(image_fd, 0)
    filling = vault.filling
    assert filling is not None
    with pytest.raises(TransitionError, match="already"):
        vault.fill(image_fd, 0)
    filling.cancel.set()
    memory.gate.set()
    vault.drop()
    assert filling.state == "failed"
    assert filling.image is None
    assert not memory.runtime.registered


def test_a_filling_that_fails_says_why_and_nothing_is_lost(memory: Memory) -> None:
    vault = Vault(memory)
    fd = memfd.create("small", MiB)
    try:
        vault.fill(fd, 0)
        assert vault.filling is not None
        vault.filling.settle()
        assert vault.filling.state == "failed"
        assert "image of 1.0 MiB" in str(vault.filling.error)
        before = memory.content()
        assert vault.put_away(memory.segments()) == sum(SIZES)
        swap(vault, memory)
        assert memory.content() == before
    finally:
        os.close(fd)


def test_pieces_are_registered_where_they_are_copied_to(memory: Memory, image_fd: int) -> None:
    pinned: list[bool] = []
    save = memory.save

    def checked(target: int, address: int, nbytes: int) -> None:
        pinned.append(memory.runtime.covers(target, nbytes))
        save(target, address, nbytes)

    memory.save = checked  # type: ignore[method-assign]
    image = EngineImage.fill(memory, image_fd, MiB, threading.Event(), Pace(memory.computes))
    assert pinned
    assert all(pinned)
    image.close()


def test_cancelled_before_it_begins(memory: Memory, image_fd: int) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        EngineImage.fill(memory, image_fd, 0, cancel, Pace(memory.computes))


def reader(fd: int, slot_bytes: int = 4096) -> Stored:
    read_once: set[int] = set()
    stride_bytes = HEADER_BYTES + slot_bytes

    def read(first: int, into: memoryview) -> None:
        slots = range(first, first + len(into) // stride_bytes)
        assert len(slots) * stride_bytes == len(into)
        assert not read_once.intersection(slots), "a slot is read for each of those that want a part of it"
        read_once.update(slots)
        for slot, at in zip(slots, range(0, len(into), stride_bytes), strict=True):
            into[at : at + HEADER_BYTES] = b"h" * HEADER_BYTES
            payload = into[at + HEADER_BYTES :][:slot_bytes]
            # Of the last one no more than there is.
            assert os.preadv(fd, [payload], slot * slot_bytes) > 0

    return Stored(read, slot_bytes, HEADER_BYTES)


def kept(fd: int) -> int:
    """A copy, as a store has it."""
    copy = os.memfd_create("copy", os.MFD_CLOEXEC)
    os.ftruncate(copy, os.fstat(fd).st_size)
    os.pwrite(copy, os.pread(fd, os.fstat(fd).st_size, 0), 0)
    return copy


@pytest.mark.parametrize("slot_bytes", [4096, 3 * MiB, 16 * MiB])
@pytest.mark.parametrize("asleep", [False, True])
def test_what_left_with_its_image_is_read_where_the_image_went(
    memory: Memory, image_fd: int, asleep: bool, slot_bytes: int
) -> None:
    before, vault = memory.content(), Vault(memory)
    filled(vault, image_fd, offset=MiB)
    name, copy = vault.name(), kept(image_fd)
    lose_image(vault, memory, asleep=asleep, still_wanted=[memory.pages[2].address])
    assert memory.content() != before
    vault.restore(reader(copy, slot_bytes))
    assert memory.content() == before
    assert vault.name() == name
    assert not memory.runtime.registered
    # Once: what comes later is not to be undone.
    with pytest.raises(SwapMiss, match="were others"):
        vault.restore(reader(copy))
    os.close(copy)


@pytest.mark.parametrize("asleep", [False, True])
def test_an_image_that_comes_back_is_taken_again(memory: Memory, image_fd: int, asleep: bool) -> None:
    before, vault = memory.content(), Vault(memory)
    with pytest.raises(TransitionError, match="another process"):
        vault.take(image_fd, lost=asleep)
    filled(vault, image_fd)
    copy = kept(image_fd)
    if asleep:
        vault.put_away(memory.segments())
    vault.drop()
    memfd.seal(image_fd)
    assert vault.take(copy, lost=asleep)
    with pytest.raises(TransitionError, match="already"):
        vault.take(copy, lost=asleep)
    if not asleep:
        assert vault.put_away(memory.segments()) == 0
    swap(vault, memory)
    assert memory.content() == before
    assert not vault.drop()
    assert not memory.runtime.registered
    os.close(copy)


def test_weights_that_were_changed_are_not_read_from_an_image(memory: Memory, image_fd: int) -> None:
    vault = Vault(memory)
    filled(vault, image_fd)
    copy = kept(image_fd)
    vault.drop()
    ctypes.memset(memory.pages[1].address + 7, 99, 1)
    vault.forget(memory.segments())
    assert not vault.take(copy, lost=True)
    vault.drop()
    with pytest.raises(SwapMiss, match="were others"):
        vault.restore(reader(copy))
    os.close(copy)


@pytest.mark.parametrize("asleep", [False, True])
def test_what_an_engine_computes_in_is_kept_beside_the_image(memory: Memory, image_fd: int, asleep: bool) -> None:
    """It lies among the weights, and is another at every sleep."""
    vault = Vault(memory)
    filled(vault, image_fd)
    copy = kept(image_fd)
    ctypes.memset(memory.pages[2].address + 7, 99, 1)
    changed = memory.content()
    lose_image(vault, memory, asleep=asleep)
    assert memory.content() != changed
    vault.restore(reader(copy))
    assert memory.content() == changed
    os.close(copy)


def test_what_is_read_is_proven(memory: Memory, image_fd: int) -> None:
    """Where its checksums are right and it is not what the weights were: it was changed while it was filled."""
    before, vault = memory.content(), Vault(memory)
    filled(vault, image_fd)
    copy = kept(image_fd)
    os.pwrite(copy, b"x", SIZES[0] + 5)
    vault.drop()
    vault.forget(memory.segments())
    with pytest.raises(SwapMiss, match="not what the weights were"):
        vault.restore(reader(copy))
    # It may be tried again, or be had from elsewhere.
    os.pwrite(copy, before[SIZES[0] + 5 : SIZES[0] + 6], SIZES[0] + 5)
    vault.restore(reader(copy))
    assert memory.content() == before
    os.close(copy)


def test_a_slot_that_can_not_be_read_ends_it_and_leaves_nothing(memory: Memory, image_fd: int) -> None:
    vault = Vault(memory)
    filled(vault, image_fd)
    vault.drop()
    vault.forget(memory.segments())

    def read(first: int, into: memoryview) -> None:
        raise SwapMiss("checksum", "a flipped byte")

    with pytest.raises(SwapMiss, match="a flipped byte"):
        vault.restore(Stored(read, 4096, HEADER_BYTES))
    assert not memory.runtime.registered
