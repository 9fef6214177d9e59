"""What the hardware does without any loader: the bus, the disk, the driver's registration of memory."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mball.bench.contenders import Cannot, Spec, files
from mball.units import GiB, MiB

BUS = "bus: pinned memory to the GPU"
DISK_DIRECT = "disk: raw read, O_DIRECT"
DISK_BUFFERED = "disk: raw read, buffered"
REGISTER = "registering the image"

_BUS_BYTES = 4 * GiB
_CHUNK_BYTES = 16 * MiB
_PINNED_CHUNKS = 16
_READERS = 16
_BUFFERED_CHUNK_BYTES = 4 * MiB
_REGISTER_BYTES = 256 * MiB


def bus(spec: Spec) -> dict[str, Any]:
    """4 GiB in 16 MiB chunks from pinned memory, after as many for the first touch."""
    pinned = torch.empty(_PINNED_CHUNKS * _CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_BUS_BYTES, dtype=torch.uint8, device=spec.device)
    sources = torch.split(pinned, _CHUNK_BYTES)
    seconds = []
    for _ in range(2):
        torch.cuda.synchronize(spec.device)
        begin = time.perf_counter()
        for number, part in enumerate(torch.split(target, _CHUNK_BYTES)):
            part.copy_(sources[number % _PINNED_CHUNKS], non_blocking=True)
        torch.cuda.synchronize(spec.device)
        seconds.append(time.perf_counter() - begin)
    return {"bytes": _BUS_BYTES, "first_s": seconds[0], "steady_s": seconds[1]}


def disk_direct(spec: Spec) -> dict[str, Any]:
    """Around the page cache, 16 reads of 16 MiB in flight."""
    return _read(files(spec), os.O_DIRECT, _CHUNK_BYTES)


def disk_buffered(spec: Spec) -> dict[str, Any]:
    """Through the page cache, 16 reads of 4 MiB in flight."""
    return _read(files(spec), 0, _BUFFERED_CHUNK_BYTES)


def register(spec: Spec) -> dict[str, Any]:
    """Mapping the image read-only and letting the GPU read it, 256 MiB at a time."""
    from mball.device.cuda import CudaRuntime
    from mball.device.mapping import Mapping

    if spec.image_fd is None:
        raise Cannot("there is no image")
    torch.zeros(1, device=spec.device)
    runtime = CudaRuntime(torch.device(spec.device))
    nbytes = os.fstat(spec.image_fd).st_size
    begin = time.perf_counter()
    mapping = Mapping(nbytes, spec.image_fd)
    for at in range(0, nbytes, _REGISTER_BYTES):
        part = min(_REGISTER_BYTES, nbytes - at)
        mapping.populate(at, part)
        runtime.register(mapping.address + at, part, read_only=True)
    return {"bytes": nbytes, "first_s": time.perf_counter() - begin}


BASELINES: dict[str, Callable[[Spec], dict[str, Any]]] = {
    BUS: bus,
    DISK_DIRECT: disk_direct,
    DISK_BUFFERED: disk_buffered,
    REGISTER: register,
}


def _read(paths: list[str], flags: int, chunk_bytes: int) -> dict[str, Any]:
    try:
        fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags) for path in paths]
    except OSError as error:
        raise Cannot(f"its file system refuses it: {error.strerror}") from error
    sizes = [os.fstat(fd).st_size for fd in fds]
    work = deque((fd, at) for fd, size in zip(fds, sizes, strict=True) for at in range(0, size, chunk_bytes))
    buffers = [mmap.mmap(-1, chunk_bytes) for _ in range(_READERS)]
    for buffer in buffers:
        buffer.write(bytes(chunk_bytes))
    go = threading.Event()

    def run(buffer: mmap.mmap) -> int:
        go.wait()
        count = 0
        while work:
            try:
                fd, at = work.popleft()
            except IndexError:
                break
            count += os.preadv(fd, [buffer], at)
        return count

    try:
        with ThreadPoolExecutor(_READERS) as pool:
            running = [pool.submit(run, buffer) for buffer in buffers]
            begin = time.perf_counter()
            go.set()
            nbytes = sum(future.result() for future in running)
            seconds = time.perf_counter() - begin
    finally:
        for fd in fds:
            os.close(fd)
    if nbytes != sum(sizes):
        raise Cannot(f"read {nbytes} of {sum(sizes)} bytes")
    return {"bytes": nbytes, "first_s": seconds}
