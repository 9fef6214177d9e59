"""What a disk gives to nobody but O_DIRECT: the given bytes of files, at several depths."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean

from mball.bench.contenders import Cannot
from mball.device.mapping import Mapping
from mball.units import MiB

DEPTHS = (1, 4, 16, 32)
"""Reads of CHUNK_BYTES in flight."""

CHUNK_BYTES = 4 * MiB
_ALIGN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a file."""

    path: str
    start: int
    nbytes: int


Rates = dict[int, float]
"""Bytes a second by depth."""


def rates(stretches: Sequence[Stretch], limit_s: float, depths: Sequence[int] = DEPTHS) -> Rates:
    """Of each depth in turn, which may take `limit_s`. Some disks give most to who comes first. Raises Cannot."""
    return {depth: _rate(stretches, depth, limit_s) for depth in depths}


def best(passes: Sequence[Rates]) -> tuple[int, float]:
    """The depth with the highest mean of all passes, and that. The highest single reading would be noise's."""
    means = {depth: fmean(rates[depth] for rates in passes) for depth in passes[0]}
    return max(means.items(), key=lambda item: item[1])


def _rate(stretches: Sequence[Stretch], depth: int, limit_s: float) -> float:
    fds: dict[str, int] = {}
    buffers: list[Mapping] = []
    try:
        for path in {stretch.path for stretch in stretches}:
            fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        buffers += [Mapping(CHUNK_BYTES) for _ in range(depth)]
        work = deque(_reads(stretches, fds))
        end = threading.Event()

        def run(buffer: Mapping) -> int:
            count = 0
            while not end.is_set():
                try:
                    fd, at = work.popleft()
                except IndexError:
                    break
                count += os.preadv(fd, [buffer.buffer], at)
            return count

        with ThreadPoolExecutor(depth) as pool:
            timer = threading.Timer(limit_s, end.set)
            began = time.perf_counter()
            timer.start()
            nbytes = sum(pool.map(run, buffers))
            seconds = time.perf_counter() - began
            timer.cancel()
            timer.join()
    except OSError as error:
        why = "its file system refuses O_DIRECT" if error.errno == errno.EINVAL else "it can't be read"
        raise Cannot(f"{why}: {error.strerror}") from error
    finally:
        for buffer in buffers:
            buffer.close()
        for fd in fds.values():
            os.close(fd)
    return nbytes / seconds


def _reads(stretches: Sequence[Stretch], fds: dict[str, int]) -> list[tuple[int, int]]:
    """In order, the whole chunks alone where there is one."""
    found = []
    for stretch in stretches:
        begin = stretch.start // _ALIGN_BYTES * _ALIGN_BYTES
        found += [
            (fds[stretch.path], at)
            for at in range(begin, max(begin + 1, stretch.start + stretch.nbytes - CHUNK_BYTES + 1), CHUNK_BYTES)
        ]
    return found
