"""An engine's memory filled from its image in the swap store, without the image in DRAM between."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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

READS = 4
"""At a time. More under way made a virtual disk a fifth slower, and what a disk of its own can do comes with less."""


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
    staging = mapping.Mapping(READS * read_bytes)
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(READS):
        free.put(number * read_bytes)
    failed = threading.Event()

    def fetch(at: int, nbytes: int, parts: list[tuple[int, int, int]]) -> None:
        if failed.is_set():
            return
        begin = free.get()
        try:
            with memory.entered():
                image.read(memoryview(staging.buffer).cast("B")[begin : begin + nbytes], at)
                for address, position, count in parts:
                    memory.load(address, staging.address + begin + position - at, count)
                memory.finish()
        except BaseException:
            failed.set()
            raise
        finally:
            free.put(begin)

    with ExitStack() as undo:
        undo.callback(staging.close)
        # Only a hint: from memory that it does not know the driver copies all the same, more slowly.
        with contextlib.suppress(RegistrationFailed):
            memory.runtime.register(staging.address, staging.nbytes)
            undo.callback(memory.runtime.unregister, staging.address)
        with ThreadPoolExecutor(READS, thread_name_prefix="mball-stored") as pool:
            for done in [pool.submit(fetch, *each) for each in _reads(wanted, read_bytes)]:
                done.result()
    with memory.entered():
        found = memory.fingerprints({address: kept.nbytes for address, kept in wanted.items()})
    if any(found[address] != kept.fingerprint for address, kept in wanted.items()):
        raise SwapMiss("checksum", "what was read is not what the weights were")


def _reads(wanted: Mapping[int, Kept], read_bytes: int) -> Iterator[tuple[int, int, list[tuple[int, int, int]]]]:
    """(byte of the image, bytes, [(address, byte of the image, bytes)]) of each read: from one multiple of `read_bytes`
    to the next, where slots begin, as far as something there is wanted."""
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
        yield first, last - first, parts[number]
