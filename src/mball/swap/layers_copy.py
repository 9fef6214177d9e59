"""How a layer comes into its cell: read there by threads, or copied by a GPU while it computes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mball.device.cuda import CudaRuntime, CudaStream
from mball.device.mapping import Mapping
from mball.errors import RegistrationFailed
from mball.loader.checkpoint import Checkpoint
from mball.loader.plan import Extent, grouped
from mball.loader.registered import IMAGES, RegisteredImage
from mball.loader.ring import warn_once
from mball.loader.workers import STALL_S
from mball.swap.layers_read import Readers, Reading, staged
from mball.units import GiB, MiB

AHEAD_BYTES = 1 * GiB
"""Pinned host memory for layers that are read ahead of their turn, where LEAST_AHEAD of them do not need more."""

LEAST_AHEAD = 2
MOST_AHEAD = 16

COPY_BYTES = 16 * MiB
"""One copy of the bus: large enough for its full rate, and what a step copies beside it waits for no more than one. A
piece of an image that is registered together is a multiple of it."""


@dataclass(frozen=True, slots=True)
class Parts:
    """One layer's bytes: its number, and what is read from where to which offset of its cell."""

    layer: int
    extents: tuple[Extent, ...]
    nbytes: int


class Fetch(Protocol):
    def arrive(self) -> None:
        """What is computed next finds the layer in its cell. Raises ReadError, Cancelled, TimeoutError."""

    def settle(self) -> bool:
        """Whether nothing writes to the cell any more, arrived or failed; waits for a bounded time."""

    @property
    def seconds(self) -> float | None:
        """What it took, once that is known."""


class Copier(Protocol):
    """Used by the thread that computes."""

    def fetch(self, parts: Parts, cell: Tensor, after: Any) -> Fetch:
        """Begin to bring a layer into a cell, once what was computed before the mark `after` is done. In the order of
        their use. Raises OSError, DeviceError."""

    def expect(self, upcoming: Sequence[Parts]) -> None:
        """These will be fetched next."""

    def used(self) -> Any:
        """A mark behind all that is computed so far."""

    def stamp(self) -> Any:
        """The same, for `between`."""

    def between(self, first: Any, second: Any) -> float | None:
        """Seconds from one stamp to the next; None while the second is not past."""

    def reset(self) -> bool:
        """What was begun is not wanted any more, and every fetch has settled. False where a read hangs."""

    def cancel(self) -> None:
        """Whoever waits for a layer fails soon. Called by any thread."""

    def close(self) -> bool:
        """False where a read hangs in the kernel and may go on."""


class HostCopier:
    """On the CPU: what is used is done, and threads read straight into the cell."""

    def __init__(self, checkpoint: Checkpoint, image_fd: int | None, threads: int) -> None:
        self._readers = Readers(checkpoint, image_fd, threads)

    def fetch(self, parts: Parts, cell: Tensor, after: Any) -> Fetch:
        return _HostFetch(self._readers.read(parts.extents, cell))

    def expect(self, upcoming: Sequence[Parts]) -> None:
        """Slots are host memory already."""

    def used(self) -> None:
        return None

    def stamp(self) -> float:
        return time.perf_counter()

    def between(self, first: float, second: float) -> float:
        return second - first

    def reset(self) -> bool:
        return True

    def cancel(self) -> None:
        self._readers.cancel()

    def close(self) -> bool:
        return self._readers.close()


class _HostFetch:
    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def arrive(self) -> None:
        self._reading.wait()

    def settle(self) -> bool:
        return self._reading.settle()

    @property
    def seconds(self) -> float | None:
        return self._reading.seconds


