"""An engine's memory filled from its image in the swap store, without the image in DRAM between."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mball.device import mapping
from mball.errors import RegistrationFailed, SwapMiss
from mball.swap.disk import Disk
from mball.swap.layout import BLOCK_BYTES
from mball.swap.place import Place
from mball.swap.slots import Slots
from mball.units import MiB

if TYPE_CHECKING:
    from mball.memory.control import Message
    from mball.memory.engine_image import EngineMemory, Kept

READ_BYTES = 2 * MiB
"""Of one read, or a slot where that is more."""

READS = 3
"""At a time, and one piece more is being copied to the device: readers that copied as well took seven eighths of what a
disk gives. What is read into stays small, as a virtual disk is slower where that fits no processor's cache."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An image in the store. `read` fills memory with whole slots from a number on, each `slot_bytes` of the image with
    `header_bytes` before them, as a disk gives most where nothing is sorted out; or raises SwapMiss. Whose they are is
    known then, and not whether they are whole: that is seen on the device, faster than any processor can.
    """

    read: Callable[[int, memoryview], None]
    slot_bytes: int
    header_bytes: int


@contextlib.contextmanager
def stored(path: str, slots: Message, place: Message) -> Iterator[Stored]:
    """An image where it lies. `path` is the store's file, `slots` and `place` are what `Slots` and `Place`
    say of themselves. Raises SwapMiss where it can't be opened."""
    direct = os.O_DIRECT if slots["direct"] else 0
    try:
        disk = Disk(os.open(path, os.O_RDONLY | os.O_CLOEXEC | direct), direct=bool(direct), writable=False)
    except OSError as error:
        raise SwapMiss("io", f"the store can't be opened: {os.strerror(error.errno or 0)}") from error
    try:
        opened = Slots.from_wire(disk.fd, slots)
        yield Stored(partial(opened.read_bare, Place.from_wire(place)), opened.layout.slot_bytes, BLOCK_BYTES)
    finally:
        disk.close()


def bring(memory: EngineMemory, wanted: Mapping[int, Kept], image: Stored) -> None:
    """Fills segments that have memory again, and proves that they are what they were.

    Raises SwapMiss, after which what is in them is worth nothing; DeviceError.
    """
    slots = max(1, READ_BYTES // image.slot_bytes)
    read_bytes = slots * (image.header_bytes + image.slot_bytes)
    staging = mapping.Mapping((READS + 1) * read_bytes)
    with ExitStack() as undo:
        undo.callback(staging.close)
        # Only a hint: from memory that it does not know the driver copies all the same, more slowly.
        with contextlib.suppress(RegistrationFailed):
            memory.runtime.register(staging.address, staging.nbytes)
            undo.callback(memory.runtime.unregister, staging.address)
        undo.enter_context(memory.entered())
        pool = undo.enter_context(ThreadPoolExecutor(READS, thread_name_prefix="mball-stored"))
        pieces = deque(range(0, staging.nbytes, read_bytes))
        under_way: deque[tuple[Future[None], int, _Read]] = deque()
        for read in _reads(wanted, image, slots):
            if not pieces:
                pieces.append(_copied(memory, staging, *under_way.popleft()))
            piece = pieces.popleft()
            into = memoryview(staging.buffer).cast("B")[piece : piece + read.nbytes]
            under_way.append((pool.submit(image.read, read.first, into), piece, read))
        while under_way:
            _copied(memory, staging, *under_way.popleft())
    with memory.entered():
        found = memory.fingerprints({address: kept.nbytes for address, kept in wanted.items()})
    if any(found[address] != kept.fingerprint for address, kept in wanted.items()):
        raise SwapMiss("checksum", "what was read is not what the weights were")


@dataclass(frozen=True, slots=True)
class _Read:
    """Slots from `first` on, `nbytes` with their headers, and where what is wanted of those goes: (address, byte of
    what is read, bytes)."""

    first: int
    nbytes: int
    parts: Sequence[tuple[int, int, int]]


def _copied(memory: EngineMemory, staging: mapping.Mapping, done: Future[None], piece: int, read: _Read) -> int:
    """The piece, which is free for another read. Raises SwapMiss, DeviceError."""
    done.result()
    for address, at, count in read.parts:
        memory.load(address, staging.address + piece + at, count)
    memory.finish()
    return piece


def _reads(wanted: Mapping[int, Kept], image: Stored, most: int) -> Iterator[_Read]:
    """Of at most so many slots, from the first to the last of them that something is wanted of."""
    stride, parts = image.header_bytes + image.slot_bytes, dict[int, list[tuple[int, int, int]]]()
    for address, kept in wanted.items():
        at, end = kept.position, kept.position + kept.nbytes
        while at < end:
            number, begin = divmod(at, image.slot_bytes)
            count = min(end - at, image.slot_bytes - begin)
            parts.setdefault(number, []).append((address + at - kept.position, begin, count))
            at += count
    for _, numbers in itertools.groupby(sorted(parts), key=lambda number: number // most):
        together = list(numbers)
        first, last = together[0], together[-1]
        yield _Read(
            first,
            (last - first + 1) * stride,
            [
                (address, (number - first) * stride + image.header_bytes + begin, count)
                for number in together
                for address, begin, count in parts[number]
            ],
        )
