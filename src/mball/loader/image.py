"""The source image: a model's shards as stored, in a memfd that outlives the processes that read it."""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import closing

from mball.device.host import host_threads
from mball.device.memfd import Writer, create, seal
from mball.errors import ReadError
from mball.loader.checkpoint import Checkpoint
from mball.loader.lanes import FileLane
from mball.loader.manifest import Manifest
from mball.loader.plan import Extent, chunked
from mball.loader.reader import Progress, Source, read

__all__ = ["create", "fill", "key", "seal"]

_KIND = b"mball source image 1"


def key(checkpoint: Checkpoint) -> bytes:
    """SHA-256 that names the source image as the shards are now: of their paths, headers, sizes and times of change
    (ctime: whoever writes to a file can't set it back), so that nothing large is read.

    Raises ReadError.
    """
    digest = hashlib.sha256(_KIND)
    for shard in checkpoint.shards:
        try:
            with shard.path.open("rb") as file:
                status = os.fstat(file.fileno())
                head = file.read(shard.data_start)
        except OSError as error:
            raise ReadError(f"cannot be read: {error.strerror}", file=str(shard.path)) from error
        where = os.fsencode(shard.path.resolve())
        for part in (where, b"%d %d" % (status.st_size, status.st_ctime_ns), head):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def fill(
    checkpoint: Checkpoint,
    image_fd: int,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    verify: Manifest | None = None,
) -> int:
    """Copy every shard's data section to its place in the image, checked against `verify`; the bytes copied.

    Raises ReadError where a shard fails or the image is too small, DigestMismatch, OSError where memory for the image
    runs out, Cancelled. After an error the image holds rubbish: close it.
    """
    found = os.fstat(image_fd).st_size
    if found < checkpoint.image_bytes:
        raise ReadError(f"its image wants {checkpoint.image_bytes} bytes, has {found}", file=str(checkpoint.path))
    extents = chunked(
        Extent(number, shard.data_start, shard.data_bytes, shard.image_offset)
        for number, shard in enumerate(checkpoint.shards)
    )
    with closing(Writer(image_fd)) as image:
        return read(
            extents,
            Source(checkpoint),
            lambda: FileLane(image),
            threads=threads if threads is not None else host_threads(),
            progress=progress,
            cancel=cancel,
            verify=verify.verifier(checkpoint) if verify is not None else None,
        )
