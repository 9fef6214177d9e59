"""An engine's memory filled from its image in the swap store, without the image in DRAM between."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mball.device import mapping
from mball.errors import RegistrationFailed, SwapMiss
from mball.swap.disk import Disk
from mball.swap.place import Place
from mball.swap.slots import Slots
from mball.swap.stored_image import StoredImage
from mball.units import MiB

if TYPE_CHECKING:
    from mball.memory.control import Message
    from mball.memory.engine_image import EngineMemory, Kept

READ_BYTES = 4 * MiB
"""Of one read, or a slot where that is more."""

READS = 3
"""At a time, and one piece more is being copied to the device: readers that copied as well took seven eighths of what a
disk gives. What is read into stays small, as a virtual disk is slower where that fits no processor's cache."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An image in the store. `read` fills memory from a byte of it on, or raises SwapMiss; whole slots are read. Whose
    they are is known then, and not whether they are whole: that is seen on the device, faster than any processor can.
    """

    read: Callable[[memoryview, int], None]
    slot_bytes: int


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
        yield Stored(StoredImage(opened, Place.from_wire(place), proven=False).read, opened.layout.slot_bytes)
    finally:
        disk.close()


def bring(memory: EngineMemory, wanted: Mapping[int, Kept], image: Stored) -> None:
    """Fills segments that have memory again, and proves that they are what they were.

    Raises SwapMiss, after which what is in them is worth nothing; DeviceError.
    """
    read_bytes = -(-READ_BYTES // image.slot_bytes) * image.slot_bytes
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
        for read in _reads(wanted, read_bytes):
            if not pieces:
                pieces.append(_copied(memory, staging, *under_way.popleft()))
            piece = pieces.popleft()
            into = memoryview(staging.buffer).cast("B")[piece : piece + read.nbytes]
            under_way.append((pool.submit(image.read, into, read.at), piece, read))
        while under_way:
            _copied(memory, staging, *under_way.popleft())
    with memory.entered():
        found = memory.fingerprints({address: kept.nbytes for address, kept in wanted.items()})
    if any(found[address] != kept.fingerprint for address, kept in wanted.items()):
        raise SwapMiss("checksum", "what was read is not what the weights were")


@dataclass(frozen=True, slots=True)
class _Read:
    """`nbytes` of the image from byte `at` on, and where what is wanted of them goes: (address, byte of the image,
    bytes)."""

    at: int
    nbytes: int
    parts: Sequence[tuple[int, int, int]]


def _copied(memory: EngineMemory, staging: mapping.Mapping, done: Future[None], piece: int, read: _Read) -> int:
    """The piece, which is free for another read. Raises SwapMiss, DeviceError."""
    done.result()
    for address, position, count in read.parts:
        memory.load(address, staging.address + piece + position - read.at, count)
    memory.finish()
    return piece


def _reads(wanted: Mapping[int, Kept], read_bytes: int) -> Iterator[_Read]:
    """From one multiple of `read_bytes` to the next, where slots begin, as far as something there is wanted."""
    parts: dict[int, list[tuple[int, int, int]]] = {}
    for address, kept in wanted.items():
        at, end = kept.position, kept.position + kept.nbytes
        while at < end:
            number = at // read_bytes
            upto = min(end, (number + 1) * read_bytes)
            parts.setdefault(number, []).append((address + at - kept.position, at, upto - at))
            at = upto
    for number in sorted(parts):
        first = min(at for _, at, _ in parts[number])
        last = max(at + count for _, at, count in parts[number])
        yield _Read(first, last - first, parts[number])
