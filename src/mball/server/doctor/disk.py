"""How fast model files come from the disk and from the page cache: short probes, bounded in time and bytes."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mball.server.doctor.report import Finding
from mball.units import GiB, MiB, format_bytes, format_rate

_PIECE_BYTES = 4 * MiB
_PROBE_FILE_BYTES = 256 * MiB
_CACHED_BYTES = 512 * MiB  # more than a processor's own caches hold
_THREADS = 4
_ENOUGH_RATE = 1 * GiB
_EXAMPLE_BYTES = 15 * GiB
_MAX_FILES_LOOKED_AT = 10_000


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes read in seconds; `direct` where the page cache was passed by."""

    nbytes: int
    seconds: float
    direct: bool

    @property
    def bytes_per_s(self) -> float:
        return self.nbytes / self.seconds


def findings(folder: Path, probe_s: float) -> list[Finding]:
    """Reads a large file of `folder`, or one that it makes there for the time."""
    try:
        with _file(folder) as file:
            return [_disk(folder, read_direct(file, probe_s)), _page_cache(read_cached(file, probe_s))]
    except OSError as error:
        return [
            Finding(
                "disk",
                f"{folder} cannot be read ({error.strerror or error})",
                False,
                "nothing is known of how fast models load",
                "name a folder that can be read and written",
            )
        ]


def _disk(folder: Path, rate: Rate) -> Finding:
    fine = rate.bytes_per_s >= _ENOUGH_RATE
    seconds = _EXAMPLE_BYTES / rate.bytes_per_s
    return Finding(
        "disk",
        f"{format_rate(rate.nbytes, rate.seconds)}{'' if rate.direct else ' (no O_DIRECT here)'} from {folder}",
        fine,
        f"a model of {format_bytes(_EXAMPLE_BYTES)} takes {seconds:.0f} s from it",
        "keep models on NVMe, and give dram_bytes enough that they come back from DRAM",
        {"bytes_per_s": round(rate.bytes_per_s), "direct": rate.direct, "path": str(folder)},
    )


def _page_cache(rate: Rate) -> Finding:
    return Finding(
        "page cache",
        f"{format_rate(rate.nbytes, rate.seconds)} on {_threads()} threads",
        data={"bytes_per_s": round(rate.bytes_per_s), "threads": _threads()},
    )


def read_direct(file: Path, limit_s: float) -> Rate:
    """Past the page cache where the file system can, else through it. Raises OSError."""
    try:
        return _read(file, os.O_DIRECT, _THREADS, file.stat().st_size, limit_s)
    except OSError:
        return _read(file, 0, _THREADS, file.stat().st_size, limit_s)


def read_cached(file: Path, limit_s: float) -> Rate:
    """Out of the page cache, after `limit_s` at most to fill it. Raises OSError."""
    deadline = time.monotonic() + limit_s
    with file.open("rb", buffering=0) as opened:
        while opened.tell() < _CACHED_BYTES and time.monotonic() < deadline and opened.read(_PIECE_BYTES):
            pass
        size = opened.tell()
    return _read(file, 0, _threads(), size, limit_s)


def _threads() -> int:
    return min(8, len(os.sched_getaffinity(0)))


def _read(file: Path, flags: int, threads: int, size: int, limit_s: float) -> Rate:
    """Whole pieces of the file's first `size` bytes, over and over until the time is up."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        pieces = itertools.cycle(range(0, max(1, size - _PIECE_BYTES + 1), _PIECE_BYTES))
        started = time.monotonic()
        deadline = started + limit_s

        def work() -> int:
            with mmap.mmap(-1, _PIECE_BYTES) as buffer:
                done = os.preadv(descriptor, [buffer], next(pieces))  # one at least, however late the thread begins
                while time.monotonic() < deadline:
                    done += os.preadv(descriptor, [buffer], next(pieces))
            return done

        with ThreadPoolExecutor(threads) as pool:
            total = sum(future.result() for future in [pool.submit(work) for _ in range(threads)])
        if not total:
            raise OSError(f"{file} became empty")
        return Rate(total, time.monotonic() - started, bool(flags & os.O_DIRECT))
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _file(folder: Path) -> Iterator[Path]:
    """A file worth reading: a large one that is there, else one written for the time."""
    looked_at = itertools.islice(folder.rglob("*.safetensors"), _MAX_FILES_LOOKED_AT)
    there = max(looked_at, key=lambda path: path.stat().st_size, default=None)
    if there is not None and there.stat().st_size >= _PROBE_FILE_BYTES // 2:
        yield there
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".mball-probe-") as made:
        block = os.urandom(_PIECE_BYTES)
        for _ in range(_PROBE_FILE_BYTES // _PIECE_BYTES):
            made.write(block)
        made.flush()
        os.fsync(made.fileno())
        yield Path(made.name)
