"""How many threads, how large a buffer: from what the machine has, and what a probe of it (see probe) found."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mball.device.host import available_bytes, usable_cpus
from mball.loader.paths import FEW_CORES
from mball.loader.ring import bounded
from mball.units import MiB


@dataclass(frozen=True, slots=True)
class Choice:
    """What a probe chooses."""

    threads: int
    buffer_bytes: int


PINNED_BYTES = 512 * MiB
"""The most host memory that one load pins for its ring."""

PINNED_SHARE = 0.25
"""Of the memory that is still to be had, at most so much is pinned."""

BUFFER_BYTES = 8 * MiB
"""One read: smaller ones wait for the interpreter's lock, larger ones pin more and leave the processor's cache."""

MOST_THREADS = 16

FEW_THREADS = 3
"""With few cores: each registers a window of a file while the driver copies another's."""

SPARE_CORES = 2
"""Left to whoever wakes the readers: with a reader on every core they wait for the interpreter's lock instead."""

SPARE_BUFFERS = 6
"""Being copied to the device while each thread fills one. A small ring stays in the processor's cache."""

DISK = Choice(16, 16 * MiB)
"""What keeps a disk busy that is far away (a hypervisor's, a network's): many large reads in flight."""

TEE_THREADS = 12
"""More of them where each also writes what it read into an image, and has no read in flight meanwhile."""

WINDOW_BYTES = 256 * MiB
"""Of a mapped file, registered together: smaller ones cost more calls of the driver."""

DEPTH = 2
"""Windows of one thread that are being copied while it registers the next."""

_MACHINE_ID = Path("/etc/machine-id")


@dataclass(frozen=True, slots=True)
class Profile:
    """`cores` decide the way (paths.choose), `window_bytes` are registered together where a file is mapped, `depth` of
    them at once per thread."""

    cores: int
    threads: int
    buffer_bytes: int
    buffers: int
    window_bytes: int = WINDOW_BYTES
    depth: int = DEPTH

    @property
    def chunk_bytes(self) -> int:
        return self.window_bytes if self.cores <= FEW_CORES else self.buffer_bytes


def default_choice(cpus: int) -> Choice:
    """One thread a core less SPARE_CORES, up to MOST_THREADS."""
    return Choice(min(cpus - SPARE_CORES, MOST_THREADS) if cpus > FEW_CORES else FEW_THREADS, BUFFER_BYTES)


def profile(
    threads: int | None = None,
    *,
    pinned_bytes: int = PINNED_BYTES,
    cpus: int | None = None,
    room_bytes: int | None = None,
    choice: Choice | None = None,
    cold: bool = False,
    tee: bool = False,
) -> Profile:
    """For this process: `threads` where they are given; else `choice`, what a probe found here, or the default.

    `cold`: the bytes come from the disk. `tee`: they are written into an image on the way.
    """
    cpus = usable_cpus() if cpus is None else cpus
    room_bytes = available_bytes() if room_bytes is None else room_bytes
    if choice is None and cold:
        choice = replace(DISK, threads=DISK.threads + (TEE_THREADS if tee else 0))
    choice = choice or (remembered(cpus) if threads is None else None) or default_choice(cpus)
    threads = max(1, threads if threads is not None else choice.threads)
    limit_bytes = min(pinned_bytes, int(room_bytes * PINNED_SHARE))
    buffer_bytes, buffers = bounded(choice.buffer_bytes, threads + SPARE_BUFFERS, limit_bytes, threads)
    window_bytes = WINDOW_BYTES
    while window_bytes > MiB and window_bytes * threads * (DEPTH + 1) > room_bytes * PINNED_SHARE:
        window_bytes //= 2
    return Profile(min(cpus, threads), threads, buffer_bytes, buffers, window_bytes)


def remembered(cpus: int) -> Choice | None:
    """What a probe found on this machine with so many cores; None where there was none, or its file is damaged."""
    try:
        found = json.loads(_cache().read_text())[_key(cpus)]
        choice = Choice(int(found["threads"]), int(found["buffer_bytes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sane = 1 <= choice.threads <= 4 * MOST_THREADS and choice.buffer_bytes in range(MiB, PINNED_BYTES, MiB)
    return choice if sane else None


def remember(cpus: int, choice: Choice) -> None:
    """Raises OSError."""
    path = _cache()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    begun = path.with_name(f"{path.name}.{os.getpid()}")
    begun.write_text(json.dumps(known | {_key(cpus): asdict(choice)}, indent=1) + "\n")
    begun.replace(path)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mball" / "loader-probe.json"


def _key(cpus: int) -> str:
    try:
        machine = _MACHINE_ID.read_text().strip()
    except OSError:
        machine = ""
    return f"{machine} {cpus} cores"
