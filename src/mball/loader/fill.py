"""Planned extents into a slab, on whatever device it is."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mball.device.cuda import CudaRuntime, Runtime
from mball.device.host import host_threads
from mball.loader.checkpoint import Checkpoint
from mball.loader.lanes import HostLane
from mball.loader.manifest import Manifest
from mball.loader.paths import EVERY_WAY, Way
from mball.loader.plan import Extent, chunked
from mball.loader.reader import read
from mball.loader.slab import Slab
from mball.loader.source import Source
from mball.loader.transfer import RingLane, Transfer
from mball.loader.tuning import profile
from mball.loader.workers import Progress, work_through


@dataclass(frozen=True, slots=True)
class Options:
    """How to load.

    `threads`: None for what the machine has. `ways`: those that a GPU's bytes may take (see paths.Way), to try or
    measure one alone. `verify`: a manifest, whose digests every byte is checked against; then the way is the ring.
    """

    threads: int | None = None
    ways: Collection[Way] = EVERY_WAY
    progress: Progress | None = None
    cancel: threading.Event | None = None
    verify: Manifest | None = None


@dataclass(frozen=True, slots=True)
class Filled:
    """Bytes read, and how many of them went which way (on a GPU)."""

    nbytes: int
    by_way: Mapping[str, int] = field(default_factory=dict)


def fill(
    extents: Sequence[Extent], checkpoint: Checkpoint, slab: Slab, options: Options, image_fd: int | None = None
) -> Filled:
    """Read every extent into the populated slab, from the source image where one is given, else from the shards.

    Raises ReadError, DigestMismatch, Cancelled, TimeoutError.
    """
    source = Source(checkpoint, image_fd)
    memory = slab.memory()
    if memory.device.type == "cuda":
        return through(CudaRuntime(memory.device), extents, checkpoint, slab, options, source)
    threads = options.threads if options.threads is not None else host_threads()
    nbytes = read(
        chunked(extents),
        source,
        lambda: HostLane(memory),
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
) -> Filled:
    """As `fill`, by a GPU's runtime. Closes the source."""
    chosen = profile(options.threads)
    total_bytes = sum(extent.nbytes for extent in extents)
    transfer = Transfer(
        slab.memory(), source, runtime, chosen, total_bytes=total_bytes, ways=options.ways, cpus=runtime.cpus()
    )

    def idle() -> None:
        transfer.close()
        source.close()

    if options.verify is not None:
        read(
            chunked(extents, chosen.buffer_bytes),
            source,
            lambda: RingLane(transfer),
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
            threads=chosen.threads,
            progress=options.progress,
            cancel=options.cancel,
            when_idle=idle,
        )
    return Filled(total_bytes, transfer.bytes_by_way)
