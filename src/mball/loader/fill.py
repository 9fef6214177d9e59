"""Planned extents into a slab, on whatever device it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from mball.device.cuda import CudaRuntime, Runtime
from mball.device.host import host_threads, usable_cpus
from mball.device.memfd import Writer
from mball.loader.checkpoint import Checkpoint
from mball.loader.lanes import FileLane, HostLane, Lane, ScratchLane, TeeLane
from mball.loader.paths import EVERY_WAY, Way
from mball.loader.plan import Extent, chunked, grouped, uncovered
from mball.loader.reader import read
from mball.loader.slab import Slab
from mball.loader.source import ImageReader, Source
from mball.loader.transfer import RingLane, Transfer
from mball.loader.tuning import profile
from mball.loader.workers import Progress, work_through
from mball.units import MiB

STORED_BYTES = 16 * MiB
"""Of a stored image in one read: whole slots of most sizes."""

if TYPE_CHECKING:  # it hashes, and an engine with an interpreter of its own may have nothing to do that with
    from mball.loader.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Options:
    """How to load.

    `threads`: None for what the machine has. `ways`: those that a GPU's bytes may take (see paths.Way), to try or
    measure one alone. `verify`: a manifest, whose digests every byte is checked against; then the way is the ring.
    `fill_image_fd`: an empty image, which is filled with what is read on the way, and is whole after a load. `stored`:
    reads the image from where it is kept, where no memfd is given.
    """

    threads: int | None = None
    ways: Collection[Way] = EVERY_WAY
    progress: Progress | None = None
    cancel: threading.Event | None = None
    verify: Manifest | None = None
    fill_image_fd: int | None = None
    stored: ImageReader | None = None


@dataclass(frozen=True, slots=True)
class Filled:
    """Bytes read, and how many of them went which way (on a GPU)."""

    nbytes: int
    by_way: Mapping[str, int] = field(default_factory=dict)


def fill(
    extents: Sequence[Extent], checkpoint: Checkpoint, slab: Slab, options: Options, image_fd: int | None = None
) -> Filled:
    """Read every extent into the populated slab, from the source image where one is given, else from the shards.

    Raises ReadError, DigestMismatch, Cancelled, TimeoutError, and SwapMiss from `stored`.
    """
    memory = slab.memory()
    with ExitStack() as ends:
        image: Writer | None = None
        if options.fill_image_fd is not None:
            image = Writer(options.fill_image_fd)
            ends.callback(image.close)
        source = Source(checkpoint, image_fd, options.stored)
        if memory.device.type == "cuda":
            filled = through(CudaRuntime(memory.device), extents, checkpoint, slab, options, source, image)
        else:
            filled = _on_the_host(extents, checkpoint, memory, options, source, image)
        if image is not None:
            _complete(extents, checkpoint, image, options)
    return filled


def _on_the_host(
    extents: Sequence[Extent],
    checkpoint: Checkpoint,
    memory: Tensor,
    options: Options,
    source: Source,
    image: Writer | None,
) -> Filled:
    threads = options.threads if options.threads is not None else host_threads()
    if not source.is_files and source.image_fd is None and options.verify is None and image is None:
        total_bytes = sum(extent.nbytes for extent in extents)
        work_through(
            grouped(extents, STORED_BYTES, source.shifts),
            total_bytes,
            lambda: ScratchLane(memory, source, STORED_BYTES),
            threads=threads,
            progress=options.progress,
            cancel=options.cancel,
            when_idle=source.close,
        )
        return Filled(total_bytes)
    nbytes = read(
        chunked(extents),
        source,
        lambda: _teed(HostLane(memory), checkpoint, image),
        threads=threads,
        progress=options.progress,
        cancel=options.cancel,
        verify=options.verify.verifier(checkpoint) if options.verify is not None else None,
    )
    return Filled(nbytes)


def through(
    runtime: Runtime,
    extents: Sequence[Extent],
    checkpoint: Checkpoint,
    slab: Slab,
    options: Options,
    source: Source,
    image: Writer | None = None,
) -> Filled:
    """As `fill`, by a GPU's runtime. Closes the source."""
    near = runtime.cpus()
    cold = not source.mostly_resident()
    chosen = profile(options.threads, cpus=usable_cpus(near), cold=cold, tee=image is not None)
    total_bytes = sum(extent.nbytes for extent in extents)
    transfer = Transfer(
        slab.memory(),
        source,
        runtime,
        chosen,
        total_bytes=total_bytes,
        ways=options.ways,
        cpus=near,
        tee=_tee(checkpoint, image),
    )

    def idle() -> None:
        transfer.close()
        source.close()

    if options.verify is not None:
        read(
            chunked(extents, chosen.buffer_bytes),
            source,
            lambda: _teed(RingLane(transfer), checkpoint, image),
            threads=chosen.threads,
            progress=options.progress,
            cancel=options.cancel,
            verify=options.verify.verifier(checkpoint),
            when_idle=transfer.close,
        )
    else:
        work_through(
            transfer.chunks(extents),
            total_bytes,
            transfer.lane,
            threads=transfer.threads,
            progress=options.progress,
            cancel=options.cancel,
            when_idle=idle,
        )
    return Filled(total_bytes, transfer.bytes_by_way)


def _teed(lane: Lane, checkpoint: Checkpoint, image: Writer | None) -> Lane:
    return lane if image is None else TeeLane(lane, image, checkpoint.image_shifts)


def _tee(checkpoint: Checkpoint, image: Writer | None) -> Callable[[int, int, memoryview], None] | None:
    if image is None:
        return None
    shifts = checkpoint.image_shifts
    return lambda shard, start, content: image.write(content, start + shifts[shard])


def _complete(extents: Sequence[Extent], checkpoint: Checkpoint, image: Writer, options: Options) -> None:
    """An image is whole shards: what the load had no use for is read for the image alone."""
    missing = [
        Extent(number, start, nbytes, start + shard.image_offset - shard.data_start)
        for number, shard in enumerate(checkpoint.shards)
        for start, nbytes in uncovered(
            (extent for extent in extents if extent.shard == number), shard.data_start, shard.size_bytes
        )
    ]
    if missing:
        read(
            chunked(missing),
            Source(checkpoint),
            lambda: FileLane(image),
            threads=host_threads(),
            cancel=options.cancel,
        )