class CudaCopier:
    """On a GPU: from the registered image by copies alone, that the stream of copies and that of kernels order between
    them; without an image threads read ahead into pinned memory, and the last of them begins the copy."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        image_fd: int | None,
        layers: Sequence[Parts],
        device: torch.device,
        threads: int,
    ) -> None:
        """Registers the image, or makes the ring: a step should wait for neither. Raises ReadError, OSError."""
        self._device = device
        self._runtime = CudaRuntime(device)
        self._stream = CudaStream(device)
        self._copies = {parts.layer: _copies(parts, checkpoint.image_shifts) for parts in layers}
        self._stages = {parts.layer: staged(parts.extents) for parts in layers}
        self._image = self._attach(image_fd)
        self._readers: Readers | None = None
        self._buffers: _Buffers | None = None
        if self._image is None:
            self._readers = Readers(checkpoint, image_fd, threads)
            self._buffers = _Buffers(self._runtime, max(stage.nbytes for stage in self._stages.values()))
        self._ahead: dict[int, tuple[_Buffer, Reading]] = {}

    def fetch(self, parts: Parts, cell: Tensor, after: Any) -> Fetch:
        fetch = _CudaFetch(self._device)
        if self._readers is None or self._buffers is None:
            self._from_image(parts, cell, after, fetch)
        else:
            self._from_files(self._readers, self._buffers, parts, cell, after, fetch)
        return fetch

    def expect(self, upcoming: Sequence[Parts]) -> None:
        if self._readers is None or self._buffers is None:
            return
        for parts in upcoming:
            if parts.layer not in self._ahead:
                buffer = self._buffers.take_free()
                if buffer is None:
                    return
                self._ahead[parts.layer] = buffer, self._read(self._readers, parts, buffer)

    def used(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float | None:
        return _elapsed_s(first, second)

    def reset(self) -> bool:
        if not all(reading.settle() for _, reading in self._ahead.values()):
            return False
        self._ahead.clear()
        if self._buffers is not None:
            self._buffers.reset()
        return True

    def cancel(self) -> None:
        if self._readers is not None:
            self._readers.cancel()

    def close(self) -> bool:
        idle = self._readers is None or self._readers.close()
        self._stream.finish()
        if idle and self._buffers is not None:
            self._buffers.close()
        return idle

    def _attach(self, image_fd: int | None) -> RegisteredImage | None:
        """None where the driver won't have it: then threads read it as they read a file."""
        if image_fd is None:
            return None
        try:
            image = IMAGES.attach(image_fd, self._runtime)
            for copies in self._copies.values():
                for position, _, _ in copies:
                    image.pin(position)
        except (OSError, RegistrationFailed) as error:
            warn_once(f"an image can't be registered ({error}): its layers are copied by the processor first")
            return None
        return image

    def _from_image(self, parts: Parts, cell: Tensor, after: Any, fetch: _CudaFetch) -> None:
        if self._image is None:
            raise RuntimeError("there is no image")
        self._begin(after, fetch)
        base = cell.data_ptr()
        for position, offset, nbytes in self._copies[parts.layer]:
            self._stream.copy(base + offset, self._image.pin(position), nbytes)
        fetch.end(self._stream)

    def _from_files(
        self, readers: Readers, buffers: _Buffers, parts: Parts, cell: Tensor, after: Any, fetch: _CudaFetch
    ) -> None:
        ahead = self._ahead.pop(parts.layer, None)
        if ahead is None:
            free = buffers.take()
            ahead = free, self._read(readers, parts, free)
        buffer, fetch.reading = ahead
        computing = threading.current_thread()

        def copy() -> None:
            if threading.current_thread() is not computing:
                self._stream.enter()
            self._begin(after, fetch)
            base, places = buffer.mapping.address, self._stages[parts.layer].places
            for part, place in zip(parts.extents, places, strict=True):
                self._stream.copy(cell.data_ptr() + part.offset, base + place, part.nbytes)
            fetch.end(self._stream)
            buffers.give(buffer, fetch.copied)

        fetch.reading.then(copy)

    def _read(self, readers: Readers, parts: Parts, buffer: _Buffer) -> Reading:
        return readers.stage(parts.extents, self._stages[parts.layer], buffer.mapping)

    def _begin(self, after: Any, fetch: _CudaFetch) -> None:
        if after is not None:
            self._stream.follow(after)
        self._stream.stamp(fetch.begun)


