"""A short probe of the machine: how many threads and how large a buffer bring the most to a GPU. Kept per machine."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mball.device import memfd
from mball.device.cuda import CudaRuntime, Runtime
from mball.device.host import usable_cpus
from mball.loader.checkpoint import Checkpoint, Shard
from mball.loader.paths import FEW_CORES, Way
from mball.loader.plan import Extent
from mball.loader.slab import open_slab
from mball.loader.source import Source
from mball.loader.transfer import Transfer
from mball.loader.tuning import MOST_THREADS, SPARE_CORES, Choice, Profile, default_choice, profile, remember
from mball.loader.workers import work_through
from mball.units import MiB

PROBE_BYTES = 512 * MiB
ROUNDS = 3

CLEARLY = 1.05
"""Another choice than the default must be so many times as fast."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """`rates` of what was tried, in bytes a second; none where there was nothing to choose."""

    choice: Choice
    rates: Mapping[Choice, float]


def tune(device: str | torch.device = "cuda") -> Tuned:
    """Measure, and keep the best choice for later loads on this machine (in XDG_CACHE_HOME).

    Takes a second or two, and PROBE_BYTES of memory on the host and on the GPU. With few cores there is nothing to
    choose. Raises DeviceError, OSError.
    """
    slab = open_slab(PROBE_BYTES, torch.device(device))
    slab.populate()
    try:
        return tune_with(CudaRuntime(slab.memory().device), slab.memory())
    finally:
        slab.close()


def tune_with(runtime: Runtime, memory: Tensor) -> Tuned:
    """As `tune`, into memory that is there."""
    cpus = usable_cpus(runtime.cpus())
    default = default_choice(cpus)
    if cpus <= FEW_CORES:
        return Tuned(default, {})
    fd = memfd.create("mball-probe", memory.numel())
    try:
        for at in range(0, memory.numel(), MiB):
            os.pwrite(fd, os.urandom(4096) * (min(MiB, memory.numel() - at) // 4096), at)
        rates = {choice: _rate(runtime, memory, fd, profile(cpus=cpus, choice=choice)) for choice in candidates(cpus)}
    finally:
        os.close(fd)
    best = pick(rates, default)
    remember(cpus, best)
    return Tuned(best, rates)


def candidates(cpus: int) -> list[Choice]:
    """What is tried on so many cores, the default among it."""
    threads = sorted({max(2, min(cpus - spare, MOST_THREADS)) for spare in (2 * SPARE_CORES, SPARE_CORES, 0)})
    tried = [Choice(count, buffer_bytes) for count in threads for buffer_bytes in (4 * MiB, 8 * MiB, 16 * MiB)]
    return list(dict.fromkeys([default_choice(cpus), *tried]))


def pick(rates: Mapping[Choice, float], default: Choice) -> Choice:
    """The fastest, where it is clearly faster than the default."""
    best = max(rates, key=lambda choice: rates[choice])
    return best if rates[best] > CLEARLY * rates.get(default, 0.0) else default


def _rate(runtime: Runtime, memory: Tensor, fd: int, chosen: Profile) -> float:
    nbytes = memory.numel()
    path = Path(f"/proc/self/fd/{fd}")
    checkpoint = Checkpoint(path, (Shard(path, nbytes, 0, 0),), {}, nbytes, nbytes)
    seconds = []
    # The first makes the ring.
    for _ in range(1 + ROUNDS):
        source = Source(checkpoint)
        transfer = Transfer(memory, source, runtime, chosen, total_bytes=nbytes, ways={Way.RING}, cpus=runtime.cpus())

        def idle(transfer: Transfer = transfer, source: Source = source) -> None:
            transfer.close()
            source.close()

        begin = time.perf_counter()
        work_through(
            transfer.chunks([Extent(0, 0, nbytes, 0)]),
            nbytes,
            transfer.lane,
            threads=transfer.threads,
            when_idle=idle,
        )
        seconds.append(time.perf_counter() - begin)
    return nbytes / min(seconds[1:])
