"""A checkpoint's bytes into a GPU's memory: every way there, and the threads that go it."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from mball.device import host
from mball.device.cuda import Mark, Runtime
from mball.device.mapping import pages
from mball.errors import RegistrationFailed
from mball.loader.paths import EVERY_WAY, Way, choose
from mball.loader.plan import Chunk, Extent, grouped
from mball.loader.registered import IMAGES, PIECE_BYTES, RegisteredImage
from mball.loader.ring import RINGS, Buffer, Ring, warn_once
from mball.loader.source import Source
from mball.loader.tuning import Profile
from mball.units import MiB

_REGISTERING_THREADS = 4


class Transfer:
    """One load's way to a device. `lane` makes what a thread does it with; `close` ends it."""

    def __init__(
        self,
        memory: Tensor,
        source: Source,
        runtime: Runtime,
        profile: Profile,
        *,
        total_bytes: int,
        ways: Collection[Way] = EVERY_WAY,
        cpus: frozenset[int] = frozenset(),
        tee: Callable[[int, int, memoryview], None] | None = None,
    ) -> None:
        """`memory` is the destination, one byte an element; threads stay on `cpus` where there are any.

        `tee` is given all that is read: a shard, the first byte in its file, the bytes. Then nothing is mapped.
        """
        self.memory = memory
        self._base = memory.data_ptr()
        self.source = source
        self.runtime = runtime
        self.profile = profile
        self.cpus = cpus
        self.stream = runtime.stream()
        self.image = self._attach() if Way.MAPPED in ways else None
        self.tee = tee
        self._ways = frozenset(ways)
        self._total_bytes = total_bytes
        self._tight = total_bytes > host.available_bytes()
        self._mappable = tee is None and (source.is_files or self.image is not None)
        self._direct = source.is_files
        self._ring_key = f"{type(runtime).__name__} {memory.device}"
        self._ring: Ring | None = None
        self._lock = threading.Lock()
        self._bytes: Counter[Way] = Counter()

    def chunks(self, extents: Iterable[Extent]) -> Iterator[Chunk]:
        chunk_bytes = PIECE_BYTES if self.image is not None else self.profile.chunk_bytes
        return grouped(extents, chunk_bytes, self.source.shifts)

    def parts(self, chunk: Chunk) -> Iterable[Chunk]:
        """What fits a buffer of the ring."""
        room = self.profile.buffer_bytes
        if chunk.nbytes <= room // 2 or (chunk.plain and chunk.start % room + chunk.nbytes <= room):
            return [chunk]
        return grouped(chunk.extents, room, self.source.shifts)

    @property
    def bytes_by_way(self) -> Mapping[str, int]:
        return {way.value: nbytes for way, nbytes in self._bytes.items()}

    def lane(self) -> CudaLane:
        return CudaLane(self)

    def ring(self) -> Ring:
        with self._lock:
            if self._ring is None:
                self._ring = RINGS.take(self._ring_key, self.runtime, self.profile.buffer_bytes, self.profile.buffers)
            return self._ring

    @property
    def threads(self) -> int:
        """A registered image is copied by one thread, registered by a few: the driver does it one piece at a time."""
        if self.image is None:
            return max(1, min(self.profile.threads, self._total_bytes // MiB))
        return 1 if self.image.registered else min(self.profile.threads, _REGISTERING_THREADS)

    def way(self, chunk: Chunk) -> Way:
        ways = self._ways
        asked = len(ways) > 1 and self.source.is_files
        return choose(
            resident=self.source.resident_share(chunk.shard, chunk.start, chunk.nbytes) if asked else None,
            cores=0 if self.image is not None else self.profile.cores,
            mappable=self._mappable and chunk.plain,
            direct=self._direct and chunk.extents[0].runs is None,
            tight=self._tight,
            allowed=ways,
        )

    def enter(self) -> None:
        """The calling thread copies for this load from now on."""
        host.pin_thread(self.cpus)
        self.stream.enter()

    def put(self, extents: Iterable[Extent], address: int) -> None:
        """Begin the copies of what was read to an address, one extent behind the other, to where they belong."""
        for extent in extents:
            if extent.cast is None:
                self.stream.copy(self._base + extent.offset, address, extent.nbytes)
            else:
                end = extent.offset + extent.cast.target_bytes(extent.nbytes)
                target = self.memory[extent.offset : end].view(extent.cast.target)
                self.stream.cast(target, _tensor_at(address, extent.nbytes).view(extent.cast.source))
            address += extent.nbytes

    def went(self, way: Way, nbytes: int) -> None:
        with self._lock:
            self._bytes[way] += nbytes

    def no_mapping(self, error: Exception) -> None:
        self._mappable = False
        warn_once(f"{error}: the pages of files and images are copied by the processor instead, at a part of the speed")

    def no_direct(self) -> None:
        self._direct = False

    def close(self) -> None:
        """Once no thread works: every copy arrives, and the ring goes back to the pool (after a failure: for good)."""
        self.stream.finish()
        with self._lock:
            ring, self._ring = self._ring, None
        if ring is None:
            return
        if sum(self._bytes.values()) == self._total_bytes:
            RINGS.give(self._ring_key, ring)
        else:
            ring.close()

    def _attach(self) -> RegisteredImage | None:
        if self.source.image_fd is None:
            return None
        try:
            return IMAGES.attach(self.source.image_fd, self.runtime)
        except OSError as error:
            warn_once(f"an image can't be mapped ({error}): it is copied by the processor instead")
            return None


class CudaLane:
    """One thread's: takes chunks, and finishes with every byte of its own on the device."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._stream = transfer.stream
        self._windows: deque[tuple[int | None, Mark]] = deque()
        transfer.enter()

    def take(self, chunk: Chunk) -> int:
        way = self._transfer.way(chunk)
        if way is Way.MAPPED and not self._mapped(chunk):
            way = Way.RING
        if way is not Way.MAPPED:
            for part in self._transfer.parts(chunk):
                way = self._through_ring(part, way)
        self._transfer.went(way, chunk.nbytes)
        return chunk.nbytes

    def finish(self) -> None:
        self._stream.finish()
        self._retire(0)

    def _through_ring(self, part: Chunk, way: Way) -> Way:
        ring, source = self._transfer.ring(), self._transfer.source
        buffer = ring.take()
        try:
            head = source.read_direct(buffer.memory, part.shard, part.start, part.nbytes) if way is Way.DIRECT else None
            if way is Way.DIRECT and head is None:
                self._transfer.no_direct()
                way = self._transfer.way(part)
                way = Way.RING if way is Way.MAPPED else way
            if head is None:
                head = 0
                if part.plain:
                    source.read_into(buffer.memory[: part.nbytes], part.shard, part.start)
                else:
                    source.read_extent(buffer.memory[: part.nbytes], part.extents[0])
            ring.pin(buffer)
            self._transfer.put(part.extents, buffer.address + head)
            buffer.mark = self._stream.mark(buffer.mark)
            if self._transfer.tee is not None:
                self._transfer.tee(part.shard, part.start, buffer.memory[head : head + part.nbytes])
        finally:
            ring.give(buffer)
        if way is Way.BUFFERED:
            source.drop(part.shard, part.start, part.nbytes)
        return way

    def _mapped(self, chunk: Chunk) -> bool:
        try:
            address, registered = self._pin(chunk)
        except (OSError, RegistrationFailed) as error:
            self._transfer.no_mapping(error)
            return False
        self._transfer.put(chunk.extents, address)
        self._windows.append((registered, self._stream.mark()))
        self._retire(self._transfer.profile.depth)
        return True

    def _pin(self, chunk: Chunk) -> tuple[int, int | None]:
        """The address of the chunk's registered bytes, and the one to be unregistered after the copy."""
        source, runtime = self._transfer.source, self._transfer.runtime
        if self._transfer.image is not None:
            return self._transfer.image.pin(chunk.start + source.shifts[chunk.shard]), None
        mapping = source.mapping(chunk.shard)
        begin, nbytes = pages(chunk.start, chunk.nbytes)
        mapping.populate(begin, nbytes)
        runtime.register(mapping.address + begin, nbytes, read_only=True)
        if not source.whole(chunk.shard):
            runtime.unregister(mapping.address + begin)
            raise OSError("the file has changed its size")
        return mapping.address + chunk.start, mapping.address + begin

    def _retire(self, keep: int) -> None:
        while len(self._windows) > keep:
            registered, mark = self._windows.popleft()
            mark.wait()
            if registered is not None:
                self._transfer.runtime.unregister(registered)


class RingLane:
    """One thread's, that is given its extents one by one (reader.read): through the ring alone."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._buffer: Buffer | None = None
        transfer.enter()

    def buffer(self, extent: Extent) -> memoryview:
        self._buffer = self._transfer.ring().take()
        return self._buffer.memory[: extent.nbytes]

    def commit(self, extent: Extent) -> None:
        if self._buffer is None:
            raise RuntimeError("commit() without a buffer()")
        self._transfer.ring().pin(self._buffer)
        self._transfer.put((extent,), self._buffer.address)
        self._buffer.mark = self._transfer.stream.mark(self._buffer.mark)
        self._transfer.ring().give(self._buffer)
        self._transfer.went(Way.RING, extent.nbytes)

    def finish(self) -> None:
        self._transfer.stream.finish()


def _tensor_at(address: int, nbytes: int) -> Tensor:
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)