def _copies(parts: Parts, shifts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Byte of the image, byte of the cell, count: none is larger than COPY_BYTES, or lies in two pieces of the image
    that are registered apart."""
    copies: list[tuple[int, int, int]] = []
    for chunk in grouped(parts.extents, COPY_BYTES, shifts):
        at = chunk.start + shifts[chunk.shard]
        for extent in chunk.extents:
            copies.append((at, extent.offset, extent.nbytes))
            at += extent.nbytes
    return copies


class _CudaFetch:
    """`reading`: what has to be there before the copy can begin."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begun: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.copied: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.reading: Reading | None = None
        self._queued = threading.Event()

    def end(self, stream: CudaStream) -> None:
        stream.stamp(self.copied)
        self._queued.set()

    def arrive(self) -> None:
        if self.reading is not None:
            self.reading.wait()
        if not self._queued.wait(STALL_S):
            raise TimeoutError(f"a layer's copy was not begun within {STALL_S:.0f} s")
        torch.cuda.current_stream(self._device).wait_event(self.copied)

    def settle(self) -> bool:
        if self.reading is not None and not self.reading.settle():
            return False
        if self._queued.is_set():
            self.copied.synchronize()
        return True

    @property
    def seconds(self) -> float | None:
        if self.reading is not None:
            return self.reading.seconds
        return _elapsed_s(self.begun, self.copied) if self._queued.is_set() else None


@dataclass(slots=True, eq=False)
class _Buffer:
    """Pinned memory for one layer; free once `copied` is past."""

    mapping: Mapping
    registered: bool
    copied: torch.cuda.Event | None = None


@dataclass(slots=True)
class _Buffers:
    """The ring of layers that are read ahead."""

    runtime: CudaRuntime
    nbytes: int
    _all: list[_Buffer] = field(default_factory=list)
    _free: deque[_Buffer] = field(default_factory=deque)
    _given: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        for _ in range(max(LEAST_AHEAD, min(MOST_AHEAD, AHEAD_BYTES // max(1, self.nbytes)))):
            self._all.append(self._make())
        self._free.extend(self._all)

    def take(self) -> _Buffer:
        """Waits for the oldest copy out of one. Raises TimeoutError."""
        with self._given:
            if not self._given.wait_for(lambda: bool(self._free), STALL_S):
                raise TimeoutError(f"no pinned buffer came free for a layer within {STALL_S:.0f} s")
            buffer = self._free.popleft()
        if buffer.copied is not None:
            buffer.copied.synchronize()
        return buffer

    def take_free(self) -> _Buffer | None:
        """One that can be read into at once, if there is one."""
        with self._given:
            if not self._free:
                return None
            copied = self._free[0].copied
            if copied is not None and not copied.query():  # type: ignore[no-untyped-call]
                return None
            return self._free.popleft()

    def reset(self) -> None:
        """No read and no copy is under way: all are free."""
        with self._given:
            self._free = deque(self._all)

    def give(self, buffer: _Buffer, copied: torch.cuda.Event) -> None:
        with self._given:
            buffer.copied = copied
            self._free.append(buffer)
            self._given.notify_all()

    def close(self) -> None:
        """No read and no copy is under way."""
        for buffer in self._all:
            if buffer.registered:
                self.runtime.unregister(buffer.mapping.address)
            buffer.mapping.close()
        self._all.clear()
        self._free.clear()

    def _make(self) -> _Buffer:
        mapping = Mapping(self.nbytes)
        registered = True
        try:
            mapping.populate(0, mapping.whole_pages)
            self.runtime.register(mapping.address, mapping.whole_pages)
        except RegistrationFailed as error:
            registered = False
            warn_once(f"{error}; copies from pageable memory take about six times as long")
        return _Buffer(mapping, registered)


def _elapsed_s(first: Any, second: Any) -> float | None:
    return first.elapsed_time(second) / 1e3 if second.query() and first.query() else None
