"""How many threads, how large a buffer: from what the machine has."""

from __future__ import annotations

from dataclasses import dataclass

from mball.device.host import available_bytes, usable_cpus
from mball.loader.paths import FEW_CORES
from mball.loader.ring import bounded
from mball.units import MiB

PINNED_BYTES = 512 * MiB
"""The most host memory that one load pins for its ring."""

PINNED_SHARE = 0.25
"""Of the memory that is still to be had, at most so much is pinned."""

BUFFER_BYTES = 8 * MiB
"""One read: smaller ones wait for the interpreter's lock, larger ones pin more and leave the processor's cache."""

MOST_THREADS = 16

SPARE_CORES = 2
"""Left to whoever wakes the readers: with a reader on every core they wait for the interpreter's lock instead."""

SPARE_BUFFERS = 6
"""Being copied to the device while each thread fills one. A small ring stays in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Profile:
    """`cores` decide the way (paths.choose), `window_bytes` are registered together where a file is mapped, `depth` of
    them at once per thread."""

    cores: int
    threads: int
    buffer_bytes: int
    buffers: int
    window_bytes: int = 64 * MiB
    depth: int = 2

    @property
    def chunk_bytes(self) -> int:
        return self.window_bytes if self.cores <= FEW_CORES else self.buffer_bytes


def profile(
    threads: int | None = None,
    *,
    buffer_bytes: int = BUFFER_BYTES,
    pinned_bytes: int = PINNED_BYTES,
    cpus: int | None = None,
    room_bytes: int | None = None,
) -> Profile:
    """For this process: `threads` where they are given, else one a core less SPARE_CORES, up to MOST_THREADS."""
    cpus = usable_cpus() if cpus is None else cpus
    room_bytes = available_bytes() if room_bytes is None else room_bytes
    if threads is None:
        threads = min(cpus - SPARE_CORES, MOST_THREADS) if cpus > FEW_CORES else 2
    threads = max(1, threads)
    limit_bytes = min(pinned_bytes, int(room_bytes * PINNED_SHARE))
    buffer_bytes, buffers = bounded(buffer_bytes, threads + SPARE_BUFFERS, limit_bytes, threads)
    return Profile(min(cpus, threads), threads, buffer_bytes, buffers)
